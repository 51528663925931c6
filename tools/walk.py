"""Follows a page of the documentation from top to bottom in an empty folder: its files, its commands, what they print.

What stands behind a block's language tells what it is: a file's name, ``run`` (must succeed), ``fails`` (must not),
``setting`` (variables for all that follows). A ``console`` block is commands (after ``$``) with what they print.
``<!-- stage: command -->`` is a command that readers need not see. `tools.capture` writes what was printed into the
page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, NamedTuple

from streamworker import embedded
from tools.site.sources import ROOT

_PART: Final = re.compile(
    r"^<!-- stage: (?P<stage>.+?) -->$|^(?P<fence>```+)(?P<language>\w*)(?: (?P<word>\S+))?\n(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN: Final = re.compile(r"<!-- not run: .+? -->\n\Z")
_VOLATILE: Final = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\b[0-9a-f]{8}…"), "ID"),
    (re.compile(r"worker-[\w.-]+?-\d+-[0-9a-z]{9}\b"), "WORKER"),
    (re.compile(r"\b\d{13}-\d+\b"), "ENTRY"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?"), "TIME"),
    (re.compile(r"\b\d\d:\d\d:\d\d(\.\d+)?\b"), "TIME"),
    (re.compile(r"\bID/[0-9a-f]{8}\b"), "ID/MEMBER"),
    (re.compile(r"(?<![\w.])([\d.,]+ ?(ms|s|m|min|h|d|MB|jobs/s|/s)\b ?)+"), "HOWMUCH "),
    (re.compile(r"[─━=-]{3,}"), "---"),
    (re.compile(r"[ \t]+"), " "),
)


class Step(NamedTuple):
    """A command, what it printed, and where in the page what it prints stands.

    Attributes:
        command: as it was run.
        printed: standard output and standard error, in the order they came.
        written: what the page says; ``None`` where it says nothing.
        span: the place of ``written`` in the page.
        code: the exit code.
        word: run, fails, console or stage.
    """

    command: str
    printed: str
    written: str | None
    span: tuple[int, int]
    code: int
    word: str


def environment(home: Path) -> dict[str, str]:
    """What a newcomer's shell has: a home of its own, and the programs of this Python."""
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR", "TZ") if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_"))}
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "110",
        "NO_COLOR": "1",
    }


class Shell:
    """Commands in one folder; what one of them exports, the next ones have.

    Args:
        folder: where.
        env: variables at first.
        timeout: seconds one command may take.
    """

    def __init__(self, folder: Path, env: Mapping[str, str], timeout: float) -> None:
        self._folder = folder
        self._variables = dict(env)
        self._timeout = timeout

    def run(self, command: str, word: str) -> Step:
        """Run one command.

        Raises:
            AssertionError: it succeeded although ``word`` is ``fails``, or failed although it is not.
        """
        kept = self._folder.parent / f"{self._folder.name}.variables"
        script = f"set -e\ntrap 'env -0 >{kept}' EXIT\n{command}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=self._folder, env=self._variables, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=self._timeout, check=False,
        )  # fmt: skip
        if (done.returncode == 0) == (word == "fails"):
            raise AssertionError(f"exit {done.returncode}:\n{command}\n{done.stdout}")
        if kept.exists():
            now = dict(line.split("=", 1) for line in kept.read_text().split("\0") if "=" in line)
            self._variables |= {name: now[name] for name in now if name not in ("PWD", "OLDPWD", "SHLVL", "_")}
            kept.unlink()
        lines = done.stdout.replace(str(self._folder), "…").splitlines()
        return Step(command, "".join(f"{line.rstrip()}\n" for line in lines), None, (0, 0), done.returncode, word)


def walk(text: str, folder: Path, env: Mapping[str, str], *, timeout: float = 120.0) -> Iterator[Step]:
    """Do what a page says, step by step.

    Args:
        text: the page.
        folder: where; files appear in it.
        env: the shell's variables; ``setting`` blocks and ``export`` add to them.
        timeout: seconds one command may take.

    Raises:
        AssertionError: a command ended as the page does not say.
    """
    shell = Shell(folder, env, timeout)
    for part in _PART.finditer(text):
        language, word, body = part["language"], part["word"], part["body"]
        if _NOT_RUN.search(text[: part.start()]):
            continue
        if part["stage"]:
            yield shell.run(part["stage"], "stage")
        elif language == "console":
            at = part.start("body")
            for command, written, span in transcript(body):
                step = shell.run(command, "console")
                yield step._replace(written=written, span=(at + span[0], at + span[1]))
        elif word in ("run", "fails"):
            yield shell.run(body, word)
        elif word == "setting":
            shell.run(body, word)
        elif word:
            (folder / word).parent.mkdir(parents=True, exist_ok=True)
            (folder / word).write_text(body, encoding="utf-8")


def transcript(body: str) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(command, what follows it, where that stands) of a console block."""
    starts = [match.start() for match in re.finditer(r"^\$ ", body, re.MULTILINE)]
    for start, end in zip(starts, [*starts[1:], len(body)], strict=True):
        lines = body[start:end].splitlines(keepends=True)
        taken = 1
        while lines[taken - 1].rstrip("\n").endswith("\\"):
            taken += 1
        command = "".join(lines[:taken])
        yield command.removeprefix("$ "), "".join(lines[taken:]), (start + len(command), end)


def steady(text: str) -> str:
    """A text without what differs from run to run: ids, moments, durations, the width of columns."""
    for pattern, name in _VOLATILE:
        text = pattern.sub(name, text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def stage(folder: Path) -> AbstractContextManager[object]:
    """Keeps the embedded servers of a folder running between its commands, which saves two seconds each."""
    folder.mkdir()
    return embedded.acquire(folder / ".streamworker")


def walked_pages() -> list[Path]:
    """Pages that are one story: they show what commands print, or say which must succeed."""
    told = re.compile(r"^```(console|sh (run|fails))$", re.MULTILINE)
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if told.search(path.read_text(encoding="utf-8"))]
