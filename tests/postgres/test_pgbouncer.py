"""Behind PgBouncer in transaction mode: no session is ours for longer than a transaction."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest

from streamworker import App, Context
from streamworker.postgres.pool import open_database
from tests.conftest import eventually, nothing_left
from tests.postgres.pgbouncer import PgBouncer
from tests.postgres.servers import PostgresServer
from tests.postgres.working import Job, settings_for, working

Q = "stream:{q}"


@pytest.fixture(scope="module")
def bouncer(postgres: PostgresServer) -> Iterator[PgBouncer]:
    bouncer = PgBouncer(postgres)
    yield bouncer
    bouncer.close()


@pytest.fixture
def pooled_url(bouncer: PgBouncer, database_url: str) -> str:
    return bouncer.url(database_url.split("@/")[1].split("?", maxsplit=1)[0])


async def test_a_pooler_is_recognised(database_url, pooled_url):
    straight, through = await open_database(database_url), await open_database(pooled_url)
    assert (straight.pooled, through.pooled) == (False, True)
    straight.close()
    through.close()


@pytest.mark.parametrize("pool", ["ours", pytest.param("the user's", marks=pytest.mark.all)])
async def test_jobs_through_it(redis_url, pooled_url, raw, pg, pool):
    """More clients than server connections, so that transactions of one client wander between them."""
    await pg.execute("create table effect (job text)")
    app: App[None] = App(settings=settings_for(redis_url, pooled_url, concurrency=50))

    @app.handler
    async def handler(payload: Job, ctx: Context) -> int:
        if payload.n % 2:
            async with ctx.transaction() as connection:
                await connection.execute("insert into effect values ($1)", ctx.job.id)
        return payload.n

    async def ended() -> bool:
        return not raw.xlen(Q)

    async def go(**options: Any) -> None:
        async with app, working(app, **options):
            await app.enqueue_many([Job(n=n) for n in range(500)])
            await eventually(ended, 40)

    if pool == "ours":
        await go()
    else:
        async with asyncpg.create_pool(pooled_url, min_size=0, max_size=20, statement_cache_size=0) as theirs:
            await go(database=theirs)
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 500
    assert await pg.fetchval("select count(distinct job) from effect") == 250
    assert await pg.fetchval("select count(*) from effect") == 250
    results = [json.loads(each["result"]) for each in await pg.fetch("select result from streamworker.jobs")]
    assert sorted(results) == list(range(500))


async def test_nothing_of_ours_stays_behind_in_its_sessions(redis_url, pooled_url, raw, pg):
    app: App[None] = App(settings=settings_for(redis_url, pooled_url))

    @app.handler(timeout=5)
    async def handler(_: Job, ctx: Context) -> None:
        async with ctx.transaction():
            pass

    async def ended() -> bool:
        return not raw.xlen(Q)

    async with app, working(app):
        await app.enqueue_many([Job(n=n) for n in range(50)])
        await eventually(ended, 20)
    connections = [await asyncpg.connect(pooled_url, statement_cache_size=0) for _ in range(5)]

    async def settings(connection: asyncpg.Connection) -> tuple[Any, ...]:
        async with connection.transaction():
            await connection.execute("select pg_sleep(0.1)")  # all five at once: each has a server connection
            return tuple(
                await connection.fetchrow(
                    "select current_setting('enable_seqscan'), current_setting('lock_timeout'), "
                    "current_setting('statement_timeout'), (select count(*) from pg_prepared_statements where name <> '')"
                )
            )

    found = await asyncio.gather(*(settings(connection) for connection in connections))
    assert set(found) == {("on", "0", "0", 0)}
    for connection in connections:
        await connection.close()


async def test_a_restarted_pooler(redis_url, database_url, postgres, raw, pg):
    """Its clients are cut off in the middle of whatever they do; nothing is lost, and nothing done twice."""
    await pg.execute("create table effect (job text)")
    bouncer = PgBouncer(postgres)
    name = database_url.split("@/")[1].split("?")[0]
    app: App[None] = App(settings=settings_for(redis_url, bouncer.url(name), concurrency=20))

    @app.handler(max_attempts=100)
    async def handler(_: Job, ctx: Context) -> None:
        async with ctx.transaction() as connection:
            await connection.execute("insert into effect values ($1)", ctx.job.id)

    async def ended() -> bool:
        return nothing_left(raw, Q)

    async with app, working(app):
        await app.enqueue_many([Job(n=n) for n in range(600)])
        await eventually(lambda: pg.fetchval("select count(*) > 100 from effect"))
        bouncer.stop()
        await asyncio.sleep(0.2)
        bouncer.start()
        await eventually(ended, 50)
    bouncer.close()
    assert await pg.fetchval("select count(*) from effect") == 600
    assert await pg.fetchval("select count(distinct job) from effect") == 600
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 600
