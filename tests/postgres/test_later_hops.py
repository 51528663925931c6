"""The ledger knows a later hop of a job than the entry that is claimed: it is let go only if that one really is there."""

from __future__ import annotations

import json
from typing import Any

import asyncpg
import pytest

from streamworker import App, Backoff, Context, Handlers
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working

INSERT = """
insert into streamworker.jobs (id, queue_name, status, hop, deliveries, attempt_count, run_at, last_error)
values ('a', 'q', $1, $2, $3, 1, now() + interval '1 hour', 'failed 1 of 20 attempts: ValueError: no')"""


@pytest.fixture
def app(ground: Any, redis_url: str, database_url: str) -> App[None]:
    return App(settings=settings_for(redis_url, database_url, mode=ground.mode, lease=0.5))


def put(ground: Any, job_id: str = "a", **fields: Any) -> None:
    ground.push(json.dumps({"id": job_id, "kind": "job", "payload": {}, **fields}))


async def row(pg: asyncpg.Connection, job_id: str = "a") -> asyncpg.Record:
    (found,) = await pg.fetch("select * from streamworker.jobs where id = $1", job_id)
    return found


async def completed(pg: asyncpg.Connection, job_id: str = "a") -> bool:
    return await pg.fetchval("select status from streamworker.jobs where id = $1", job_id) == "completed"


def empty(ground: Any, raw: Any) -> bool:
    return not ground.left() and not raw.exists("stream:{q}:due")


# -- it is lost: the job runs


LATER = [("retrying", 3, 1, 1), ("dispatched", 3, 1, 0), ("running", 3, 1, 2), ("dead", 2, 1, 0), ("dead", 0, 3, 0),
         ("running", 1, 4, 1), ("retrying", 2**53, 1, 2**53 - 1)]  # fmt: skip


# What the ledger knows is the same in both modes, and where Redis is asked for the hop is the same for all of it.
LOST = [
    *(("stream", *row, False) for row in LATER), ("stream", *LATER[0], True), ("stream", *LATER[3], True),
    *(("list", *LATER[n], False) for n in (1, 4, 6)), ("list", *LATER[0], True), ("list", *LATER[3], True),
    *(pytest.param("stream", *row, True, marks=pytest.mark.all) for row in LATER if row not in (LATER[0], LATER[3])),
]  # fmt: skip


@pytest.mark.parametrize(("ground", "status", "hop", "deliveries", "mine", "transaction"), LOST, indirect=["ground"])
async def test_an_earlier_hop_whose_later_one_is_lost_runs(app, ground, raw, pg, status, hop, deliveries, mine, transaction):  # fmt: skip
    """And fails at first: what becomes of it is recorded, and comes again."""
    ran = []

    @app.handler(backoff=Backoff(base=0.01, cap=0.02, jitter=0))
    async def handler(_: Job, ctx: Context) -> None:
        ran.append(ctx.job.hop)
        if len(ran) == 1:
            raise ValueError("not yet")
        if transaction:
            async with ctx.transaction() as connection:
                await connection.execute("create table effect ()")

    await pg.execute(INSERT, status, hop, deliveries)
    put(ground, hop=mine)
    async with working(app):
        await eventually(lambda: completed(pg))
        await eventually(lambda: empty(ground, raw))
    assert len(ran) == 2
    assert not transaction or await pg.fetchval("select to_regclass('effect') is not null")


async def test_a_job_enqueued_anew_under_the_id_of_a_dead_one_runs(app, ground, raw, pg):
    fixed = []

    @app.handler(max_attempts=3, backoff=Backoff(base=0.01, cap=0.02, jitter=0))
    async def handler(_: Job) -> None:
        if not fixed:
            raise ValueError("a bug")

    async with working(app):
        put(ground)
        await eventually(lambda: raw.xlen("stream:{q}:dead") == 1)
        assert (await row(pg))["hop"] == 2
        fixed.append(True)
        put(ground)
        await eventually(lambda: completed(pg))


async def test_a_dead_jobs_id_is_enqueued_anew_in_a_transaction(ground, redis_url, database_url, raw, pg):
    app: App[None] = App(settings=settings_for(redis_url, database_url, mode=ground.mode, relay="on"))
    ran = []

    @app.handler(max_attempts=2, backoff=Backoff(base=0.01, cap=0.02, jitter=0))
    async def handler(payload: Job, ctx: Context) -> None:
        ran.append((payload.n, ctx.attempt))
        if payload.n == 1:
            raise ValueError("a bug")

    async def dead() -> bool:
        return await pg.fetchval("select status from streamworker.jobs") == "dead"

    enqueue = "select streamworker.enqueue('job', jsonb_build_object('n', $1::int), 'q', id => 'a')"
    async with working(app):
        await pg.execute(enqueue, 1)
        await eventually(dead)
        await pg.execute(enqueue, 2)
        await eventually(lambda: completed(pg))
        await pg.execute(enqueue, 3)
        assert await completed(pg)
    assert ran == [(1, 1), (1, 2), (2, 1)]


async def test_whoever_enqueues_needs_no_right_to_update_for_ids_that_are_not_of_the_dead(pg):
    await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('a', 'q', 'completed')")
    await pg.execute("create role plain")
    try:
        await pg.execute("grant usage on schema streamworker to plain; grant select, insert on streamworker.jobs to plain;"
                         "grant select on streamworker.job_queues to plain; set role plain")  # fmt: skip
        for job_id in ("a", "b"):
            assert await pg.fetchval("select streamworker.enqueue('job', '{}', 'q', id => $1)", job_id) == job_id
    finally:
        await pg.execute("reset role; drop owned by plain; drop role plain")
    assert {tuple(each) for each in await pg.fetch("select id, status from streamworker.jobs")} == {
        ("a", "completed"), ("b", "queued")
    }  # fmt: skip


async def test_redis_goes_back_to_an_earlier_state(app, ground, raw, pg, redis_url, database_url):
    """A failover to a replica that lagged: jobs of the ledger are there again at the hop they were dispatched with."""
    ran, back = [], []
    handlers: Handlers[None] = Handlers()

    @handlers.handler(backoff=Backoff(base=0.01, cap=0.02, jitter=0))
    async def handler(payload: Job, ctx: Context) -> None:
        if not back:
            raise ValueError("the partner is down")
        ran.append(payload.n)

    relaying: App[None] = App(settings=settings_for(redis_url, database_url, mode=ground.mode, lease=0.5, relay="on"))
    relaying.include(handlers)
    app.include(handlers)
    raw.hset("stream:{q}:meta", "paused", "1")
    async with relaying, working(relaying):
        async with pg.transaction():
            for n in range(5):
                await relaying.enqueue(Job(n=n), connection=pg)
        await eventually(lambda: ground.left() == 5)
        raw.hdel("stream:{q}:meta", "paused")
        then = {key: raw.dump(key) for key in raw.keys("stream:*") + raw.keys("queue:q")}

        async def retried() -> bool:
            return await pg.fetchval("select min(attempt_count) from streamworker.jobs") >= 3

        await eventually(retried)
        raw.hset("stream:{q}:meta", "paused", "1")
    raw.flushall()
    for key, value in then.items():
        raw.restore(key, 0, value)
    back.append(True)
    async with working(app):
        await eventually(lambda: len(ran) >= 5)
        await eventually(lambda: empty(ground, raw))
    assert sorted(ran) == list(range(5))
    assert {tuple(each) for each in await pg.fetch("select status, count(*) from streamworker.jobs group by 1")} == {
        ("completed", 5)
    }


# -- it is there: the earlier one is let go


@pytest.mark.parametrize("where", ["ready", "delayed", "held"])
async def test_an_earlier_hop_is_let_go_where_the_later_one_is_there(app, ground, raw, pg, broker_factory, where):
    ran = []

    @app.handler
    async def handler(_: Job, ctx: Context) -> None:
        ran.append(ctx.job.hop)

    await pg.execute(INSERT, "dispatched", 2, 1)
    later = json.dumps({"id": "a", "kind": "job", "payload": {}, "hop": 2})
    if where == "held":
        ground.push(later)
    async with broker_factory("other") as other:
        held = await other.claim(1, 0, ()) if where == "held" else []
        put(ground, hop=1)
        if where == "ready":
            ground.push(later)
        elif where == "delayed":
            raw.hset("stream:{q}:bodies", "normal/a/12345678", later)
            raw.zadd("stream:{q}:due", {"normal/a/12345678": 9e12})
        async with working(app) as worker:
            if where == "ready":
                await eventually(lambda: completed(pg))
            await eventually(lambda: hasattr(worker, "_in_flight") and worker._in_flight.counts.skipped == 1)
        assert len(held) == (where == "held")
    assert ran == ([2] if where == "ready" else [])


async def test_a_later_hop_that_the_ledger_sends_itself_is_there(app, ground, raw, pg):
    @app.handler
    async def handler(_: Job) -> None:
        raise AssertionError

    await pg.execute(INSERT, "queued", 2, 0)
    put(ground, hop=1)
    async with working(app):
        await eventually(lambda: empty(ground, raw))
    assert (await row(pg))["status"] == "queued"


# -- while it runs


@pytest.mark.parametrize("way", ["fails", "transaction", "complete"])
async def test_a_run_that_is_overtaken_by_a_hop_that_is_lost_is_not(app, ground, raw, pg, way):
    ran = []

    @app.handler(backoff=Backoff(base=0.01, cap=0.02, jitter=0))
    async def handler(_: Job, ctx: Context) -> None:
        ran.append(ctx.job.hop)
        if len(ran) == 1:
            await ctx.database.execute(INSERT, "retrying", 7, 1)
            if way == "fails":
                raise ValueError("not yet")
        if way == "transaction":
            async with ctx.transaction():
                pass
        elif way == "complete":
            async with ctx.database.acquire() as connection, connection.transaction():
                await ctx.complete(connection)

    put(ground)
    async with working(app):
        await eventually(lambda: completed(pg))
        await eventually(lambda: empty(ground, raw))
    assert len(ran) == 2 and ran[1] > 7


async def test_a_run_that_is_overtaken_by_a_hop_that_is_there_is_let_go(app, ground, raw, pg):
    ran = []

    @app.handler(backoff=Backoff(base=0.01, cap=0.02, jitter=0))
    async def handler(_: Job, ctx: Context) -> None:
        ran.append(ctx.job.hop)
        if ctx.job.hop == 0:
            await ctx.database.execute(INSERT, "dispatched", 7, 0)
            put(ground, hop=7)
            raise ValueError("not yet")

    put(ground)
    async with working(app):
        await eventually(lambda: completed(pg))
        await eventually(lambda: empty(ground, raw))
    assert ran == [0, 7]


# -- hops that no job comes to


@pytest.mark.parametrize("hop", [2**53, 2**53 - 1, 2**52])
async def test_a_job_whose_producer_says_an_absurd_hop_is_a_job_like_others(app, ground, raw, pg, hop):
    ran = []

    @app.handler(backoff=Backoff(base=0.01, cap=0.02, jitter=0))
    async def handler(_: Job, ctx: Context) -> None:
        ran.append(ctx.job.hop)
        if len(ran) < 3:
            raise ValueError("not yet")

    put(ground, hop=hop)
    async with working(app):
        await eventually(lambda: completed(pg))
        await eventually(lambda: empty(ground, raw))
    assert len(ran) == 3
    assert not raw.xlen("stream:{q}:dead")
