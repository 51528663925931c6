"""``python -m tests.crash.short [--mode list]``: the fixed short set with pytest, then a quarter of a minute of soak for the table.

Without ``--mode`` both modes, beside each other; in list mode then without the tests marked ``mode_free``, whose faults
do not care what jobs lie in. What is not marked ``crash`` in this folder (the broker's model, the reactions) belongs to
``./dev test``. Whatever hangs ends, and says where; what fails leaves its history, logs and servers' files behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.crash.ground import GROUNDS
from tests.crash.rig import SHIFT

SEED = 4711
LIMIT = 3000
"""Seconds after which not even the watchdogs of the tests and the soak can be relied on."""


def main(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if words[:1] == ["--mode"]:
        return _run(words[1], "crash", words[2:])
    # Both wait for leases most of the time. What one prints is shown in one piece, when it has ended.
    with ExitStack() as stack:
        runs = []
        for mode in GROUNDS:
            command = [sys.executable, "-m", "tests.crash.short", "--mode", mode]
            command += [] if mode == "stream" else ["-m", "crash and not mode_free"]
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen([*command, *words], stdout=log, stderr=log)
            stack.callback(process.wait)  # Ctrl-C reaches them too, and they clean up
            runs.append((process, log))
        for process, log in runs:
            process.wait()
            log.seek(0)
            print(log.read(), end="", flush=True)
        return next((process.returncode for process, _ in runs if process.returncode), 0)


def _run(mode: str, marks: str, arguments: Sequence[str]) -> int:
    began = time.monotonic()
    print(f"crash: {mode} mode", flush=True)
    environment = {**os.environ, "CRASH_MODE": mode}
    place = Path(tempfile.mkdtemp(prefix=f"streamworker-crash-{mode}-"))
    folder = str(Path(__file__).parent)
    tests = ["-m", marks, "-n", "3", "--dist", "worksteal", "-q", "--basetemp", str(place / "tests")]
    tests += ["-o", "tmp_path_retention_policy=failed", "-o", f"cache_dir={place / 'cache'}", folder, *arguments]
    seed = str(SEED + SHIFT)
    soak = ["--minutes", "0.25", "--seed", seed, "--workers", "4", "--lease", "1", "--every", "0.6"]
    for command in (["pytest", *tests], ["tests.crash.soak", *soak, "--keep", str(place / "soak")]):
        code = _ended([sys.executable, "-m", *command], environment)
        if code:
            print(
                f"crash: {mode} mode FAILED after {time.monotonic() - began:.0f} s; what it left is in {place}",
                flush=True,
            )
            return code
    shutil.rmtree(place, ignore_errors=True)
    print(f"crash: {mode} mode held, {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _ended(command: Sequence[str], environment: dict[str, str]) -> int:
    """The exit code; nothing of it outlives the call, servers and workers included."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        print(f"crash: {' '.join(command[1:4])} did not end in {LIMIT} s", file=sys.stderr)
        return 1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
