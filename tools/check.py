"""The checks of ``bash .ci/run`` (``./dev check``), in rows that run beside each other.

Those of the second row are short, or wait for containers, while those of the first compute. The crash suite has the
machine to itself by then: a worker that gets no processor for a lease is dead to the others. What a check prints is
shown in one piece when it has ended. The first one that fails is named, and ends the others. At the end stands once
more what was not run, and why.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "check"

# By hand: what is marked slow beyond the topologies, soaks, mutants, benchmarks.
ROWS: tuple[tuple[str, ...], ...] = (
    ("test --all -o faulthandler_timeout=600", "pythons", "topologies", "crash"),
    (
        *("lint", "types", "layers", "ceilings", "hosts", "links", "spell", "docs", "wheel-test", "demo --jobs 2000"),
        "pythons --set-up",
        "containers --or-skip",
    ),
)

# Until twenty runs of twenty are green (./dev steady), what fails in these checks is named, and run once more.
AGAIN: dict[str, str] = {
    "test": "test --all -n 0 --last-failed --last-failed-no-failures none -o faulthandler_timeout=600",
    "pythons": "pythons",
    "topologies": "topologies",
    "crash": "crash",
}

LOOK = 0.5
"""Seconds between two looks whether a signal has come."""
LAST_WORDS = 60.0
"""Seconds for a check that is ended by Ctrl-C to clean up what it started."""


class Checks:
    """Rows of checks, which stop together.

    Args:
        program: runs a check, whose words it gets.
        output: folder for what they print.
        again: what is run in place of a check that failed, by the first word of the check; once.
    """

    def __init__(self, program: Sequence[str | Path], output: Path, again: Mapping[str, str] | None = None) -> None:
        self._program, self._output, self._again = program, output, again or {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._not_run: list[str] = []
        self.failed: list[str] = []
        """The check that failed, which ended the others; or what ended all of them."""

    def run(self, rows: Sequence[Sequence[str]]) -> int:
        """Run them beside each other; 0 if all passed, else 1."""
        threads = [threading.Thread(target=self._row, args=(row,)) for row in rows]
        try:
            for thread in threads:
                thread.start()
            _join(threads)
        except KeyboardInterrupt:
            self._stop("Ctrl-C")
            _join(threads)
        seconds = time.monotonic() - self._began
        for line in self._not_run:
            print(f"=== ci: {line}", flush=True)
        if self.failed:
            print(f"=== ci: stopped after {seconds:.0f} s", flush=True)
            return 1
        print(f"=== ci: {sum(map(len, rows))} checks passed in {seconds:.0f} s", flush=True)
        return 0

    def _row(self, row: Sequence[str]) -> None:
        for check in row:
            again = self._again.get(check.split(maxsplit=1)[0])
            if not self._one(check, last=again is None) and (self.failed or again is None or not self._one(again)):
                return

    def _one(self, check: str, *, last: bool = True) -> bool:
        began = time.monotonic()
        file = self._output / f"{check.split(maxsplit=1)[0]}.txt"
        with file.open("wb") as out:
            with self._lock:
                if self.failed:
                    return False
                # A group of its own: it is ended with all that it started.
                process = self._running[check] = subprocess.Popen(
                    [*self._program, *check.split()],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                )  # fmt: skip
            code = process.wait()
        with self._lock:
            del self._running[check]
            if self.failed:
                return False
            words = f"FAILED (exit {code}); repeat it with: ./dev {check}; it ran" if code else "passed in"
            if code and not last:
                words = f"failed once (exit {code}), and what failed is run again; it ran"
            said = file.read_text(errors="replace")
            self._not_run += [f"{check}: {line}" for line in said.splitlines() if "not run" in line]
            print(f"=== ci: {check}\n{said}=== ci: {check} {words} {time.monotonic() - began:.0f} s", flush=True)
        if code and last:
            self._stop(check)
        return not code

    def _stop(self, why: str) -> None:
        with self._lock:
            self.failed.append(why)
            running = list(self._running.values())
        for process in running:
            _signal(process, signal.SIGINT)
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
            _signal(process, signal.SIGKILL)


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait for them, with a look now and then: a signal that comes just before a wait without end is not heard."""
    for thread in threads:
        while thread.is_alive():
            thread.join(LOOK)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def main() -> int:
    """Run them all."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    return Checks([ROOT / "dev"], OUTPUT, AGAIN).run(ROWS)


if __name__ == "__main__":
    # As Ctrl-C: nothing that was started may stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
