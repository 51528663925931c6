"""How long from enqueue to the handler's start, at 100 jobs a second, beside a bare XADD and XREADGROUP?"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.peers.workload import WARM
from benchmarks.server import on_any_core
from benchmarks.worker import Noop, settings
from streamworker import App, QueueWorker


async def produce(url: str, contestant: str, jobs: int) -> None:
    """Send the jobs from a process of its own, on whichever core is free."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.producer", url, contestant, str(WARM + jobs)),
        preexec_fn=on_any_core,
    )
    if await process.wait():  # nobody would ever come to the last job
        raise SystemExit("the producer failed: see above")


async def bare(url: str, jobs: int) -> list[float]:
    """Milliseconds from before XADD to after XREADGROUP."""
    consumer = redis.Redis.from_url(url, protocol=2)
    await consumer.flushall()
    await consumer.xgroup_create("bare", "workers", "0", mkstream=True)
    waits: list[float] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(produce(url, "bare", jobs))
        while len(waits) < WARM + jobs:
            reply = await consumer.xreadgroup("workers", "me", {"bare": ">"}, count=100, block=5000)
            now = time.perf_counter_ns()
            for entry, fields in reply[0][1] if reply else ():
                waits.append((now - int(fields[b"n"])) / 1e6)
                await consumer.xack("bare", "workers", entry)
    await consumer.aclose()
    return waits[WARM:]


async def ours(url: str, jobs: int) -> list[float]:
    """Milliseconds from before `enqueue` to the first line of the handler."""
    app = App(settings=settings(url))
    waits, done = [], asyncio.Event()

    @app.handler
    async def started(payload: Noop) -> None:
        waits.append((time.perf_counter_ns() - payload.n) / 1e6)
        if len(waits) == WARM + jobs:
            done.set()

    worker = QueueWorker(app, redis=None, database=None, services=None)
    task = asyncio.create_task(worker.start())
    await produce(url, "worker", jobs)
    await done.wait()
    await worker.stop()
    await task
    return waits[WARM:]


async def ask(url: str, options: Options) -> list[Row]:
    """Median and 99th percentile of each round."""
    jobs = max(300, int(1000 * options.scale))
    figures: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, contestant in (("bare", bare), ("worker", ours)):
            waits = await contestant(url, jobs)
            figures.setdefault(f"{name} p50", []).append(statistics.median(waits))
            figures.setdefault(f"{name} p99", []).append(statistics.quantiles(waits, n=100)[98])
    rows = []
    for part, goal in (("p50", 1.15), ("p99", 1.3)):
        question = f"enqueue to start, {part}"
        rows += [
            Row(question=question, what="bare XREADGROUP", unit="ms", values=figures[f"bare {part}"], less=True),
            Row(
                question=question,
                what="worker",
                unit="ms",
                values=figures[f"worker {part}"],
                against=figures[f"bare {part}"],
                versus="bare XREADGROUP",
                goal=goal,
                less=True,
            ),
        ]
    return rows


if __name__ == "__main__":
    measure.main(ask, __doc__)
