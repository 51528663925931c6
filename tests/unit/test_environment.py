"""Names of variables: which are known, which are mistakes, which are none of our business."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.errors import ConfigurationError
from streamworker.settings.environment import edit_distance, judge_names, lookup

KNOWN = ("STREAMWORKER_LEASE", "STREAMWORKER_REDIS_URL", "REDIS_URL")
LETTERS = st.text(alphabet="ABC", max_size=6)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("LEASE", "LEASE", 0),
        ("", "AB", 2),
        ("LEASE", "LESE", 1),
        ("LEASE", "LEEASE", 1),
        ("LEASE", "LEACE", 1),
        ("LEASE", "LAESE", 1),
        ("CA", "ABC", 2),  # 3 if a swapped pair could not be edited again
        ("KITTEN", "SITTING", 3),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@given(LETTERS, LETTERS, LETTERS)
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("STREAMWORKER_LAESE", "STREAMWORKER_LEASE"),
        ("STREAMWORKER_LEASES", "STREAMWORKER_LEASE"),
        ("STREAMWORKER_RELEASE", "STREAMWORKER_LEASE"),
        ("STREAMWORKER_LEASE_FIL", "STREAMWORKER_LEASE_FILE"),
        ("STREAMWORKER_LEASE_", "STREAMWORKER_LEASE"),
        ("STREAMWORKR_LEASE", "STREAMWORKER_LEASE"),
        ("STREAM_WORKER_LEASE", "STREAMWORKER_LEASE"),
        ("TSREAMWORKER_LEASE", "STREAMWORKER_LEASE"),
        ("streamworker_lease", "STREAMWORKER_LEASE"),
    ],
)
def test_a_misspelled_name_names_the_right_one(name, meant):
    misspelled, unknown = judge_names({name: "x"}, KNOWN)
    assert misspelled == [f"{name} is not a streamworker variable; did you mean {meant}?"]
    assert unknown == []


def test_other_names_with_our_prefix_are_unknown():
    misspelled, unknown = judge_names({"STREAMWORKER_COLOUR": "x"}, KNOWN)
    assert misspelled == []
    assert unknown == ["STREAMWORKER_COLOUR is not a streamworker variable and has no effect."]


@pytest.mark.parametrize(
    "name",
    [
        "STREAMWORKER_LEASE",
        "STREAMWORKER_LEASE_FILE",
        "REDIS_URL_FILE",
        "STREAMWORKER_TEST_FAILPOINT",
        "STREAMWORKER_SERVICE_HOST",
        "STREAMWORKER_REDIS_SERVICE_HOST",
        "STREAMWORKER_SERVICE_PORT",
        "STREAMWORKER_SERVICE_PORT_HTTP",
        "STREAMWORKER_PORT",
        "STREAMWORKER_PORT_6379_TCP",
        "STREAMWORKER_PORT_6379_TCP_ADDR",
        "STREAMWORKER_REDIS_PORT_6379_TCP_PROTO",
        "REDIS_URI",  # may belong to another program
        "PATH",
    ],
)
def test_names_that_are_right_or_not_ours(name):
    assert judge_names({name: "x"}, KNOWN) == ([], [])


def test_an_empty_variable_is_no_mistake():
    assert judge_names({"STREAMWORKER_LAESE": "", "STREAMWORKER_COLOUR": ""}, KNOWN) == ([], [])


def test_the_first_name_that_is_set_wins():
    env = {"STREAMWORKER_REDIS_URL": "", "REDIS_URL": "b"}
    assert lookup(env, ["STREAMWORKER_REDIS_URL", "REDIS_URL"]) == ("b", "REDIS_URL", False)
    assert lookup({**env, "STREAMWORKER_REDIS_URL": "a"}, ["STREAMWORKER_REDIS_URL", "REDIS_URL"]).value == "a"
    assert lookup({}, ["REDIS_URL"]) is None


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_file_holds_the_value(tmp_path, ending):
    path = tmp_path / "secret"
    path.write_bytes(f" a b {ending}".encode())
    assert lookup({"X_FILE": str(path)}, ["X"]) == (" a b ", f"X_FILE ({path})", True)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"\xff\xfesecret", "is not UTF-8"), (b"\n", "is empty"), (b"secret" * 20_000, "is longer")],
)
def test_a_file_that_cannot_be_a_value(tmp_path, content, problem):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        lookup({"X_FILE": str(path)}, ["X"])
    assert str(caught.value).startswith(f"X_FILE='{path}' ")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("path", ["/nonexistent/secret", "/", "a\0b"])
def test_a_file_that_cannot_be_read(path):
    with pytest.raises(ConfigurationError, match=r"^X_FILE=.* cannot be read"):
        lookup({"X_FILE": path}, ["X"])


def test_a_value_and_its_file_contradict_each_other():
    with pytest.raises(ConfigurationError, match="X and X_FILE are both set"):
        lookup({"X": "a", "X_FILE": "/b"}, ["X"])
    assert lookup({"X": "a", "X_FILE": ""}, ["X"]).value == "a"
