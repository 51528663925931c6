"""Keys: what is sealed opens with the key, in its place, and nowhere else."""

from __future__ import annotations

import base64
import json

import msgspec
import pytest

from streamworker import Keys
from streamworker.encryption import USES, hidden, new_key, sealed_in
from streamworker.errors import ConfigurationError, NoKey
from streamworker.job import ERROR_BYTES, Job
from streamworker.views.groups import normalised

ONE, TWO = new_key(), new_key()
KEYS = Keys(current="two", keys={"one": ONE, "two": TWO})
OLD = Keys(current="one", keys={"one": ONE})
WRONG = Keys(current="two", keys={"two": ONE})


def job(payload: bytes = b'{"n":1}', **options: object) -> Job:
    return Job(id="j1", queue="q", kind="k", payload=msgspec.Raw(payload), **options)  # type: ignore[arg-type]


def test_a_payload_opens_for_its_own_job_and_kind_alone():
    sealed = KEYS.sealed_job(job()).payload
    assert b'"n"' not in bytes(sealed)
    assert json.loads(bytes(sealed))["streamworker_sealed"]["key"] == "two"
    assert bytes(KEYS.opened_payload(sealed, "j1", ("other", "k"))) == b'{"n":1}'
    for job_id, kind in (("j2", "k"), ("j1", "other"), ("j", "1\nk")):
        with pytest.raises(NoKey, match="sealed for another job"):
            KEYS.opened_payload(sealed, job_id, (kind,))
    with pytest.raises(NoKey, match="'two', which this process does not have"):
        OLD.opened_payload(sealed, "j1", ("k",))
    with pytest.raises(NoKey, match="another key of that name"):
        WRONG.opened_payload(sealed, "j1", ("k",))


def test_what_is_sealed_for_one_purpose_does_not_open_for_another():
    result = msgspec.json.encode(KEYS.sealed_result("j1", b'{"n":1}'))
    assert KEYS.opened_result("j1", result) == b'{"n":1}'
    with pytest.raises(NoKey):
        KEYS.opened_payload(msgspec.Raw(result), "j1", ("k", ""))
    chunk = KEYS.sealed_bytes("output", "j1", b"text")
    assert KEYS.opened_bytes("output", "j1", chunk) == b"text"
    with pytest.raises(NoKey):
        KEYS.opened_bytes("step", "j1", chunk)


def test_an_older_key_still_opens():
    assert bytes(KEYS.opened_payload(OLD.sealed_job(job()).payload, "j1", ("k",))) == b'{"n":1}'
    assert KEYS.opened_bytes("step", "j1", OLD.sealed_bytes("step", "j1", b"1")) == b"1"
    assert KEYS.opened_text("j1", OLD.sealed_text("j1", "why")) == "why"


def test_what_was_never_sealed_is_as_it_is():
    plain = msgspec.Raw(b'{"n":1}')
    assert KEYS.opened_payload(plain, "j1", ("k",)) is plain
    assert KEYS.opened_result("j1", b"[1]") == b"[1]"
    assert KEYS.opened_bytes("output", "j1", b"\xdc\x00\x01") == b"\xdc\x00\x01"
    assert KEYS.opened_text("j1", "ValueError: [sealed with wax]") == "ValueError: [sealed with wax]"


@pytest.mark.parametrize("damage", ["", "AAAA", "!!", "A" * 200])
def test_damaged_bytes_open_with_no_key(damage):
    payload = json.dumps({"streamworker_sealed": {"key": "two", "data": damage}}, separators=(",", ":")).encode()
    with pytest.raises(NoKey):
        KEYS.opened_payload(msgspec.Raw(payload), "j1", ("k",))


def test_a_text_is_sealed_inside_another_and_bounded():
    text = f"failed 1 of 1 attempts: {KEYS.sealed_text('j1', 'ValueError: ä' + 'x' * 10_000)} (twice)"
    assert len(text) < 2000
    assert KEYS.opened_text("j1", text).startswith("failed 1 of 1 attempts: ValueError: äxxx")
    assert KEYS.opened_text("j2", text) == hidden(text) == "failed 1 of 1 attempts: [sealed two] (twice)"


def test_sealed_errors_are_grouped_by_class_and_place():
    errors = [f"ValueError: at mail.py:12 in send {KEYS.sealed_text(f'j{n}', 'x' * n)}" for n in (1, 5000)]
    assert {normalised(error[-ERROR_BYTES:], "") for error in errors} == {
        "ValueError: at mail.py:<n> in send [sealed two]"
    }


def test_a_job_that_may_replace_another_is_bound_to_its_deduplication_key():
    sealed = KEYS.sealed_job(job(key="invoice:1", replace=True)).payload
    assert bytes(KEYS.opened_payload(sealed, "the earlier job", ("k",))) == b'{"n":1}'
    with pytest.raises(NoKey):
        KEYS.opened_payload(sealed, "the earlier job", ("other",))
    found = sealed_in(sealed)
    assert found is not None
    found.of = "invoice:2"
    with pytest.raises(NoKey):
        KEYS.opened_payload(msgspec.Raw(msgspec.json.encode({"streamworker_sealed": found})), "j1", ("k",))


def test_every_form_tells_which_key_it_uses():
    result = KEYS.sealed_result("j1", b"1")
    forms = [
        bytes(KEYS.sealed_job(job(key="k", replace=True)).payload),
        json.dumps(result).encode(),
        json.dumps({"note": json.dumps(result)}).encode(),
        KEYS.sealed_text("j1", "why").encode(),
        KEYS.sealed_bytes("output", "j1", b"chunk"),
    ]
    for form in forms:
        assert {name for match in USES.findall(form) for name in match if name} == {b"two"}, form


def test_no_two_values_look_alike():
    assert KEYS.sealed_bytes("step", "j1", b"1") != KEYS.sealed_bytes("step", "j1", b"1")


@pytest.mark.parametrize(
    ("current", "keys", "sentence"),
    [
        ("b", {"a": ONE}, "the current key 'b' is not among the keys a"),
        ("a", {"a": "short"}, "the key 'a' is not 32 bytes"),
        ("a", {"a": b"short"}, "the key 'a' is not 32 bytes"),
        ("a", {"a": "ü"}, "the key 'a' is not 32 bytes"),
        ("a b", {"a b": ONE}, "'a b' is no id of a key"),
    ],
)
def test_keys_that_are_none_are_refused_in_a_sentence_without_them(current, keys, sentence):
    with pytest.raises(ConfigurationError, match=sentence) as caught:
        Keys(current=current, keys=keys)
    assert not any(str(key) in str(caught.value) for key in keys.values() if len(key) > 10)


def test_a_key_is_shown_nowhere():
    raw = base64.urlsafe_b64decode(ONE)
    assert ONE not in repr(KEYS)
    assert repr(raw) not in repr(KEYS)
    assert Keys(current="a", keys={"a": raw}).ids == {"a"}
