"""What do flows cost? Ends a second of a fan-in, and what each hop of a chain adds.

With the ledger and PostgreSQL's fsync on, one worker and its relay. The fan-in has one continuation, which must run
once; its rate is from the commit that starts the flow to the end of the continuation. A hop of the chain is from the
end of a node to the end of the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import redis.asyncio as redis

from benchmarks import measure
from benchmarks.ledger import database
from benchmarks.measure import Options, Row
from benchmarks.worker import settings
from streamworker import App, Flow, Payload, QueueWorker, chain
from streamworker.postgres.migrate import Migrator

CHILDREN = 100_000
HOPS = 1000
STATUS = "select status from streamworker.flows where id = $1"


class Child(Payload, kind="flows.child", queue="bench"):
    """A no-op."""

    n: int


class Join(Payload, kind="flows.join", queue="bench"):
    """The continuation."""


async def ask(url: str, options: Options) -> list[Row]:
    """Both, once a round."""
    client = redis.Redis.from_url(url)
    ends: list[float] = []
    hops: list[float] = []
    with database() as database_url:
        await Migrator(database_url).up()
        pool = await asyncpg.create_pool(database_url, min_size=1, max_size=10)
        for _ in range(options.rounds):
            await client.flushall()
            async with _working(url, database_url, pool) as app:
                ends.append(await _fan_in(app, pool, options.jobs(CHILDREN)))
                hops.append(await _chain(app, pool, options.jobs(HOPS)))
        await pool.close()
    await client.aclose()
    return [
        Row(question="flows", what="ends of a fan-in", unit="/s", values=ends, goal=3000),
        Row(question="flows", what="a hop of a chain", unit="ms", values=hops, goal=10, less=True),
    ]


@asynccontextmanager
async def _working(url: str, database_url: str, pool: asyncpg.Pool[asyncpg.Record]) -> AsyncIterator[App]:
    app = App(settings=settings(url, concurrency=100, relay="on", database_url=database_url, ledger="on"))

    @app.handler
    async def child(_: Child) -> None:
        pass

    @app.handler
    async def join(_: Join) -> None:
        pass

    await pool.execute(
        "truncate streamworker.jobs, streamworker.job_logs, streamworker.flows, streamworker.flow_nodes,"
        " streamworker.flow_edges, streamworker.flow_checks"
    )
    worker = QueueWorker(app, redis=None, database=pool, services=None)
    task = asyncio.create_task(worker.start())
    yield app
    await worker.stop()
    await task


async def _run(app: App, pool: asyncpg.Pool[asyncpg.Record], flow: Flow) -> tuple[str, float]:
    """(the flow's id, seconds from its start to its end)."""
    async with pool.acquire() as connection:
        async with connection.transaction():
            flow_id = (await app.start(flow, connection=connection)).id
        begin = time.perf_counter()
        while await connection.fetchval(STATUS, flow_id) != "completed":  # noqa: ASYNC110 - another process ends it
            await asyncio.sleep(0.02)
    return flow_id, time.perf_counter() - begin


async def _fan_in(app: App, pool: asyncpg.Pool[asyncpg.Record], children: int) -> float:
    flow = Flow("fan-in")
    flow.add(Join(), after=[flow.add(Child(n=n)) for n in range(children)])
    _, seconds = await _run(app, pool, flow)
    joins = await pool.fetchval(
        "select count(*) from streamworker.job_logs where outcome = 'ok' and job_id in"
        " (select id from streamworker.jobs where kind = 'flows.join')"
    )
    if joins != 1:
        raise SystemExit(f"{joins} continuations instead of one")
    return children / seconds


async def _chain(app: App, pool: asyncpg.Pool[asyncpg.Record], hops: int) -> float:
    flow_id, _ = await _run(app, pool, chain(*(Child(n=n) for n in range(hops))))
    ends = [
        row[0].timestamp()
        for row in await pool.fetch(
            "select job.finished_at from streamworker.flow_nodes as node"
            " join streamworker.jobs as job on job.id = node.job_id where node.flow_id = $1 order by node.node",
            flow_id,
        )
    ]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends)) * 1000


if __name__ == "__main__":
    measure.main(ask, __doc__)
