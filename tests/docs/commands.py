"""Commands of ``sh`` blocks: what can be said about each without running it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

from cyclopts import CycloptsError

from streamworker import codec
from streamworker.cli import command_tree
from tests.docs.blocks import ROOT

BUILTINS = {"export", "cd", "wait", "mkdir", "echo", "cat", "sleep", "kill", "true", "grep", ".", "jq"}


def problems(script: str, where: Path) -> list[str]:
    """What is wrong with the commands of a block on a page in the folder ``where``."""
    found: list[str] = []
    for words in commands(script):
        wrong = judge(words, where)
        if wrong:
            found.append(f"{shlex.join(words)}: {wrong}")
    return found


def commands(script: str) -> list[list[str]]:
    """The simple commands of a script, without the variables set before them."""
    found: list[list[str]] = []
    joined = re.sub(r"\\\n\s*", " ", script)
    for line in _lines(joined):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        skip = False
        for word in [*lexer, ";"]:
            if skip:
                skip = False
            elif word and set(word) <= set(";|&"):
                if words:
                    found.append(words)
                words = []
            elif word and set(word) <= set("<>&"):
                skip = True
            elif words or not re.fullmatch(r"\w+=.*", word, re.DOTALL):
                words.append(word)
    return found


def _lines(script: str) -> list[str]:
    """Lines, those put together that a quote holds together."""
    lines: list[str] = []
    open_line = ""
    for line in script.splitlines():
        open_line = f"{open_line}\n{line}" if open_line else line
        try:
            shlex.split(open_line, comments=True)
        except ValueError:
            continue
        lines.append(open_line)
        open_line = ""
    assert not open_line, f"a quote does not end: {open_line}"
    return lines


def judge(words: list[str], where: Path) -> str:
    """What is wrong with a command; empty if nothing is."""
    match words:
        case ["streamworker", *rest]:
            return ours(rest)
        case ["uvx", "--from", package, "streamworker", *rest]:
            return extras(package) or ours(rest)
        case ["./dev", *rest]:
            return "" if not rest or rest[0] in recipes() else f"./dev has no {rest[0]}"
        case ["pip", "install", *packages] | ["uv", "pip", "install", *packages]:
            return next(filter(None, map(extras, packages)), "")
        case ["python" | "python3", "-m", "venv" | "pip" | "pytest" | "aiosmtpd", *_] | ["pytest", *_]:
            return ""
        case ["python" | "python3", "-m", module, *_]:
            return "" if importlib.util.find_spec(module) else f"there is no module {module}"
        case ["python" | "python3", script, *_]:
            return "" if (where / script).is_file() else f"there is no {where / script}"
        case ["redis-cli", *_, "LPUSH", _, document]:
            codec.read(document.encode())
            return ""
        case ["mailer", *rest]:
            return mailer(rest)
        case ["redis-cli", *_]:
            return ""
        case [name, *_] if name in BUILTINS:
            return ""
    return "nobody can check this: put <!-- not run: why --> above the block, or mend tests/docs/commands.py"


def ours(words: list[str]) -> str:
    """What the real command line says against it, short of doing it."""
    try:
        if words not in (["--help"], ["--version"]) and "--help" not in words:
            command_tree().parse_args(words, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        return " ".join(str(error).split())
    return ""


def mailer(words: list[str]) -> str:
    """What the example's own command line says."""
    from mailer.__main__ import parser

    try:
        with redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()):
            parser().parse_args(words)
    except SystemExit as end:
        return said.getvalue() if end.code else ""
    return ""


def extras(package: str) -> str:
    """Whether the extras of ours that are asked for exist."""
    asked = re.fullmatch(r"(?:\S+/)?streamworker(?:-[\w.]+whl)?\[([\w,-]+)\]\S*", package)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return "".join(f"no extra {name}" for name in (asked[1].split(",") if asked else ()) if name not in declared)


@cache
def recipes() -> set[str]:
    listed = subprocess.run(
        [str(Path(sys.executable).parent / "just"), "--justfile", str(ROOT / "justfile"), "--summary"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return set(listed.stdout.split())
