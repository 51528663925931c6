"""How long from enqueue to the handler's start, at 100 jobs a second, beside a bare XADD and XREADGROUP?"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Noop, settings
from streamworker import App, QueueWorker

RATE = 100


async def paced(jobs: int, send: Callable[[int], Awaitable[None]]) -> None:
    """Send ``jobs`` jobs, one every hundredth of a second, late or not."""
    begin = time.perf_counter()
    for n in range(jobs):
        await asyncio.sleep(max(0.0, begin + n / RATE - time.perf_counter()))
        await send(n)


async def bare(url: str, jobs: int) -> list[float]:
    """Milliseconds from before XADD to after XREADGROUP, in one process like ours."""
    producer, consumer = redis.Redis.from_url(url, protocol=2), redis.Redis.from_url(url, protocol=2)
    await producer.flushall()
    await producer.xgroup_create("bare", "workers", "0", mkstream=True)
    sent, waits = [0.0] * jobs, []

    async def consume() -> None:
        while len(waits) < jobs:
            reply = await consumer.xreadgroup("workers", "me", {"bare": ">"}, count=100, block=5000)
            now = time.perf_counter()
            for entry, fields in reply[0][1] if reply else ():
                waits.append((now - sent[int(fields[b"n"])]) * 1000)
                await consumer.xack("bare", "workers", entry)

    async def send(n: int) -> None:
        sent[n] = time.perf_counter()
        await producer.execute_command("XADD", "bare", "*", "n", n)

    await asyncio.gather(consume(), paced(jobs, send))
    await producer.aclose()
    await consumer.aclose()
    return waits


async def ours(url: str, jobs: int) -> list[float]:
    """Milliseconds from before `enqueue` to the first line of the handler."""
    app = App(settings=settings(url))
    sent, waits, done = [0.0] * jobs, [], asyncio.Event()

    @app.handler
    async def started(payload: Noop) -> None:
        waits.append((time.perf_counter() - sent[payload.n]) * 1000)
        if len(waits) == jobs:
            done.set()

    async def send(n: int) -> None:
        sent[n] = time.perf_counter()
        await app.enqueue(Noop(n=n))

    worker = QueueWorker(app, redis=None, database=None, services=None)
    async with app:
        task = asyncio.create_task(worker.start())
        await asyncio.sleep(0.5)
        await paced(jobs, send)
        await done.wait()
        await worker.stop()
        await task
    return waits


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
    for part, goal in (("p50", 1.25), ("p99", 1.5)):
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
