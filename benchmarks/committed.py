"""How long from a commit in PostgreSQL to the start of the handler, and does what was rolled back ever start?

One worker with its own relay; a transaction every 50 ms, each second one rolled back.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from random import Random

import asyncpg
import redis.asyncio as redis

from benchmarks import measure
from benchmarks.ledger import database
from benchmarks.measure import Options, Row
from benchmarks.worker import Noop, settings
from streamworker import App, QueueWorker
from streamworker.postgres.migrate import Migrator

EVERY = 0.05
"""Mean seconds between transactions; not at a beat that something else could fall in with."""
TYPICAL, WORST = 20.0, 1000.0
"""Milliseconds that are promised."""


async def waits_of(url: str, database_url: str, jobs: int) -> list[float]:
    """Milliseconds from the moment COMMIT has returned to the first line of the handler."""
    app = App(settings=settings(url, database_url=database_url, ledger="on"))
    began: dict[int, float] = {}

    @app.handler
    async def started(payload: Noop) -> None:
        began[payload.n] = time.perf_counter()

    worker = QueueWorker(app, redis=None, database=None, services=None)
    committed: dict[int, float] = {}
    pauses = Random(5)
    async with app:
        task = asyncio.create_task(worker.start())
        pg = await asyncpg.connect(database_url)
        await asyncio.sleep(2)
        for n in range(2 * jobs):
            await asyncio.sleep(pauses.uniform(0, 2 * EVERY))
            transaction = pg.transaction()
            await transaction.start()
            await app.enqueue(Noop(n=n), connection=pg)
            if n % 2:
                await transaction.rollback()
            else:
                await transaction.commit()
                committed[n] = time.perf_counter()
        deadline = time.perf_counter() + 30
        while committed.keys() - began.keys() and time.perf_counter() < deadline:  # noqa: ASYNC110 - polled, once
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        await pg.close()
        await worker.stop()
        await task
    if began.keys() != committed.keys():
        raise SystemExit(f"rolled back, but ran, or committed, but did not: {sorted(began.keys() ^ committed.keys())}")
    return [(began[n] - committed[n]) * 1000 for n in committed]


async def ask(url: str, options: Options) -> list[Row]:
    """Median and worst of each round."""
    client = redis.Redis.from_url(url)
    figures: dict[str, list[float]] = {"median": [], "worst": []}
    with database() as database_url:
        await Migrator(database_url).up()
        for _ in range(options.rounds):
            await client.flushall()
            waits = await waits_of(url, database_url, max(50, int(400 * options.scale)))
            figures["median"].append(statistics.median(waits))
            figures["worst"].append(max(waits))
    await client.aclose()
    return [
        Row(
            question=f"commit to start, {what}",
            what="worker",
            unit="ms",
            values=figures[what],
            goal=limit,
            less=True,
        )
        for what, limit in (("median", TYPICAL), ("worst", WORST))
    ]


if __name__ == "__main__":
    measure.main(ask, __doc__)
