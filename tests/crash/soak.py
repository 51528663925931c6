"""``python -m tests.crash.soak --minutes 10 --seed 7``: faults without end on a running fleet, and a table of what they cost.

The seed decides what is done to whom and when; the same seed repeats the schedule (not the machine's own timing).
Exit code 1 if an invariant of docs/faults.md was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import as_json
from tests.crash.checker import Verdict
from tests.crash.ground import GROUNDS, MODE, PARTITIONS
from tests.crash.nemesis import WORKERS_ONLY, Nemesis
from tests.crash.report import figures, table
from tests.crash.rig import SLOWER, Rig
from tests.crash.watchdog import watchdog


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="soak", description="Faults on a running fleet, counted.")
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    options.add_argument("--workers", type=int, default=8)
    options.add_argument("--lease", type=float, default=3.0)
    options.add_argument("--every", type=float, default=0.4, help="mean seconds between faults")
    options.add_argument("--rate", type=float, default=100.0, help="jobs a second")
    options.add_argument("--faults", choices=("all", "kill", "workers"), default="all")
    options.add_argument("--mode", choices=sorted(GROUNDS), default=MODE)
    options.add_argument("--partitions", type=int, default=PARTITIONS, help="of the queue")
    options.add_argument(
        "--json", type=Path, help="a file for the figures; ./dev figures draws those in benchmarks/results"
    )
    options.add_argument("--keep", type=Path, help="a directory for history and logs; without it they are deleted")
    chosen = options.parse_args(arguments)
    if (chosen.mode, chosen.partitions) != (
        MODE,
        PARTITIONS,
    ):  # chosen when the harness is imported, in every process of it
        modes = {"CRASH_MODE": chosen.mode, "CRASH_PARTITIONS": str(chosen.partitions)}
        again = [sys.executable, "-m", "tests.crash.soak", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(again, check=False, env={**os.environ, **modes}).returncode
    directory = chosen.keep or Path(tempfile.mkdtemp(prefix="streamworker-soak-"))
    directory.mkdir(parents=True, exist_ok=True)
    print(
        f"soak: {MODE} mode, {PARTITIONS} partitions, seed {chosen.seed}, {chosen.minutes:g} min, {chosen.workers} workers, LEASE={chosen.lease:g}",
        flush=True,
    )
    rest = SLOWER * (140 + 20 * chosen.lease)  # what `_soak` waits for at the end
    with watchdog(chosen.minutes * 60 + 300 + rest, f"soak, seed {chosen.seed}"):
        rig, verdict = asyncio.run(_soak(chosen, directory))
    print(table(rig.injected, verdict))
    if chosen.json is not None:
        as_json(figures(MODE, rig.injected, verdict), chosen.json, command="./dev soak")
    for violation in verdict.violations[:50]:
        print(f"violation: {violation}")
    if chosen.keep is None and not verdict.violations:
        shutil.rmtree(directory, ignore_errors=True)
    else:
        print(f"history and logs: {directory}")
    return 1 if verdict.violations else 0


async def _soak(chosen: argparse.Namespace, directory: Path) -> tuple[Rig, Verdict]:
    kinds = {"all": None, "kill": {"kill": 1}, "workers": WORKERS_ONLY}[chosen.faults]
    rig = Rig(
        directory,
        seed=chosen.seed,
        lease=chosen.lease,
        proxied=chosen.faults == "all",
        CONCURRENCY=20,
        MAX_DELIVERIES=10,
    )
    async with rig:
        for _ in range(chosen.workers):
            await rig.fleet.start()
        await rig.all_ready()
        stop = asyncio.Event()
        producing = asyncio.create_task(rig.produce(stop, chosen.rate))
        nemesis = Nemesis(rig, workers=chosen.workers, every=chosen.every, kinds=kinds)
        began, told = time.monotonic(), 0.0
        async with asyncio.TaskGroup() as group:
            raging = group.create_task(nemesis.rage())
            while time.monotonic() - began < chosen.minutes * 60 and not raging.done():
                await asyncio.sleep(0.25)
                if time.monotonic() - told > 15:
                    told = time.monotonic()
                    print(f"{told - began:6.0f} s  {sum(rig.injected.values())} faults", flush=True)
            await nemesis.cease()
        stop.set()
        await producing
        return rig, await rig.finish(timeout=120 + 10 * chosen.lease, workers=chosen.workers, look=True)


if __name__ == "__main__":
    sys.exit(main())
