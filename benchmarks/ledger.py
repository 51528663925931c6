"""What does the durable record cost? No-op jobs with the PostgreSQL ledger on, beside the same without it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import asyncpg
import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.server import on_any_core
from benchmarks.worker import Bench, settings
from streamworker import embedded
from streamworker.postgres.migrate import Migrator

SHARE = 0.45
"""Of the throughput without a ledger: what it has to reach."""
SLOTS = (100, 400)
"""The default, and more: a record takes longer than a no-op job, so that more jobs at once make larger batches."""


@contextmanager
def database() -> Iterator[str]:
    """URL of a fresh PostgreSQL with its defaults (fsync is on), free to run on any core."""
    ours = os.sched_getaffinity(0)
    state = Path(tempfile.mkdtemp(prefix="streamworker-bench-"))
    on_any_core()
    try:
        servers = embedded.acquire(state)
    finally:
        os.sched_setaffinity(0, ours)
    try:
        yield servers.database_url
    finally:
        servers.close()
        time.sleep(2)  # they stop when nobody uses them
        shutil.rmtree(state, ignore_errors=True)


async def ask(url: str, options: Options) -> list[Row]:
    """The same jobs and the same worker, until the last one is recorded and settled; with few slots and with many."""
    client = redis.Redis.from_url(url)
    jobs = options.jobs(100_000)
    rows: list[Row] = []
    with database() as database_url:
        await Migrator(database_url).up()

        async def rate(slots: int, **more: object) -> float:
            await client.flushall()
            bench = Bench(settings(url, concurrency=slots, relay="off", **more))
            await bench.fill(jobs)
            begin = time.perf_counter()
            async with bench.working():
                await bench.done.wait()
            return jobs / (time.perf_counter() - begin)

        async def recorded(slots: int) -> float:
            connection = await asyncpg.connect(database_url)
            await connection.execute("truncate streamworker.jobs, streamworker.job_logs")
            figure = await rate(slots, database_url=database_url, ledger="on")
            count = await connection.fetchval("select count(*) from streamworker.jobs where status = 'completed'")
            await connection.close()
            if count != jobs:
                raise SystemExit(f"{count} of {jobs} jobs are recorded")
            return figure

        for slots in SLOTS:
            contestants = {"no ledger": partial(rate, slots), "ledger": partial(recorded, slots)}
            figures = await measure.take_turns(options.rounds, contestants)
            rows += measure.rows_of(f"ledger, {slots} no-op jobs at once", "/s", figures, "no ledger", ledger=SHARE)
    await client.aclose()
    return rows


if __name__ == "__main__":
    measure.main(ask, __doc__)
