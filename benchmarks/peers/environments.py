"""An environment for each peer: what its script asks for (inline script metadata, PEP 723), installed once and kept."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from hashlib import sha256
from pathlib import Path

import msgspec

HERE = Path(__file__).parent
OURS = ("bare", "streamworker")
PEERS = (
    "blitzq", "chasquimq", "ardiq", "dramatiq", "taskiq", "docket", "saq", "streaq", "celery", "arq", "bullmq", "rq",
)  # fmt: skip
SAFETY = {
    "ardiq": "acked after, not fenced",
    "arq": "removed after, not fenced, deleted",
    "bare": "acked after, not fenced, deleted",
    "blitzq": "acked after, not fenced, deleted",
    "bullmq": "removed after, fenced, deleted",
    "celery": "acked before, not fenced, deleted",
    "chasquimq": "acked after, not read whether fenced",
    "docket": "acked after, not fenced, deleted",
    "dramatiq": "acked after, not fenced, deleted",
    "rq": "removed before, not fenced, deleted",
    "saq": "removed after, not fenced, deleted",
    "streamworker": "acked after, fenced, deleted",
    "streaq": "acked after, not fenced, deleted",
    "taskiq": "acked after, not fenced, kept until trimmed",
}
"""What a contestant does in this race with a job whose handler has ended; docs/comparison.md has the sources."""
WANTED = "3.12"
"""The Python of all peers; two of them do not run on an older one."""
_HEADER = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///\n", re.MULTILINE)


class Environment(msgspec.Struct, frozen=True):
    """Where a contestant runs.

    Attributes:
        name: the contestant.
        python: the interpreter; ``None`` if there is no environment for it.
        version: what was installed, for the table.
        trouble: why there is none.
    """

    name: str
    python: str | None
    version: str = ""
    trouble: str = ""


def script(name: str) -> Path:
    """The contestant's script."""
    return HERE / f"run_{name}.py"


def dependencies(name: str) -> list[str]:
    """What a script says it needs."""
    header = _HEADER.search(script(name).read_text("utf-8"))
    if header is None:
        return []
    text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in header[1].splitlines())
    found: list[str] = tomllib.loads(text)["dependencies"]
    return found


def environment(name: str) -> Environment:
    """The environment of a contestant, made if need be; never raises: who cannot be installed is reported."""
    if name in OURS:
        return Environment(name, sys.executable)
    wanted = dependencies(name)
    version = wanted[0].partition("==")[2]
    interpreter = find_python()
    digest = sha256(repr((wanted, interpreter)).encode()).hexdigest()[:8]
    home = cache() / f"{name}-{digest}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        for command in (
            [interpreter, "-m", "venv", str(home)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                shutil.rmtree(home, ignore_errors=True)
                said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
                return Environment(name, None, version, f"cannot be installed: {said}")
        (home / "complete").touch()
    return Environment(name, str(python), version)


def cache() -> Path:
    """Where environments are kept: ``STREAMWORKER_PEERS``, or a folder below the user's cache."""
    if named := os.environ.get("STREAMWORKER_PEERS"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamworker" / "peers"


def find_python() -> str:
    """Python 3.12 if there is one (on the PATH, from pyenv), else the one we run on."""
    named = os.environ.get("STREAMWORKER_PEERS_PYTHON") or shutil.which(f"python{WANTED}")
    if named and _runs(named):
        return named
    for found in sorted(Path.home().glob(f".pyenv/versions/{WANTED}.*/bin/python"), reverse=True):
        if _runs(str(found)):
            return str(found)
    return sys.executable


def _runs(python: str) -> bool:
    """Whether it is a Python that works: pyenv's shims are there without one behind them."""
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
