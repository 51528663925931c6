"""Does a worker that leaks a megabyte a job keep its throughput under --max-rss, and is nothing lost or run twice?

``./dev bench-leak [--jobs 10000] [--max-rss 200] [--seconds 0.05] [--concurrency 4]``. First the same jobs without the
leak and without a limit, for a fifth of their number; then all of them with both. It prints what was lost, what ran
twice, how many processes took turns, and the gap in throughput: on the whole, in the worst ten seconds, and while
workers were replaced, beside the rest of the same run (which a busy machine disturbs alike).
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import redis

from benchmarks.server import on_any_core, server

APP = """
import os, time
from streamworker import App, Payload

class Leak(Payload, kind="leak", queue="leaks"):
    n: int

app = App()
held = []
seconds, leaks = float(os.environ["LEAK_SECONDS"]), os.environ["LEAK_BYTES"] != "0"

@app.handler(timeout=60)
def leak(payload: Leak) -> None:
    megabyte = os.urandom(1 << 20)
    if leaks:
        held.append(megabyte)
    time.sleep(seconds)
    with open("ran", "a") as file:
        file.write(f"{payload.n} {time.time()} {os.getpid()}\\n")
"""
WINDOW = 10.0
"""Seconds of a window."""


class Ran(NamedTuple):
    """What a run of jobs left.

    Attributes:
        runs: (number, moment, pid) of each.
        replaced: (begin, end) of each replacement of a worker.
    """

    runs: list[tuple[int, float, int]]
    replaced: list[tuple[float, float]]


def replacements(log: str) -> list[tuple[float, float]]:
    """From the moment a worker has reached its limit until its successor claims."""
    began, found = None, []
    for line in log.splitlines():
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") in ("worker_recycling", "worker_replaced"):
            at = datetime.fromisoformat(event["timestamp"]).timestamp()
            if event["event"] == "worker_recycling":
                began = at
            elif began is not None:
                found.append((began, at))
                began = None
    return found


def run(url: str, jobs: int, arguments: argparse.Namespace, *, leaks: bool) -> Ran:
    """Run jobs on a worker."""
    client = redis.Redis.from_url(url)
    client.flushall()
    with tempfile.TemporaryDirectory() as place:
        Path(place, "leaking.py").write_text(APP)
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")},
            "REDIS_URL": url, "STREAMWORKER_APP": "leaking:app", "STREAMWORKER_LEDGER": "off",
            "LEAK_SECONDS": str(arguments.seconds), "LEAK_BYTES": str(int(leaks)),
        }  # fmt: skip
        for start in range(0, jobs, 1000):
            pipe = client.pipeline(transaction=False)
            for n in range(start, min(jobs, start + 1000)):
                body = json.dumps({"id": f"l{n}", "kind": "leak", "payload": {"n": n}})
                pipe.xadd("stream:{leaks}", {"job": body})
            pipe.execute()
        command = [sys.executable, "-m", "streamworker", "worker", "--concurrency", str(arguments.concurrency)]
        command += ["--max-rss", str(arguments.max_rss)] if leaks else []
        with Path(place, "log").open("w") as log:
            worker = subprocess.Popen(command, env=env, cwd=place, stdin=subprocess.DEVNULL, stderr=log)
            try:
                while client.xlen("stream:{leaks}"):
                    if worker.poll() is not None:
                        sys.exit(Path(place, "log").read_text()[-2000:])
                    time.sleep(0.2)
            finally:
                worker.terminate()
                worker.wait(60)
        lines, told = Path(place, "ran").read_text().splitlines(), Path(place, "log").read_text()
    return Ran([(int(n), float(at), int(pid)) for n, at, pid in map(str.split, lines)], replacements(told))


def beside(ran: Ran) -> tuple[float, float]:
    """Jobs per second while workers were replaced, and in the rest of the time between the first and the last."""
    moments = sorted(at for _, at, _ in ran.runs)
    inside = sum(bisect.bisect(moments, end) - bisect.bisect(moments, begin) for begin, end in ran.replaced)
    seconds = sum(end - begin for begin, end in ran.replaced)
    rest = moments[-1] - moments[0] - seconds
    return inside / seconds, (len(moments) - inside) / rest


def rates(runs: list[tuple[int, float, int]]) -> tuple[float, float]:
    """Jobs per second on the whole, and in the worst window."""
    moments = sorted(at for _, at, _ in runs)
    first, last = moments[0], moments[-1]
    whole = (len(moments) - 1) / (last - first)
    starts = [first + step for step in range(int(last - first - WINDOW) + 1)]
    counts = [bisect.bisect(moments, start + WINDOW) - bisect.bisect(moments, start) for start in starts]
    return whole, min(counts, default=0) / WINDOW if counts else whole


def main() -> int:
    """Run, and tell; 1 if a job is lost or ran twice, or the gap is above a tenth."""
    parser = argparse.ArgumentParser(prog="./dev bench-leak", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--max-rss", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--concurrency", type=int, default=4)
    arguments = parser.parse_args()
    with server() as url:
        on_any_core()
        plain, _ = rates(run(url, max(1, arguments.jobs // 5), arguments, leaks=False).runs)
        ran = run(url, arguments.jobs, arguments, leaks=True)
    runs = ran.runs
    counted = Counter(n for n, _, _ in runs)
    lost, twice = arguments.jobs - len(counted), sum(count - 1 for count in counted.values())
    turns = Counter(pid for _, _, pid in runs)
    whole, worst = rates(runs)
    what = f"{arguments.jobs:,} jobs of {arguments.seconds} s, {arguments.concurrency} at once"
    print(f"{what}: {lost} lost, {twice} run twice")
    print(f"{len(turns)} processes took turns, {statistics.median(turns.values()):.0f} jobs each")
    print(f"without the leak {plain:.1f} jobs/s; with it {whole:.1f}, a gap of {1 - whole / plain:.1%}")
    print(f"worst {WINDOW:.0f} s: {worst:.1f} jobs/s, a gap of {1 - worst / plain:.1%}")
    during, rest = beside(ran) if ran.replaced else (whole, whole)
    told = f"while replaced, {len(ran.replaced)} times: {during:.1f} jobs/s"
    print(f"{told}; else {rest:.1f}, a gap of {1 - during / rest:.1%}")
    return int(bool(lost or twice or during < 0.9 * rest))


if __name__ == "__main__":
    sys.exit(main())
