"""Does a worker that leaks a megabyte a job keep its throughput and its latency under --max-rss, and is nothing lost?

``./dev bench-leak [throughput] [latency] [--max-rss 200] [--seconds 0.05] [--concurrency 4] [--json FILE]``.

Throughput: first the same jobs without the leak and without a limit, for a fifth of their number; then all of them with
both (``--jobs 10000``). It prints what was lost, what ran twice, how many processes took turns, and the gap in
throughput: on the whole, in the worst ten seconds, and while workers were replaced, beside the rest of the same run
(which a busy machine disturbs alike).

Latency: a steady stream of jobs, a quarter of what the worker can do (``--minutes 2``). It prints the time from enqueue
to the first line of the handler of jobs that waited while a worker was replaced, beside that of the others. A
replacement lasts from the moment at which the worker has reached its limit until its process has stopped.
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
from threading import Event, Thread
from typing import NamedTuple

import redis

from benchmarks import report
from benchmarks.measure import Row
from benchmarks.server import on_any_core, server

APP = """
import os, time
from streamworker import App, Payload

class Leak(Payload, kind="leak", queue="leaks"):
    n: int
    enqueued: float

app = App()
held = []
seconds, leaks = float(os.environ["LEAK_SECONDS"]), os.environ["LEAK_BYTES"] != "0"

@app.handler(timeout=60)
def leak(payload: Leak) -> None:
    started = time.time()
    megabyte = os.urandom(1 << 20)
    if leaks:
        held.append(megabyte)
    time.sleep(seconds)
    with open("ran", "a") as file:
        file.write(f"{payload.n} {time.time()} {os.getpid()} {payload.enqueued} {started}\\n")
"""
WINDOW = 10.0
"""Seconds of a window."""
USED = 0.25
"""Share of the worker's slots that the steady stream takes."""
FEW = 100
"""Jobs that have a 99th percentile."""


class Run(NamedTuple):
    """One run of a job; all moments are seconds since 1970.

    Attributes:
        n: number of the job.
        at: moment of its end.
        pid: process that ran it.
        enqueued: moment before it was enqueued.
        started: moment of the handler's first line.
    """

    n: int
    at: float
    pid: int
    enqueued: float
    started: float


class Ran(NamedTuple):
    """What a run of jobs left.

    Attributes:
        runs: all of them.
        replaced: (begin, end) of each replacement of a worker, until its successor claims.
        overlapped: (begin, end) of each replacement of a worker, until it has stopped.
    """

    runs: list[Run]
    replaced: list[tuple[float, float]]
    overlapped: list[tuple[float, float]]

    def lost(self, jobs: int) -> int:
        """How many of so many jobs did not run."""
        return jobs - len({run.n for run in self.runs})

    def twice(self) -> int:
        """How many runs repeated a job."""
        return len(self.runs) - len({run.n for run in self.runs})


def replacements(log: str, end: str) -> list[tuple[float, float]]:
    """From the moment a worker has reached its limit until an event of the same worker, or of its supervisor."""
    began: dict[str, float] = {}
    found = []
    for line in log.splitlines():
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") not in ("worker_recycling", end):
            continue
        at, worker = datetime.fromisoformat(event["timestamp"]).timestamp(), event.get("worker_id", "")
        if event["event"] == "worker_recycling":
            began[worker] = at
        elif not worker and began:  # the supervisor replaces one worker at a time
            found.append((began.popitem()[1], at))
        elif worker in began:
            found.append((began.pop(worker), at))
    return found


def send(client: redis.Redis, first: int, last: int) -> None:
    """Enqueue the jobs of these numbers in one round trip."""
    pipe = client.pipeline(transaction=False)
    for n in range(first, last):
        body = json.dumps({"id": f"l{n}", "kind": "leak", "payload": {"n": n, "enqueued": time.time()}})
        pipe.xadd("stream:{leaks}", {"job": body})
    pipe.execute()


def stream(client: redis.Redis, first: int, last: int, rate: float, over: Event) -> None:
    """Enqueue the jobs of these numbers one by one, at a steady rate."""
    begin = time.monotonic()
    for n in range(first, last):
        if over.wait(max(0.0, begin + (n - first) / rate - time.monotonic())):
            return
        send(client, n, n + 1)


def run(url: str, jobs: int, arguments: argparse.Namespace, *, leaks: bool, rate: float | None = None) -> Ran:
    """Run jobs on a worker.

    Args:
        url: of the server.
        jobs: how many.
        arguments: of the command line.
        leaks: whether the jobs leak and the worker has a limit.
        rate: jobs enqueued a second, after the first one has run; all wait from the start unless given.
    """
    client = redis.Redis.from_url(url)
    client.flushall()
    with tempfile.TemporaryDirectory() as place:
        Path(place, "leaking.py").write_text(APP)
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")},
            "REDIS_URL": url, "STREAMWORKER_APP": "leaking:app", "STREAMWORKER_LEDGER": "off",
            "LEAK_SECONDS": str(arguments.seconds), "LEAK_BYTES": str(int(leaks)),
        }  # fmt: skip
        waiting = jobs if rate is None else 1
        for start in range(0, waiting, 1000):
            send(client, start, min(waiting, start + 1000))
        command = [sys.executable, "-m", "streamworker", "worker", "--concurrency", str(arguments.concurrency)]
        command += ["--max-rss", str(arguments.max_rss)] if leaks else []
        with Path(place, "log").open("w") as log:
            worker = subprocess.Popen(command, env=env, cwd=place, stdin=subprocess.DEVNULL, stderr=log)
            over = Event()
            producer = Thread(target=stream, args=(client, waiting, jobs, rate or 1.0, over))
            try:
                _until_empty(client, worker, Path(place, "log"))
                producer.start()
                while producer.is_alive():
                    producer.join(0.2)
                    _alive(worker, Path(place, "log"))
                _until_empty(client, worker, Path(place, "log"))
            finally:
                over.set()
                worker.terminate()
                worker.wait(60)
        lines, told = Path(place, "ran").read_text().splitlines(), Path(place, "log").read_text()
    runs = [
        Run(int(n), float(at), int(pid), float(enqueued), float(started))
        for n, at, pid, enqueued, started in map(str.split, lines)
    ]
    return Ran(runs, replacements(told, "worker_replaced"), replacements(told, "worker_stopped"))


def _until_empty(client: redis.Redis, worker: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until no job is left."""
    while client.xlen("stream:{leaks}"):
        _alive(worker, log)
        time.sleep(0.2)


def _alive(worker: subprocess.Popen[bytes], log: Path) -> None:
    """End with the last of the log if the worker has ended."""
    if worker.poll() is not None:
        sys.exit(log.read_text()[-2000:])


def waits(ran: Ran) -> tuple[list[float], list[float]]:
    """Milliseconds from enqueue to start, of jobs that waited during a replacement and of the others."""
    inside: list[float] = []
    outside: list[float] = []
    for each in ran.runs:
        if each.n == 0:
            continue  # it waited for the first worker
        during = any(each.enqueued <= end and begin <= each.started for begin, end in ran.overlapped)
        (inside if during else outside).append((each.started - each.enqueued) * 1000)
    return inside, outside


def beside(ran: Ran) -> tuple[float, float]:
    """Jobs per second while workers were replaced, and in the rest of the time between the first and the last."""
    moments = sorted(each.at for each in ran.runs)
    inside = sum(bisect.bisect(moments, end) - bisect.bisect(moments, begin) for begin, end in ran.replaced)
    seconds = sum(end - begin for begin, end in ran.replaced)
    rest = moments[-1] - moments[0] - seconds
    return inside / seconds, (len(moments) - inside) / rest


def rates(runs: list[Run]) -> tuple[float, float]:
    """Jobs per second on the whole, and in the worst window."""
    moments = sorted(each.at for each in runs)
    first, last = moments[0], moments[-1]
    whole = (len(moments) - 1) / (last - first)
    starts = [first + step for step in range(int(last - first - WINDOW) + 1)]
    counts = [bisect.bisect(moments, start + WINDOW) - bisect.bisect(moments, start) for start in starts]
    return whole, min(counts, default=0) / WINDOW if counts else whole


def throughput(url: str, arguments: argparse.Namespace) -> list[Row]:
    """A backlog of jobs: what was lost, what ran twice, and the gap in throughput."""
    plain, _ = rates(run(url, max(1, arguments.jobs // 5), arguments, leaks=False).runs)
    ran = run(url, arguments.jobs, arguments, leaks=True)
    turns = Counter(each.pid for each in ran.runs)
    whole, worst = rates(ran.runs)
    what = f"{arguments.jobs:,} jobs of {arguments.seconds} s, {arguments.concurrency} at once"
    print(f"{what}: {ran.lost(arguments.jobs)} lost, {ran.twice()} run twice")
    print(f"{len(turns)} processes took turns, {statistics.median(turns.values()):.0f} jobs each")
    print(f"without the leak {plain:.1f} jobs/s; with it {whole:.1f}, a gap of {1 - whole / plain:.1%}")
    print(f"worst {WINDOW:.0f} s: {worst:.1f} jobs/s, a gap of {1 - worst / plain:.1%}")
    during, rest = beside(ran) if ran.replaced else (whole, whole)
    told = f"while replaced, {len(ran.replaced)} times: {during:.1f} jobs/s"
    print(f"{told}; else {rest:.1f}, a gap of {1 - during / rest:.1%}")
    question = f"{arguments.jobs:,} jobs that leak 1 MB, a limit of {arguments.max_rss} MB"
    return [
        *_kept(question, ran, arguments.jobs),
        Row(
            question=f"{question}, while a worker is replaced", what="worker", unit="/s", values=[during],
            against=[rest], versus="else", goal=0.9,
        ),
    ]  # fmt: skip


def latency(url: str, arguments: argparse.Namespace) -> list[Row]:
    """A steady stream of jobs: what was lost, what ran twice, and the time from enqueue to start."""
    rate = USED * arguments.concurrency / arguments.seconds
    jobs = int(arguments.minutes * 60 * rate)
    ran = run(url, jobs, arguments, leaks=True, rate=rate)
    inside, outside = waits(ran)
    print(f"{jobs:,} jobs at {rate:.0f}/s: {ran.lost(jobs)} lost, {ran.twice()} run twice")
    if min(len(inside), len(outside)) < FEW:
        sys.exit(f"{len(inside)} jobs waited while a worker was replaced, {len(outside)} else: raise --minutes")
    seconds = statistics.median(end - begin for begin, end in ran.overlapped)
    print(f"{len(ran.overlapped)} replacements of {seconds:.2f} s, {len(inside):,} jobs waited during one")
    rows = _kept(f"{rate:.0f} jobs/s that leak 1 MB, a limit of {arguments.max_rss} MB", ran, jobs)
    for part, of in (("p50", statistics.median), ("p99", _p99), ("max", max)):
        during, rest = of(inside), of(outside)
        print(f"enqueue to start, {part}: {during:.1f} ms while replaced, else {rest:.1f} ms")
        question = f"enqueue to start while a worker is replaced, {part}"
        rows.append(
            Row(question=question, what="worker", unit="ms", values=[during], against=[rest], versus="else", less=True)
        )
    return rows


def _p99(figures: list[float]) -> float:
    return statistics.quantiles(figures, n=100)[98]


def _kept(question: str, ran: Ran, jobs: int) -> list[Row]:
    """Nothing is to be lost, and nothing to run twice."""
    counts = {"lost": ran.lost(jobs), "run twice": ran.twice()}
    return [
        Row(question=f"{question}, {what}", what="worker", unit="", values=[float(count)], goal=0.0, less=True)
        for what, count in counts.items()
    ]


QUESTIONS = {"throughput": throughput, "latency": latency}


def main() -> int:
    """Run, and tell; 1 if a job is lost or ran twice, or the gap is above a tenth."""
    parser = argparse.ArgumentParser(prog="./dev bench-leak", description=__doc__)
    parser.add_argument("questions", nargs="*", help="throughput or latency; both unless given")
    parser.add_argument("--jobs", type=int, default=10_000, help="of the throughput")
    parser.add_argument("--minutes", type=float, default=2.0, help="of the stream")
    parser.add_argument("--max-rss", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    asked = arguments.questions or list(QUESTIONS)
    if unknown := set(asked) - set(QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    rows: list[Row] = []
    with server() as url:
        on_any_core()
        for name in asked:
            rows += QUESTIONS[name](url, arguments)
    if arguments.json:
        report.as_json(rows, arguments.json, command="./dev bench-leak")
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
