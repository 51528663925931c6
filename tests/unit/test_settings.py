"""Settings: every variable, its default, its bounds, and what a wrong one says."""

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from streamworker.errors import ConfigurationError
from streamworker.settings import Address, FairWeight, PartitionSpec, QueueSpec, Settings
from streamworker.settings.rules import to_text
from tests.conftest import examples

# The documented variables (docs/design.md, "Environment"), their defaults, and values that must be accepted.
NAME = st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True)
SECONDS = st.floats(min_value=0.2, max_value=86_400)
DASHBOARD = ("DASHBOARD_USER", "DASHBOARD_PASSWORD", "DASHBOARD_VIEWER", "DASHBOARD_VIEWER_PASSWORD")
VARIABLES = {
    "REDIS_URL": (
        None,
        st.sampled_from(
            [
                "redis://h:1/0",
                "rediss://u:p@h",
                "unix:///run/x",
                "unix://:p@/run/x?db=1",
                "embedded",
                "redis+cluster://h",
            ]
        ),
    ),
    "DATABASE_URL": (None, st.sampled_from(["postgresql://u:p@h:1/x", "postgresql:///x?host=/run"])),
    "DATABASE_DIRECT_URL": (None, st.just("postgresql://h/x")),
    "APP": (None, st.sampled_from(["app:app", "shop.jobs:app", "shop.jobs:Jobs.app"])),
    "MODE": ("stream", st.sampled_from(["stream", "list"])),
    "QUEUES": (
        (),
        st.lists(
            st.builds(QueueSpec, NAME, st.none() | st.integers(1, 10_000)), min_size=1, unique_by=lambda spec: spec.name
        ).map(tuple),
    ),
    "GROUP": ("workers", NAME.filter(lambda name: name.lower() != "streams")),
    "WORKER_ID": (None, st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)),
    "CONCURRENCY": (100, st.integers(1, 10_000)),
    "DATABASE_CONNECTIONS": (10, st.integers(1, 10_000)),
    "LEASE": (15.0, SECONDS),
    "GRACE": (25.0, SECONDS | st.just(0.0) | st.just(1e-7)),
    "MAX_JOBS": (None, st.integers(1, 10**12)),
    "MAX_RSS": (None, st.integers(1, 10**9)),
    "MAX_AGE": (None, SECONDS.filter(lambda seconds: seconds >= 1)),
    "TARGET_WAIT": (60.0, SECONDS),
    "MAX_DELIVERIES": (5, st.integers(1, 10_000)),
    "UNKNOWN_KIND_TTL": (86_400.0, SECONDS | st.just(0.0)),
    "MAX_JOB_BYTES": (262_144, st.integers(1, 67_108_864)),
    "KEY_TTL": (86_400.0, SECONDS),
    "PRIORITY": ("strict", st.sampled_from(["strict", "weighted"])),
    "PARTITIONS": (
        (),
        st.lists(
            st.builds(PartitionSpec, st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.integers(1, 1024), st.just(())),
            min_size=1,
            unique_by=lambda each: each.name,
        ).map(tuple),
    ),
    "FAIR_WEIGHTS": (
        (),
        st.lists(
            st.builds(FairWeight, st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.floats(0.001, 1000)),
            min_size=1,
            unique_by=lambda each: each.tenant,
        ).map(tuple),
    ),
    "LIST_POP": ("move", st.sampled_from(["move", "brpop"])),
    "AUDIT_RETENTION": (365 * 86_400.0, st.floats(60, 86_400)),
    "LEDGER": ("auto", st.sampled_from(["auto", "off"])),
    "RELAY": ("on", st.sampled_from(["on", "off"])),
    "HISTORY": ("on", st.sampled_from(["on", "off"])),
    "LOOP": ("auto", st.sampled_from(["auto", "uvloop", "asyncio"])),
    "NAMESPACE": ("", st.from_regex(r"[A-Za-z0-9._:-]{1,20}", fullmatch=True)),
    "STATE_DIR": (Path(".streamworker"), st.sampled_from([Path("/var/lib/x"), Path("a/b")])),
    "HTTP": (None, st.builds(Address, st.sampled_from(["0.0.0.0", "::1", "localhost"]), st.integers(0, 65_535))),
    "LOG_LEVEL": ("info", st.sampled_from(["debug", "info", "warning", "error", "critical"])),
    "LOG_FORMAT": ("json", st.sampled_from(["console", "json"])),
    "OFFLOAD_BYTES": (None, st.integers(1024, 64 * 1_048_576)),
    "JOB_LOG": ("off", st.sampled_from(["off", "ctx", "all"])),
    "JOB_LOG_LINES": (200, st.integers(1, 10_000)),
}


def load(env=None, **flags):
    return Settings.load(env or {}, tty=False, **flags)


def problem(env=None, **flags):
    with pytest.raises(ConfigurationError) as caught:
        load(env, **flags)
    assert caught.value.exit_code == 78
    assert caught.value.__cause__ is None, "a cause would print a traceback with values in it"
    return str(caught.value)


def described(settings):
    return {line.name.removeprefix("STREAMWORKER_"): line for line in settings.describe()}


def test_the_documented_variables_and_no_others_exist():
    assert set(described(load())) == set(VARIABLES)


@pytest.mark.parametrize("name", VARIABLES)
def test_defaults(name):
    settings = load()
    assert getattr(settings, name.lower()) == VARIABLES[name][0]
    assert described(settings)[name] == (f"STREAMWORKER_{name}", to_text(VARIABLES[name][0]), "default")
    assert settings == Settings()


@pytest.mark.parametrize("name", VARIABLES)
@given(data=st.data())
@bounded(max_examples=examples(15))  # of each of many variables
def test_every_variable_round_trips(name, data):
    value = data.draw(VARIABLES[name][1])
    field, text = name.lower(), to_text(value)
    from_env = load({f"STREAMWORKER_{name}": text})
    assert getattr(from_env, field) == value
    assert getattr(load({}, **{field: value}), field) == value, "a typed flag is understood"
    assert getattr(load({}, **{field: text}), field) == value, "a flag of text is understood"
    assert getattr(Settings(**{field: value}), field) == value
    assert described(from_env)[name].source == f"STREAMWORKER_{name}"
    # What `config` shows can be set again, unless a password is hidden in it.
    shown = described(from_env)[name].value_masked
    assert "***" in shown or getattr(load({f"STREAMWORKER_{name}": shown}), field) == value


def test_the_sentence_of_a_wrong_value():
    assert problem({"STREAMWORKER_LEASE": "0.1"}) == (
        "STREAMWORKER_LEASE is '0.1'; it must be seconds from 0.2 to 86400 without a unit, such as 15 or 2.5."
    )
    assert problem(lease=0.1).startswith("--lease is '0.1';")
    assert problem(max_deliveries=0).startswith("--max-deliveries is '0';")


@pytest.mark.parametrize("value", ["", "MAIN", "Stream"])
def test_words_are_read_in_any_case_and_empty_is_unset(value):
    env = {"STREAMWORKER_MODE": value}
    assert "MAIN" in problem(env) if value == "MAIN" else load(env).mode == "stream"


def test_typed_values_of_the_wrong_kind_are_refused():
    for wrong in ({"lease": None}, {"group": ""}, {"concurrency": True}, {"concurrency": 1.5}, {"lease": float("nan")}):
        with pytest.raises(ConfigurationError):
            Settings(**wrong)
    with pytest.raises(ConfigurationError):
        msgspec.structs.replace(Settings(), concurrency=0)
    with pytest.raises(TypeError, match="colour"):
        load(colour="red")


def test_all_problems_are_reported_at_once():
    lines = problem({"STREAMWORKER_LEASE": "x", "STREAMWORKER_GROUPS": "a", "STREAMWORKER_HTTP": "1"}, mode="x").split(
        "\n"
    )
    assert len(lines) == 4
    for name in ("STREAMWORKER_LEASE ", "STREAMWORKER_GROUPS ", "STREAMWORKER_HTTP ", "--mode "):
        assert any(line.startswith(name) for line in lines), name


def test_flag_over_prefix_over_plain_over_default():
    env = {"REDIS_URL": "redis://plain"}
    assert load(env).redis_url == "redis://plain"
    assert described(load(env))["REDIS_URL"].source == "REDIS_URL"
    env["STREAMWORKER_REDIS_URL"] = "redis://prefix"
    assert load(env).redis_url == "redis://prefix"
    assert load(env, redis_url=None).redis_url == "redis://prefix"
    by_flag = load(env, redis_url="redis://flag")
    assert by_flag.redis_url == "redis://flag"
    assert described(by_flag)["REDIS_URL"] == ("STREAMWORKER_REDIS_URL", "redis://flag", "--redis-url")
    assert load({"LEASE": "3", "MODE": "list"}).lease == 15, "only the two URLs are read without the prefix"


def test_a_file_fills_any_variable(tmp_path):
    path = tmp_path / "url"
    path.write_text("postgres://u:S3cr3t@h/x\n")
    settings = load({"DATABASE_URL_FILE": str(path)})
    assert settings.database_url == "postgresql://u:S3cr3t@h/x"
    assert described(settings)["DATABASE_URL"] == (
        "STREAMWORKER_DATABASE_URL",
        "postgresql://u:***@h/x",
        f"DATABASE_URL_FILE ({path})",
    )
    message = problem({"STREAMWORKER_CONCURRENCY_FILE": str(path)})
    assert message.startswith(f"STREAMWORKER_CONCURRENCY_FILE ({path}) is ***;")
    assert problem({"REDIS_URL": "redis://h", "REDIS_URL_FILE": str(path)}).startswith("REDIS_URL and REDIS_URL_FILE")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgres+psycopg2"])
def test_every_spelling_of_postgresql(scheme):
    assert (
        load({"DATABASE_URL": f"{scheme}://u:p%2F@h:5432,i/x?a=b"}).database_url == "postgresql://u:p%2F@h:5432,i/x?a=b"
    )


def test_a_raw_slash_in_a_password_gets_the_hint():
    message = problem({"REDIS_URL": "redis://:S3/cr3t@h"})
    assert message.startswith("REDIS_URL is 'redis://:***@h' (it does not parse; percent-encode special characters")


@given(
    st.text(min_size=1).map(lambda text: f"S3{text}cr3t"),
    st.sampled_from(["redis://:{}@h:x", "{}", "redis:{}@h", "x://:{}"]),
)
def test_no_error_shows_the_secret_of_a_wrong_url(password, form):
    # Without a host, what follows an "@" of the password cannot be told from one.
    assume(form != "x://:{}" or "@" not in password)
    # And a bare password that looks like a URL is taken for one: "S3://cr3t" may be a scheme and a host.
    assume(form != "{}" or "://" not in password)
    for name in ("REDIS_URL", "DATABASE_URL"):
        message = problem({name: form.format(password)})
        assert "S3" not in message
        assert "cr3t" not in message


def test_neither_repr_nor_describe_shows_a_password():
    settings = load({"REDIS_URL": "redis://:S3cr3t@h", "DATABASE_URL": "postgres://u:S3cr3t@h/x"}, lease=3)
    assert "S3cr3t" in settings.redis_url
    assert repr(settings) == (
        "Settings(STREAMWORKER_REDIS_URL='redis://:***@h', STREAMWORKER_DATABASE_URL='postgresql://u:***@h/x', "
        "STREAMWORKER_LEASE='3')"
    )
    assert "S3cr3t" not in str(settings.describe())
    assert "S3cr3t" not in str(list(settings.__rich_repr__()))


def test_a_value_set_in_code_says_so():
    assert described(Settings(lease=3))["LEASE"] == ("STREAMWORKER_LEASE", "3", "code")


@pytest.mark.parametrize("name", [*VARIABLES, *DASHBOARD])
@given(data=st.data())
@bounded(max_examples=examples(8))  # of each of many names
def test_one_wrong_letter_names_the_right_variable(name, data):
    at = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ_"))
    edits = [name[:at] + name[at + 1 :], name[:at] + letter + name[at:], name[:at] + letter + name[at + 1 :]]
    if at:
        edits.append(name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :])
    wrong = data.draw(st.sampled_from(edits))
    known = {*VARIABLES, *DASHBOARD}
    if wrong in known or wrong.startswith("TEST_") or wrong.endswith("_PORT"):
        return
    message = problem({f"STREAMWORKER_{wrong}": "x"})
    assert re.search(rf"^STREAMWORKER_{wrong} is not .*; did you mean STREAMWORKER_{name}\?$", message, re.MULTILINE)


def test_unknown_names_are_warnings_and_known_ones_are_not():
    env = {"STREAMWORKER_COLOUR": "red", "STREAMWORKER_PORT_6379_TCP_ADDR": "x"}
    env |= {f"STREAMWORKER_{name}": "x" for name in DASHBOARD}
    assert load(env).warnings == ("STREAMWORKER_COLOUR is not a streamworker variable and has no effect.",)
    assert load().warnings == ()


def test_the_log_format_follows_the_terminal_unless_told():
    on_terminal = Settings.load({}, tty=True)
    assert on_terminal.log_format == "console"
    assert described(on_terminal)["LOG_FORMAT"].source == "default (standard error is a terminal)"
    assert Settings.load({"STREAMWORKER_LOG_FORMAT": "json"}, tty=True).log_format == "json"
    assert Settings.load({}, tty=False).log_format == "json"


def test_a_ledger_needs_a_database():
    assert "set DATABASE_URL" in problem({"STREAMWORKER_LEDGER": "on"})
    assert load({"STREAMWORKER_LEDGER": "on", "DATABASE_URL": "postgres://h/x"}).ledger == "on"
    assert load({"STREAMWORKER_LEDGER": "on", "REDIS_URL": "embedded"}).ledger == "on"


def test_missing_servers_name_the_cure():
    with pytest.raises(ConfigurationError, match=r"set REDIS_URL=redis://.* or REDIS_URL=embedded"):
        load().require_redis_url()
    with pytest.raises(ConfigurationError, match="set DATABASE_URL=postgresql://"):
        load().require_database_url()
    settings = load({"REDIS_URL": "embedded", "DATABASE_URL": "postgres://h/x"})
    assert settings.require_redis_url() == "embedded"
    assert settings.require_database_url() == "postgresql://h/x"


def test_http_can_be_switched_off_by_a_flag():
    env = {"STREAMWORKER_HTTP": "[::1]:8080"}
    assert load(env).http == Address("::1", 8080)
    assert load(env, http="off").http is None


def test_the_real_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("STREAMWORKER_LEASE", "3")
    assert Settings.load().lease == 3


def test_a_home_directory_is_filled_in(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    assert load({"STREAMWORKER_STATE_DIR": "~/state"}).state_dir == Path("/home/x/state")
