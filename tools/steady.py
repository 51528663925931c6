"""``./dev steady --runs 20 [--load]``: is the suite steady? All of it, so many times, each in another order of chance.

``--load`` keeps two processes spinning beside it. Ends with 1 if anything failed, and a table of what did, by test. The
output of a run with failures is in build/steady. Other arguments go to pytest: ``./dev steady --runs 50 -k lease``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "steady"
LIMIT = 3600
"""Seconds after which a run has hung."""


def main(arguments: Sequence[str]) -> int:
    """Run the suite, and say what failed."""
    parser = argparse.ArgumentParser(prog="./dev steady", description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; each after it has the next number")
    parser.add_argument("--load", action="store_true", help="two busy loops beside it")
    options, words = parser.parse_known_args(arguments)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    table: dict[str, list[tuple[int, str]]] = {}
    with loops(2 if options.load else 0):
        for run in range(1, options.runs + 1):
            seed = options.seed + run - 1
            began = time.monotonic()
            failed = one(seed, words)
            took = f"{time.monotonic() - began:.0f} s"
            print(f"run {run} of {options.runs}, seed {seed}: {len(failed) or 'none'} failed, {took}", flush=True)
            for test, why in failed.items():
                table.setdefault(test, []).append((seed, why))
    for test, times in sorted(table.items(), key=lambda entry: (-len(entry[1]), entry[0])):
        seeds = " ".join(str(seed) for seed, _ in times)
        print(f"{len(times):>3} of {options.runs}  {test}  (seeds {seeds})\n           {times[0][1]}")
    print(f"steady: {len(table) or 'no'} tests failed in {options.runs} runs" + (f"; see {OUTPUT}" if table else ""))
    return 1 if table else 0


def one(seed: int, words: Sequence[str]) -> dict[str, str]:
    """A run of the suite: the node ids of the tests that failed, and the first line of why."""
    report, log = OUTPUT / f"{seed}.xml", OUTPUT / f"{seed}.txt"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "--all"]
    command += ["--order-seed", str(seed), f"--junit-xml={report}", "-o", "junit_family=xunit1", *words]
    with log.open("w") as out:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, timeout=LIMIT, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"the run itself": f"did not end in {LIMIT} s"}
    failed = dict(failures(report)) if report.exists() else {}
    if code and not failed:
        failed["the run itself"] = f"ended with {code}; see {log}"
    if not failed:
        log.unlink()
    report.unlink(missing_ok=True)
    return failed


def failures(report: Path) -> Iterator[tuple[str, str]]:
    """Test and why, out of pytest's report."""
    for case in ET.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            for each in case.findall(kind):
                why = next(iter(each.get("message", "").splitlines()), "")
                yield f"{case.get('file')}::{case.get('name')}", why[:160]


@contextmanager
def loops(count: int) -> Iterator[None]:
    """So many processes that only spin."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
