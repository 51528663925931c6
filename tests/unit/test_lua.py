"""Lua files as text: each says what it takes and gives, uses what it says, and is called so."""

import ast
import itertools
import re
from pathlib import Path

import pytest

from streamworker import broker
from streamworker.broker import scripts

FOLDER = Path(broker.__file__).parent / "lua"
FILES = sorted(FOLDER.glob("*.lua"))
TAKES_KEYS = {  # functions of the prelude to the positions of their parameters that are keys
    "pending_entry": [0], "read_only": [0], "keep": [0, 3], "add": [1], "park": [4, 5, 6, 7], "leases_of": [0],
    "appointed": [0], "outlive": [0], "base_of": [0], "level_of": [0], "fill": [1], "let_go": [0],
    "append": [0], "announce": [0], "put_off": [0, 1],
}  # fmt: skip
KEYED = re.compile(
    r"redis\.p?call\(\s*'([A-Z]+)'(?:\s*,\s*'(GROUPS|CREATE|DELCONSUMER|CREATECONSUMER|STREAM|CONSUMERS)')?\s*,\s*([^,)]+)"
)


def header(text: str) -> str:
    return "".join(itertools.takewhile(lambda line: line.startswith("--"), text.splitlines(keepends=True)))


def code(text: str) -> str:
    return "\n".join(re.sub(r"--.*", "", line) for line in text.splitlines())


def named(path: Path) -> str:
    return path.stem


def declared(text: str, array: str) -> tuple[set[int], int | None]:
    """(single indexes, the index from which on any number may follow) of KEYS or ARGV, by the header."""
    single: set[int] = set()
    rest: int | None = None
    for match in re.finditer(rf"^-- {array}(?:\[([^\]]+)\])?\s", header(text), re.MULTILINE):
        first, dots, last = (match.group(1) or "1..").partition("..")
        if not dots:
            single.add(int(first))
        elif last.isdigit():
            single |= set(range(int(first), int(last) + 1))
        else:
            start = int(first) if first.isdigit() else 1
            rest = min(rest or start, start)
    return single, rest


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_header_declares_keys_arguments_and_what_is_returned(path):
    text = path.read_text()
    head = header(text)
    assert head.startswith(f"-- {path.stem}: ")
    assert re.search(r"^-- KEYS", head, re.MULTILINE)
    assert re.search(r"^-- ARGV", head, re.MULTILINE) or "ARGV" not in code(text)
    assert re.search(r"^-- returns? ", head, re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_keys_and_arguments_in_use_are_declared(path):
    text = path.read_text()
    for array in ("KEYS", "ARGV"):
        single, rest = declared(text, array)
        used = {int(number) for number in re.findall(rf"{array}\[(\d+)\]", code(text))}
        assert {n for n in used if rest is None or n < rest} <= single, array
        if rest is None and not re.search(rf"{array}\[[^\d]", code(text)):
            assert single <= used, f"{array} declared but never read"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_only_declared_keys_are_touched(path):
    """A key made up in a script works on a single server and breaks in a cluster."""
    body = code(path.read_text())
    held = {"stream": r"KEYS\[|KEYS\)", "target": r"stream\[.*KEYS\["}  # locals that only ever hold a declared key
    # Keys of lines are made of what all keys of a queue start with, their hash tag included: the next test but one.
    if path.stem in ("prelude", "purge"):
        made = r"^base \.\. |^ready_of\("
        held |= dict.fromkeys(("set", "state", "line", "ready", "tenants"), made)
    if path.stem == "prelude":  # parameters that are keys, which the next test holds
        held |= dict.fromkeys(("key", "due", "bodies", "calls", "ended"), "")
    if path.stem == "unique":  # parameters of its own functions
        held |= dict.fromkeys(("key", "mark"), "")
    if path.stem == "schedule_put":  # a channel, which no slot holds
        held |= {"ARGV[6]": ""}
    for command, _, key in KEYED.findall(body):
        if command not in {"INFO", "TIME", "XREADGROUP"}:
            known = key.strip().startswith(("KEYS[", "base .. ':", "ready_of(")) or key.strip() in held
            assert known, f"{command} {key}"
    for streams in re.findall(r"'STREAMS', ([^,]+)", body):
        assert streams.startswith("KEYS[")
    for name, source in held.items():
        for value in re.findall(rf"(?:local {name} =|for _, {name} in) (.+)", body):
            assert re.search(source, value) or value.startswith("tonumber("), f"{name} = {value}"
    if "function gone(stream" in body:
        assert set(re.findall(r"gone\(([^,]+),", body)) == {"stream", "KEYS[k]"}
    assert not re.search(r"'(KEYS|SCAN|FLUSHALL|FLUSHDB|EVAL|MULTI)'", body)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_keys_of_lines_are_made_of_a_declared_key(path):
    """What all keys of a queue start with is cut from a declared one, so that a cluster has them in the same slot."""
    for value in re.findall(r"\bbase = (?:[^\n]*?, )*?(base_of\([^)]*\))", code(path.read_text())):
        assert value in ("base_of(key)", "base_of(due)") or value.startswith("base_of(KEYS["), value
    assert len(re.findall(r"\bbase = ", code(path.read_text()))) <= 2


def arguments(text: str) -> list[str]:
    """The arguments of a call, given what stands behind its opening parenthesis."""
    found, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return [each.strip() for each in found]
        if char == "," and not depth:
            found.append("")
        else:
            found[-1] += char
    raise AssertionError(f"a call without an end: {text[:60]}")


def test_the_prelude_is_given_declared_keys_alone():
    prelude = code((FOLDER / "prelude.lua").read_text())
    functions = {
        name: inner.split(", ") for name, inner in re.findall(r"^local function (\w+)\((.*?)\)", prelude, re.MULTILINE)
    }
    keys = {"key", "due", "bodies", "calls", "ended"}
    places = {name: [n for n, each in enumerate(inner) if each in keys] for name, inner in functions.items()}
    assert {name: at for name, at in places.items() if at} == TAKES_KEYS
    calls = 0
    for path in FILES:
        body = code(path.read_text())
        for name, positions in TAKES_KEYS.items():
            for call in re.finditer(rf"(?<!function )\b{name}\(", body):
                given = arguments(body[call.end() :])
                for at in positions:
                    if at < len(given):
                        right = ("key", "target", "due") if path.stem in ("prelude", "promote", "limit") else ()
                        made = given[at].startswith(("KEYS[", "ready_of(shape, base, ", "base .. ':"))
                        assert made or given[at] in right, f"{path.stem}: {name}({given})"
                        calls += 1
    assert calls > 30


def test_a_script_stands_behind_what_it_calls_of_the_prelude_alone():
    assert "local function park(" in scripts.PARK.text
    assert "local function add(" in scripts.PARK.text, "which park calls"
    assert "appointed" not in scripts.PARK.text
    assert scripts.CLAIM.text == (FOLDER / "claim.lua").read_text(), "the hot path pays for none"
    shared = re.findall(r"^local function (\w+)\(", (FOLDER / "prelude.lua").read_text(), re.MULTILINE)
    for script in (value for value in vars(scripts).values() if isinstance(value, scripts.LuaScript)):
        made = re.findall(r"^local function (\w+)\(", script.text, re.MULTILINE)
        assert len(made) == len(set(made)), f"{script.name} has a function of its own under a shared name"
        assert all(len(re.findall(rf"\b{name}\(", code(script.text))) > 1 for name in made if name in shared), (
            script.name
        )


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_depends_on_a_clock_of_ours_or_on_chance(path):
    body = code(path.read_text())
    assert "math.random" not in body
    assert "os." not in body
    # Acknowledging frees, storing grows: the growing write comes first, or memory running out in between loses a job.
    for function in re.split(r"\n(?=for |local function )", body):
        acks, adds = function.find("'XACK'"), function.find("'XADD'")
        assert not (0 <= acks < adds)
    if path.stem.startswith("list_"):
        grows = max(body.rfind(f"'{command}'") for command in ("RPUSH", "LPUSH", "XADD", "ZADD"))
        shrinks = [body.find(f"'{command}'", grows) for command in ("LREM", "LTRIM")]
        moved = grows >= 0 and any(word in body for word in ("'LREM'", "'LTRIM'"))
        assert not moved or max(shrinks) > 0, "the last thing a move does is to delete"


def test_every_file_is_loaded_and_every_script_has_a_file():
    loaded = {value.name: value for value in vars(scripts).values() if isinstance(value, scripts.LuaScript)}
    assert set(loaded) == {path.stem for path in FILES} - {"prelude"}
    for name, script in loaded.items():
        assert vars(scripts)[name.upper()] is script


FIXED = {  # scripts whose number of keys is fixed, as the header says
    path.stem: max(int(n) for n in re.findall(r"^-- KEYS\[(?:\d+\.\.)?(\d+)\]", path.read_text(), re.MULTILINE))
    for path in FILES
    if not re.search(r"^-- KEYS(\[[^\]]*\.\.\]|\s)", path.read_text(), re.MULTILINE)
}


def named_script(node: ast.AST) -> str:
    """``NAME`` of ``scripts.NAME`` with a fixed number of keys."""
    return node.attr if isinstance(node, ast.Attribute) and node.attr.isupper() and node.attr.lower() in FIXED else ""


def test_call_sites_pass_as_many_keys_as_declared():
    """Every ``scripts.NAME(client, [keys], ...)`` and ``run(scripts.NAME, [keys], ...)`` with a literal list."""
    counted = set()
    for path in FOLDER.parent.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            parts = [call.func, *call.args]
            for part, keys in itertools.pairwise([parts[0], *parts[2:]] if named_script(call.func) else parts):
                name = named_script(part)
                if name and isinstance(keys, ast.List) and not any(isinstance(n, ast.Starred) for n in keys.elts):
                    assert len(keys.elts) == FIXED[name.lower()], f"{path.name}:{call.lineno} {name}"
                    counted.add(name)
    assert counted >= {"DONE", "PARK", "CONFIRM", "RENEW", "OWN_PENDING", "CANCELS"}


ENDS = {"change", "dispose", "erase", "purge", "remove", "unique", "unpark"}
"""Scripts that end jobs without a worker: they delete documents for good."""
SETTLES = {"done", "finish", "list_done", "list_finish"}
"""Scripts that end jobs for a worker: its `PayloadReaper` sees what they settle."""
MOVES = {
    "bridge", "bury", "depart", "limit", "list_bury", "list_confirm", "list_park", "list_return", "list_take", "park", "prelude", "promote", "replay",
}  # fmt: skip
"""Scripts that delete a document where they have stored it elsewhere: nothing has ended."""


def test_each_way_a_job_ends_is_known():
    """A new script that deletes documents belongs to one of these: else a stored payload is left behind, or lost."""
    deletes = re.compile(r"'(XDEL|LREM|LPOP|RPOP|ZPOPMAX|LMOVE|RPOPLPUSH)'|'HDEL', KEYS.+(member|ARGV\[2\])")
    found = {path.stem for path in FILES if deletes.search(code(path.read_text()))}
    assert found | {"dispose"} == ENDS | SETTLES | MOVES
    assert {path.stem for path in FILES if "unstore(" in code(path.read_text())} - {"prelude"} == ENDS
