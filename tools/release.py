"""Builds what is published, twice, and checks it as strangers get it: ``./dev release``.

Out of the commit that is checked out, not out of the folder: what is not committed is not released. Everything lands
in ``dist/``: sdist, wheel, a list of what the wheel brings along (CycloneDX), and SHA256SUMS.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Final

from tools import changelog

ROOT: Final = Path(__file__).resolve().parents[1]
DIST: Final = ROOT / "dist"
BIN: Final = Path(sys.executable).parent
_LOCKED: Final = re.compile(r"^([a-z0-9][^ ;]*==[^ ;]*)( ;.*[^ \\])? *\\$", re.MULTILINE)
_ENTRIES: Final = """
from importlib.metadata import entry_points
import streamworker, sys
assert "site-packages" in streamworker.__file__, streamworker.__file__
assert entry_points(group="console_scripts")["streamworker"].load()
assert entry_points(group="pytest11")["streamworker"].load()
for name in streamworker.__all__:
    assert getattr(streamworker, name)
import streamworker.testing, streamworker.web
"""


def say(text: str) -> None:
    """One line of progress."""
    print(f"release: {text}", flush=True)


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    """Run a command; what it printed.

    Raises:
        SystemExit: it failed.
    """
    # Nothing of the checkout may be found by accident.
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "MYPYPATH")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**env, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"release: {' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def exported(folder: Path) -> tuple[Path, str]:
    """The files of the commit, in a folder of their own; and the second it was made."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    packed = subprocess.run([*git, "archive", "--format=tar", "HEAD"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        # Debian 12's Python 3.11.2 has no filters yet; the archive is of our own commit.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]
    made = subprocess.run(
        [*git, "log", "-1", "--format=%ct"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return folder, made


def built(source: Path, into: Path, epoch: str) -> dict[str, str]:
    """Build sdist and wheel; their names with their hashes."""
    run(BIN / "hatchling", "build", "-d", into, cwd=source, SOURCE_DATE_EPOCH=epoch)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(into.iterdir())}


def build(work: Path) -> tuple[Path, Path]:
    """Build twice, in other places and under another umask; the sdist builds the same wheel, too."""
    first, epoch = exported(work / "one")
    made = built(first, work / "dist", epoch)
    old = os.umask(0o077)
    try:
        second, moment = exported(work / "elsewhere/two")
        again = built(second, work / "dist-again", moment)
        if made != again:
            sys.exit(f"release: two builds differ:\n{made}\n{again}")
        (sdist,) = (work / "dist").glob("*.tar.gz")
        (wheel,) = (work / "dist").glob("*.whl")
        with tarfile.open(sdist) as archive:
            archive.extractall(work / "from-sdist", filter="data")
        (inside,) = (work / "from-sdist").iterdir()
        run(
            BIN / "hatchling",
            "build",
            "-t",
            "wheel",
            "-d",
            work / "dist-from-sdist",
            cwd=inside,
            SOURCE_DATE_EPOCH=epoch,
        )
    finally:
        os.umask(old)
    third = hashlib.sha256((work / "dist-from-sdist" / wheel.name).read_bytes()).hexdigest()
    if third != made[wheel.name]:
        sys.exit(f"release: the wheel that {sdist.name} builds is another one")
    say(f"{wheel.name} and {sdist.name}: built twice, the same bytes, and the wheel from the sdist as well")
    return sdist, wheel


def installed(package: Path, work: Path, *more: str, extras: str = "") -> Path:
    """A clean environment with the package, what it requires, and no more but ``more``; its Python."""
    constraints = work / "constraints.txt"
    found = _LOCKED.findall((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    constraints.write_text("".join(f"{name}{marker}\n" for name, marker in found), encoding="utf-8")
    home = work / f"venv-{package.suffix.strip('.')}"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=work)
    python = home / "bin/python"
    # pip of this Python, so that the environment holds nothing that users do not get.
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    asked = f"{package}[{extras}]" if extras else package
    run(*pip, "install", "-q", "--no-input", "--no-compile", "-c", constraints, asked, *more, cwd=work)
    run(*pip, "check", cwd=work)
    return python


def check(python: Path, work: Path, *, jobs: int) -> None:
    """What a stranger would try first."""
    run(python, "-c", _ENTRIES, cwd=work)
    run(python.parent / "streamworker", "--version", cwd=work)
    run(python.parent / "streamworker", "config", cwd=work, REDIS_URL="redis://localhost:6379/0")
    told = run(python.parent / "streamworker", "demo", "--jobs", str(jobs), cwd=work)
    if f"Nothing is lost: {jobs:,} of {jobs:,}" not in told:
        sys.exit(f"release: the demo did not end well:\n{told}")


def check_types(python: Path, work: Path) -> None:
    """Type checkers find the types where the package is installed: `tests/typing/good.py`, far from the checkout."""
    folder = work / "typed"
    folder.mkdir()
    shutil.copy(ROOT / "tests/typing/good.py", folder)
    run(BIN / "mypy", "--strict", "--config-file=", "--python-executable", python, "good.py", cwd=folder)
    project = folder / "pyrightconfig.json"
    pyright: list[str | Path] = [BIN / "basedpyright", "--pythonpath", python, "--level", "error", "--project", project]
    # With the stubs that docs/postgres.md names: asyncpg's own types are unknown to pyright's strict mode.
    project.write_text('{"typeCheckingMode": "strict", "include": ["good.py"]}')
    run(*pyright, cwd=folder)


def main() -> int:
    """Build, check, and lay it into ``dist/``."""
    status = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain"], check=True, capture_output=True)
    if status.stdout.strip():
        say("what is not committed is not in it")
    said = changelog.unreleased(
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), changelog.fragments(ROOT / "changes")
    )
    with tempfile.TemporaryDirectory(prefix="streamworker-release-") as home:
        work = Path(home)
        sdist, wheel = build(work)
        python = installed(wheel, work, "pytest", "asyncpg-stubs", extras="demo,web")
        check(python, work, jobs=1000)
        say("the wheel in a clean environment: entry points, plugin, demo")
        check_types(python, work)
        say("its types, under mypy --strict and basedpyright")
        # Its wheel is the same bytes: what is left to see is that it installs, with nothing but what it requires.
        python = installed(sdist, work)
        run(python, "-c", "import streamworker as s; [getattr(s, name) for name in s.__all__]", cwd=work)
        run(python.parent / "streamworker", "--version", cwd=work)
        say("the sdist in a clean environment, without any extra")
        run(python, ROOT / "tools/sbom.py", "--wheel", work / f"{wheel.stem.partition('-py')[0]}.cdx.json", cwd=work)
        DIST.mkdir(exist_ok=True)
        for old in DIST.iterdir():
            if old.is_file():
                old.unlink()
        for path in (sdist, wheel, *work.glob("*.cdx.json")):
            shutil.copy(path, DIST)
        names = sorted(path for path in DIST.iterdir() if path.is_file())
        sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in names]
        (DIST / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    say("dist/: " + ", ".join(path.name for path in sorted(DIST.iterdir())))
    if said:
        say("CHANGELOG.md still calls it unreleased: ./dev changelog --release VERSION, commit, and run this again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
