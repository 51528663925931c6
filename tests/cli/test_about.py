"""help, version, completion, config, check, and what importing them costs."""

import importlib
import json
import subprocess
import sys

import cyclopts
import pytest

from streamworker import cli
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.cli import command_tree, main
from tests.cli.conftest import both_modes
from tests.conftest import MODES

HEAVY = (
    "anyio._backends._asyncio",
    "asyncpg",
    "opentelemetry.sdk",
    "pygments",
    "rich",
    "streamworker.app",
    "streamworker.embedded",
    "streamworker.worker",
    "structlog",
    "uvloop",
)
CLIENTS = (*HEAVY, "asyncio", "msgspec", "redis")


def imported(env, words, names):
    """Runs a command in a Python of its own: (those of the names that it imported, what it printed)."""
    code = (
        "import gc, sys; from streamworker.cli import main; code = main(sys.argv[1:]);"
        f"print([n for n in {names} if n in sys.modules], code, gc.isenabled(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], env=env, capture_output=True, text=True, timeout=45
    )
    found, end = done.stderr.splitlines()[-1].rsplit("]", 1)
    assert end == " 0 True"  # the exit code, and imports left the collector as it was
    return found + "]", done.stdout


def test_version_imports_next_to_nothing(bare):
    found, out = imported(bare.env, "--version", (*CLIENTS, "cyclopts", "inspect"))
    assert found == "[]"
    assert out.startswith("streamworker ")


def test_the_parser_would_say_the_same_version(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    command_tree()(["--version"], result_action="return_value")
    assert capsys.readouterr().out == said


def test_help_imports_no_client(bare):
    """Nobody waits for Redis clients and event loops in order to read what there is."""
    found, out = imported(bare.env, "--help", [name for name in CLIENTS if name != "rich"])
    assert found == "[]"
    assert "pending" in out


LISTINGS = ("queues", "queues --json", "workers", "pending", "delayed", "dead", "queues --log-format json")
FORKING = """
import gc, json, os, sys
from streamworker.cli import main

def run(words, names):
    code = main(words.split())
    print(json.dumps([words, [name for name in names if name in sys.modules], code, gc.isenabled()]), flush=True)

first, *others = sys.argv[2:]
run(first, sys.argv[1].split())
for words in others:
    print(f"# {words}", file=sys.stderr, flush=True)
    if not (pid := os.fork()):
        if "--log-format" in words:
            os.environ["STREAMWORKER_NOSUCHTHING"] = "1"
        run(words, sys.argv[1].split())
        sys.exit()
    os.waitpid(pid, 0)
"""


@pytest.fixture
def listings(sw, raw):
    """(what each listing printed, (what it imported, its exit code, whether it collects), its standard error).

    The first runs in a Python of its own, and the others in forks of it: what they import beyond it is theirs.
    """
    raw.xadd("stream:{notes}", {"job": json.dumps({"kind": "note.write", "payload": {"text": "x"}})})
    command = [sys.executable, "-c", FORKING, " ".join(HEAVY), *LISTINGS]
    done = subprocess.run(command, env=sw.env, capture_output=True, text=True, timeout=45)
    out, ends, printed = {}, {}, []
    for line in done.stdout.splitlines():
        if line.startswith('["') and json.loads(line)[0] in LISTINGS:
            words, *end = json.loads(line)
            out[words], ends[words], printed = "\n".join(printed), end, []
        else:
            printed.append(line)
    return out, ends, dict(each.split("\n", 1) for each in done.stderr.split("# ")[1:])


def test_listings_import_what_they_use(listings):
    """Nobody waits for PostgreSQL's driver, a worker, tracebacks in colours and OpenTelemetry in order to see a queue.

    What was put off is not lost: the first event that a listing logs configures the logs as the flags say.
    """
    out, ends, errors = listings
    *quiet, logs = LISTINGS
    for words in quiet:
        assert ends[words] == [[], 0, True], words
        assert ("notes" in out[words]) is words.startswith("queues")
    assert ends[logs][1:] == [0, True]
    (line,) = [json.loads(line) for line in errors[logs].splitlines() if line.startswith("{")]
    assert (line["event"], line["level"]) == ("setting_without_effect", "warning")


@pytest.fixture(scope="module")
def assembled():
    """(the tree of commands, the arguments of those that have assembled them)."""
    return command_tree(), {}


@pytest.fixture
def tree(assembled, monkeypatch):
    """One tree for help and completion, whose commands assemble their arguments once: help does so three times a page."""
    root, made = assembled
    assemble = cyclopts.App.assemble_argument_collection

    def once(app, **options):
        if app.name == ("completion",):  # which is parsed here, and arguments keep what was parsed
            return assemble(app, **options)
        if id(app) not in made:
            made[id(app)] = assemble(app, **{**options, "parse_docstring": True})
        return made[id(app)]

    monkeypatch.setattr(cyclopts.App, "assemble_argument_collection", once)
    monkeypatch.setattr(cli, "command_tree", lambda: root)
    return root


@pytest.mark.all
def test_every_command_has_help(tree, capsys):
    root = tree
    for name, *_ in cli._COMMANDS:
        app = root[name]
        subcommands = [sub for sub in app if not sub.startswith("-")]
        for words in ([name], *([name, sub] for sub in subcommands)):
            root([*words, "--help"], result_action="return_value")
            text = capsys.readouterr().out
            assert "Usage: streamworker" in text
    expected = {
        "pending": {"list", "show", "release", "bury", "drop"},
        "delayed": {"list", "run", "drop"},
        "dead": {"list", "show", "retry", "drop"},
        "workers": {"list", "prune"},
        "queues": {"list"},
    }
    for name, subs in expected.items():
        assert subs <= set(root[name])


def test_modules_are_found():
    for _, path, *_ in cli._COMMANDS:
        module, _, attribute = path.partition(":")
        assert getattr(importlib.import_module(f"streamworker.cli{module}"), attribute)


def test_version(bare):
    assert bare.ok("--version").stdout.startswith("streamworker")


@pytest.mark.parametrize(
    "shell", ["bash", pytest.param("zsh", marks=pytest.mark.all), pytest.param("fish", marks=pytest.mark.all)]
)
def test_completion(bare, tree, shell):
    script = bare.ok("completion", shell).stdout
    assert "pending" in script
    if shell != "bash":  # which describes nothing
        assert "`dead groups`" in script.replace("\\`", "`"), "a text of help is no Markdown"


def test_config(bare, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("postgresql://u:hidden2@db/x\n")
    env = {"REDIS_URL": "redis://u:hidden1@host/0", "DATABASE_URL_FILE": str(secret), "STREAMWORKER_LEASE": "3"}
    done = bare.ok("config", "--grace", "7.5", "--json", **env)
    rows = {row["name"]: row for row in done.rows}
    assert rows["STREAMWORKER_REDIS_URL"] == {
        "name": "STREAMWORKER_REDIS_URL", "value": "redis://u:***@host/0", "source": "REDIS_URL",
    }  # fmt: skip
    assert rows["STREAMWORKER_LEASE"]["value"] == "3"
    assert rows["STREAMWORKER_GRACE"] == {"name": "STREAMWORKER_GRACE", "value": "7.5", "source": "--grace"}
    assert rows["STREAMWORKER_GROUP"]["source"] == "default"
    table = bare.ok("config", **env)
    assert "hidden" not in table.stdout + done.stdout
    assert len(table.stdout.splitlines()) == len(rows) + 1
    assert bare("config", STREAMWORKER_LEASE="soon").returncode == 78


def found(done, subject):
    return [(row["severity"], row["sentence"]) for row in done.rows if row["subject"] == subject]


@pytest.mark.parametrize("mode", MODES)
def test_check_of_a_sound_server(bare, own_server, mode):
    bare.env["REDIS_URL"] = own_server.url
    bare.env["STREAMWORKER_MODE"] = mode
    done = bare.ok("check", "--app", "jobs:app", "--json")
    assert {row["severity"] for row in done.rows} == {"ok"}
    assert [list(row) for row in done.rows] == [["severity", "subject", "sentence"]] * len(done.rows)
    with own_server.client() as client:
        assert client.keys("*") == []
    assert "FAIL" not in bare.ok("check").stdout


def test_check_finds_what_loses_jobs(sw, raw):
    raw.xadd("stream:{notes}", {"job": json.dumps({"kind": "nobody.knows", "payload": {}})})
    raw.xadd("stream:{notes}", {"job": json.dumps({"payload": {"text": "x"}})})
    raw.xadd("stream:{notes}:dead", {"job": json.dumps({"kind": "long.gone", "payload": {}})})
    raw.xgroup_create("stream:{holds}", "others", "0", mkstream=True)
    raw.set("stream:{sticks}:due", "x")
    raw.config_set("maxmemory-policy", "allkeys-lru")
    try:
        done = sw(
            "check", "--app", "jobs:app", "--json", "--queues", "notes,holds,sticks", STREAMWORKER_NOSUCHTHING="1"
        )
    finally:
        raw.config_set("maxmemory-policy", "noeviction")
    assert done.returncode == 1
    assert [severity for severity, _ in found(done, "memory")] == ["error"]
    assert [severity for severity, _ in found(done, "persistence")] == ["error"]
    assert [severity for severity, _ in found(done, "settings")] == ["warning"]
    assert found(done, "groups")[0][0] == "error"
    assert "'others'" in found(done, "groups")[0][1]
    assert "stream:{sticks}:due" in found(done, "keys")[0][1]
    assert "dooms" in found(done, "queues")[0][1]
    handlers = found(done, "handlers")
    assert [(severity, "nobody.knows" in s, "long.gone" in s) for severity, s in handlers] == [
        ("warning", False, True),
        ("error", True, False),
    ]


@pytest.mark.parametrize("entry", ["is there", "is gone"])
def test_check_finds_a_stream_that_takes_no_entry_any_more(sw, raw, entry):
    last = f"{2**64 - 1}-{2**64 - 1}"
    raw.xadd("stream:{notes}:high", {"job": "{}"}, last)
    if entry == "is gone":
        raw.xdel("stream:{notes}:high", last)
    done = sw("check", "--json", "--queues", "notes")
    assert done.returncode == 1
    ((severity, sentence),) = found(done, "queues")
    assert severity == "error" and "stream:{notes}:high" in sentence
    raw.delete("stream:{notes}:high")
    assert not found(sw("check", "--json", "--queues", "notes"), "queues")


@pytest.mark.parametrize(
    ("ground", "dryrun", "lacks"),
    [("stream", True, "XDEL"), ("stream", False, "XDEL"), ("list", True, "LREM"), ("list", False, "LREM")],
    indirect=["ground"],
)
def test_check_of_a_poor_user(sw, raw, redis_url, dryrun, lacks):
    if dryrun and int(raw.info("server")["redis_version"].split(".")[0]) < 7:
        pytest.skip("needs Redis 7, which brought ACL DRYRUN")
    rules = ["on", ">pw", "~*", "+@all", f"-{lacks.lower()}", "-config", *([] if dryrun else ["-acl"])]
    raw.execute_command("ACL", "SETUSER", "poor", *rules)
    try:
        raw.xgroup_create("stream:{notes}", "workers", "0", mkstream=True)
        done = sw("check", "--json", REDIS_URL=redis_url.replace("//", "//poor:pw@"))
    finally:
        raw.execute_command("ACL", "DELUSER", "poor")
    assert done.returncode == 1
    severity, sentence = found(done, "permissions")[0]
    assert severity == "error"
    assert lacks in sentence
    # Redis 7 permits no channel unless told to; nothing is lost by that.
    assert {severity for severity, _ in found(done, "permissions")[1:]} <= {"warning"}
    assert found(done, "persistence")[0][0] == "warning"
    assert [key for key in raw.keys("*") if b"check" in key] == []


@both_modes
def test_check_finds_what_lies_where_the_other_mode_reads(sw, ground):
    other = {"stream": ListKeys, "list": QueueKeys}[ground.mode]("notes")
    ground.raw.execute_command(*other.adding("low", b'{"payload":{"text":"x"}}'))
    ((severity, sentence),) = found(sw("check", "--json", "--queues", "notes"), "mode")
    assert severity == "warning"
    assert "1 jobs of notes are in" in sentence
    assert {"stream": "run streamworker bridge", "list": "stream mode"}[ground.mode] in sentence


def test_check_says_what_it_cannot_reach(bare):
    done = bare("check", "--json", "--app", "jobs:nope", REDIS_URL="redis://127.0.0.1:1")
    assert done.returncode == 1
    assert [(row["severity"], row["subject"]) for row in done.rows] == [
        ("ok", "settings"), ("error", "app"), ("error", "server"), ("ok", "postgresql"),
    ]  # fmt: skip
    away = bare("check", "--json", REDIS_URL="redis://127.0.0.1:1", DATABASE_URL="postgresql://127.0.0.1:1/x")
    ((severity, sentence),) = found(away, "postgresql")
    assert severity == "error"
    assert "does not answer" in sentence
    wrong = bare("check", "--json", STREAMWORKER_LEASE="x", STREAMWORKER_GRACE="y")
    assert [(row["severity"], row["subject"]) for row in wrong.rows] == [("error", "settings")] * 2


def test_a_reader_that_leaves(sw, raw):
    """``| head`` is no error."""
    for _ in range(3):
        raw.xadd("stream:{q}:dead", {"job": "x" * 100_000, "reason": "r"})
    process = sw.piped("dead", "--json", "--payload")
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(10) == 0
