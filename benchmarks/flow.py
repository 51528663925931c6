"""What do order and fairness cost? Plain, ordered and fair no-op jobs per second, and Redis a job by tenants."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.cost import spent
from benchmarks.measure import Options, Row
from benchmarks.worker import settings
from streamworker import App, Payload, QueueWorker

KEYS = 1000
"""Order keys, and tenants, of the comparison: enough that a worker's slots are never short of jobs that may start."""
TENANTS = (1, 1000, 100_000)


class Plain(Payload, kind="flow.plain", queue="bench"):
    """No line."""

    n: int
    of: int


class Ordered(Payload, kind="flow.ordered", queue="bench", order_by="of"):
    """In the line of an order key."""

    n: int
    of: int


class Fair(Payload, kind="flow.fair", queue="bench", fair_by="of"):
    """In the line of a tenant."""

    n: int
    of: int


class Flow:
    """An app with a handler that counts.

    Args:
        url: of the server.
        kind: the payload's class.
        mode: stream or list.
    """

    def __init__(self, url: str, kind: Any, mode: str = "stream") -> None:
        self.app = App(settings=settings(url, mode=mode, concurrency=100))
        self.kind, self.left, self.done = kind, 0, asyncio.Event()

        async def noop(_: kind) -> None:
            self.left -= 1
            if self.left == 0:
                self.done.set()

        self.app.handler(noop)

    async def fill(self, jobs: int, keys: int) -> None:
        """Put jobs of so many keys on the queue, one of each in turn."""
        self.left = jobs
        async with self.app:
            for start in range(0, jobs, 10_000):
                some = range(start, min(start + 10_000, jobs))
                await self.app.enqueue_many([self.kind(n=n, of=n % keys) for n in some])

    async def drained(self) -> float:
        """Seconds until the last job has run."""
        begin = time.perf_counter()
        worker = QueueWorker(self.app, redis=None, database=None, services=None)
        task = asyncio.create_task(worker.start())
        await self.done.wait()
        took = time.perf_counter() - begin
        await worker.stop()
        await task
        return took


QUIET, EACH = 99, 10
"""Tenants beside the one that floods, and their jobs."""


async def _flooded(url: str, jobs: int) -> tuple[float, float]:
    """(time until the quiet tenants are done, by their fair time; seconds until the last of their jobs has started).

    Their fair time is that in which each of the 100 tenants has had as many starts as a quiet one has jobs.
    """
    app = App(settings=settings(url, mode="stream", concurrency=100))
    left, done, counts, began = QUIET * EACH, asyncio.Event(), {"all": 0}, 0.0
    worst = 0.0

    @app.handler
    async def noop(payload: Fair) -> None:
        nonlocal left, worst
        counts["all"] += 1
        if payload.of:
            left -= 1
            worst = time.perf_counter() - began
            if left == 0:
                done.set()

    async with app:
        for start in range(0, jobs, 10_000):
            await app.enqueue_many([Fair(n=n, of=0) for n in range(start, min(start + 10_000, jobs))])
        await app.enqueue_many([Fair(n=n, of=1 + n % QUIET) for n in range(QUIET * EACH)])
    worker = QueueWorker(app, redis=None, database=None, services=None)
    began = time.perf_counter()
    task = asyncio.create_task(worker.start())
    await done.wait()
    share = counts["all"] / ((QUIET + 1) * EACH)  # at one rate, times are as the numbers of starts
    await worker.stop()
    await task
    return share, worst


async def ask(url: str, options: Options) -> list[Row]:
    """Order and fairness against plain jobs; then one to a hundred thousand tenants."""
    client = redis.Redis.from_url(url)
    jobs, rates = options.jobs(50_000), {}
    kinds = {"plain": Plain, "order_by": Ordered, "fair_by": Fair}
    for _ in range(options.rounds):
        for mode in ("stream", "list"):
            for name, kind in kinds.items():
                await client.flushall()
                flow = Flow(url, kind, mode)
                await flow.fill(jobs, KEYS)
                rates.setdefault((mode, name), []).append(jobs / await flow.drained())
    rows = []
    for (mode, name), values in rates.items():
        against = rates[mode, "plain"] if name != "plain" else []
        goal = {"order_by": 0.5, "fair_by": 0.6}.get(name)
        row = {"against": against, "versus": "plain" if against else "", "goal": goal}
        rows.append(Row(question="flow, no-op jobs/s", what=f"{name}, {mode}", unit="/s", values=values, **row))
    costs: dict[int, list[float]] = {count: [] for count in TENANTS}
    for _ in range(options.rounds):
        for count, values in costs.items():
            await client.flushall()
            flow = Flow(url, Fair)
            await flow.fill(max(jobs, 2 * count), count)
            number = flow.left
            before, _ = await spent(client)
            await flow.drained()
            values.append(((await spent(client))[0] - before) / number * 1e6)
    starts, worst = [], []
    for _ in range(options.rounds):
        await client.flushall()
        share, wait = await _flooded(url, options.jobs(100_000))
        starts.append(share)
        worst.append(wait)
    await client.aclose()
    flood = {"question": "flow, one of 100 tenants floods", "less": True}
    rows.append(Row(what="time of the 99, of their fair time", unit="", values=starts, goal=1.2, **flood))
    rows.append(Row(what="worst wait of a quiet job", unit="s", values=worst, **flood))
    first = costs[TENANTS[0]]
    for count, values in costs.items():
        compared = {} if count == 1 else {"against": first, "versus": "1 tenant", "goal": 1.5}
        what = f"{count:,} tenants"
        rows.append(Row(question="flow, Redis a fair job", what=what, unit="us", values=values, less=True, **compared))
    return rows


if __name__ == "__main__":
    measure.main(ask, __doc__)
