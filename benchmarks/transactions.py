"""What does "exactly once" cost? Jobs whose handler writes a row, in ``ctx.transaction()`` and without one.

Three contestants with the ledger on and PostgreSQL's fsync on: a handler that does nothing, one that inserts a row in a
transaction of its own, and one that inserts it in ``ctx.transaction()``, where the row and "this job is done" commit
together. The difference of the last two is the price of the promise.
"""

from __future__ import annotations

import asyncio

import asyncpg
import redis.asyncio as redis

from benchmarks import measure
from benchmarks.ledger import database
from benchmarks.measure import Options, Row
from benchmarks.worker import Noop, settings
from streamworker import App, Context, QueueWorker
from streamworker.postgres.migrate import Migrator

WRITERS = 20
"""Jobs at once: each holds a connection of PostgreSQL."""
INSERT = "insert into bench_effect (n) values ($1)"


async def ask(url: str, options: Options) -> list[Row]:
    """From the worker's start to the last job recorded and settled; every row must be there once."""
    client = redis.Redis.from_url(url)
    jobs = options.jobs(10_000)
    with database() as database_url:
        await Migrator(database_url).up()
        pool = await asyncpg.create_pool(database_url, min_size=WRITERS, max_size=WRITERS)
        await pool.execute("create table bench_effect (n bigint primary key)")

        async def nothing(_: Noop, ctx: Context) -> None:
            pass

        async def plain(payload: Noop, ctx: Context) -> None:
            await ctx.database.execute(INSERT, payload.n)

        async def once(payload: Noop, ctx: Context) -> None:
            async with ctx.transaction() as connection:
                await connection.execute(INSERT, payload.n)

        async def rate(handler, rows: int) -> float:
            await client.flushall()
            await pool.execute("truncate bench_effect, streamworker.jobs, streamworker.job_logs")
            app = App(settings=settings(url, concurrency=WRITERS, relay="off", database_url=database_url, ledger="on"))
            app.handler(handler)
            async with app:
                for start in range(0, jobs, 10_000):
                    await app.enqueue_many([Noop(n=n) for n in range(start, min(start + 10_000, jobs))])
            worker = QueueWorker(app, redis=None, database=pool, services=None)
            begin = asyncio.get_running_loop().time()
            task = asyncio.create_task(worker.start())
            while await client.xlen("stream:{bench}"):  # noqa: ASYNC110 - the last one is settled when none is left
                await asyncio.sleep(0.005)
            seconds = asyncio.get_running_loop().time() - begin
            await worker.stop()
            await task
            count = await pool.fetchval("select count(*) from bench_effect")
            if count != rows:
                raise SystemExit(f"{count} rows instead of {rows}")
            return jobs / seconds

        contestants = {
            "no write": lambda: rate(nothing, 0),
            "its own transaction": lambda: rate(plain, jobs),
            "ctx.transaction()": lambda: rate(once, jobs),
        }
        figures = await measure.take_turns(options.rounds, contestants)
        await pool.close()
    await client.aclose()
    return measure.rows_of("transactions, one row a job", "/s", figures, "its own transaction")


if __name__ == "__main__":
    measure.main(ask, __doc__)
