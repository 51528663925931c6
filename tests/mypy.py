"""mypy for tests: with the options of pyproject.toml, and one cache for all that is checked, kept from run to run."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
CACHE: Final = ROOT / ".mypy_cache" / "tests"
"""Not that of ``./dev types``, which reports the errors of imported modules too: each would throw away the other's."""


def run(targets: Sequence[str], *, cwd: Path = ROOT, config: Path = ROOT / "pyproject.toml") -> None:
    """Check files, silent about what they import.

    Most of the time goes to those imports, which are the same for all targets: whoever is second waits for the first,
    and finds them in the cache.

    Args:
        targets: files or folders.
        cwd: where those are; importable.
        config: the options; those for modules that two configurations share have to be the same in both.

    Raises:
        AssertionError: mypy has found something.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--follow-imports=silent",
        f"--cache-dir={CACHE}",
        f"--config-file={config}",
    ]
    env = {**os.environ, "MYPYPATH": f"{cwd}{os.pathsep}{ROOT}"}
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([*command, *targets], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
