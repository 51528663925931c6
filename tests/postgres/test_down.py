"""PostgreSQL goes away under load, for a moment, for a while, at shutdown: nothing is lost, nothing done twice."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg
import pytest

from streamworker import App, Context
from streamworker.embedded.layout import PG_USER
from tests.conftest import eventually, nothing_left
from tests.postgres.servers import PostgresServer
from tests.postgres.working import Job, settings_for, working

Q = "stream:{q}"


def app_of(redis_url: str, server: PostgresServer, **more: Any) -> App[None]:
    return App(settings=settings_for(redis_url, server.url(), **more))


async def ended(raw: Any) -> bool:
    return nothing_left(raw, Q)


async def ask(server: PostgresServer, question: str) -> Any:
    connection = await asyncpg.connect(server.url())
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


@pytest.mark.all
async def test_killed_and_restarted_under_load(redis_url, raw, own_postgres):
    """Commits whose answers were lost are looked up; attempts that were cut off are tried again."""
    jobs = 500
    await ask(own_postgres, "create table effect (job text)")
    app = app_of(redis_url, own_postgres, concurrency=20)

    @app.handler(max_attempts=100)
    async def handler(_: Job, ctx: Context) -> None:
        async with ctx.transaction() as connection:
            await connection.execute("insert into effect values ($1)", ctx.job.id)

    async with app, working(app):
        await app.enqueue_many([Job(n=n) for n in range(jobs)])
        for done in (50, jobs // 2):
            question = f"select count(*) >= {done} from effect"
            await eventually(partial(ask, own_postgres, question), 30, 0.05)
            own_postgres.kill()
            own_postgres.start()
        await eventually(lambda: ended(raw), 60)
    assert await ask(own_postgres, "select count(*) from effect") == jobs
    assert await ask(own_postgres, "select count(distinct job) from effect") == jobs
    assert await ask(own_postgres, "select count(*) from streamworker.jobs where status = 'completed'") == jobs
    assert not raw.exists(f"{Q}:dead")


@pytest.mark.slow  # now and then its count is read before the worker's; passes alone
async def test_while_it_is_down_nothing_is_claimed_and_what_finished_is_kept(redis_url, raw, own_postgres, caplog):
    caplog.set_level("INFO", "streamworker")
    ran: Counter[int] = Counter()
    app = app_of(redis_url, own_postgres, concurrency=5, lease=0.5)
    go = asyncio.Event()

    @app.handler
    async def handler(payload: Job) -> None:
        ran[payload.n] += 1
        await go.wait()

    async with app, working(app) as one, working(app) as two:
        await app.enqueue_many([Job(n=n) for n in range(10)])
        await eventually(lambda: len(ran) == 10)
        own_postgres.kill()
        go.set()
        await eventually(lambda: one._pipeline.record.outage.is_on() and two._pipeline.record.outage.is_on())
        # Three leases pass. What is finished is still ours, and what comes is left to wait.
        await app.enqueue_many([Job(n=n) for n in range(10, 50)])
        begun = time.monotonic()
        while time.monotonic() < begun + 1.5:
            await asyncio.sleep(0.05)
            held = raw.xpending(Q, "workers")
            assert held["pending"] <= 12  # what a blocking read brought when it was told, at most
        assert len(ran) == 10
        own_postgres.start()
        await eventually(lambda: ended(raw), 30)
        lost = one._in_flight.counts.lost + two._in_flight.counts.lost
    assert lost == 0 and set(ran.values()) == {1} and len(ran) == 50
    assert await ask(own_postgres, "select count(*) from streamworker.jobs where status = 'completed'") == 50
    assert caplog.text.count("ledger_down") == 2 == caplog.text.count("ledger_back")  # once a worker


@pytest.mark.parametrize("how", ["dead", "frozen"])
async def test_at_shutdown_what_cannot_be_recorded_is_handed_back(redis_url, raw, own_postgres, how, monkeypatch):
    monkeypatch.setattr("streamworker.worker.HAND_BACK", 1.0)
    monkeypatch.setattr("streamworker.postgres.pool.CONNECT_TIMEOUT", 2.0)
    app = app_of(redis_url, own_postgres, concurrency=5)
    go, ran = asyncio.Event(), []

    @app.handler
    async def handler(payload: Job) -> None:
        ran.append(payload.n)
        await go.wait()

    async with app:
        await app.enqueue_many([Job(n=n) for n in range(5)])
        async with working(app) as worker:
            await eventually(lambda: len(ran) == 5)
            own_postgres.kill() if how == "dead" else own_postgres.pause()
            go.set()
            await eventually(lambda: worker._in_flight.busy == 0)
            begun = time.monotonic()
        assert time.monotonic() - begun < 15
    try:
        assert raw.xpending(Q, "workers")["pending"] == 0
        documents = [json.loads(entry[b"job"]) for _, entry in raw.xrange(Q)]
        assert len(documents) == 5 and {each["hop"] for each in documents} == {1}
        assert {each.get("attempt_count", 0) for each in documents} == {0}
    finally:
        own_postgres.resume() if how == "frozen" else None


async def test_a_row_that_is_locked_is_recorded_later(redis_url, raw, own_postgres):
    app = app_of(redis_url, own_postgres)
    inside, go = asyncio.Event(), asyncio.Event()

    @app.handler
    async def handler(payload: Job) -> None:
        if payload.n == 0:
            inside.set()
            await go.wait()

    connection = await asyncpg.connect(own_postgres.url())
    async with app, working(app) as worker:
        enqueued = await app.enqueue(Job(n=0))
        await inside.wait()
        async with connection.transaction():
            await connection.execute("insert into streamworker.jobs (id, queue_name) values ($1, 'q')", enqueued.id)
            go.set()
            await app.enqueue_many([Job(n=n) for n in range(1, 20)])
            await eventually(lambda: worker._in_flight.counts.done == 19)
            assert raw.xlen(Q) == 1
        await eventually(lambda: ended(raw))
    assert await connection.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 20
    await connection.close()


# -- a server that answers, and does not record

RELOAD = "select pg_reload_conf()"
FULL = """
create function no_room() returns trigger language plpgsql as $$ begin
  raise exception 'could not extend file: No space left on device' using errcode = 'disk_full';
end $$;
create trigger no_room before insert or update on streamworker.jobs for each row execute function no_room()"""
WRITABLE = "set default_transaction_read_only = off"
BROKEN = {
    "read-only": (
        ["alter system set default_transaction_read_only = on", RELOAD],
        [WRITABLE, "alter system reset default_transaction_read_only", RELOAD],
    ),
    "full": ([FULL], ["drop function no_room cascade"]),
    "a table is gone": (
        ["alter table streamworker.job_logs rename to gone"],
        ["alter table streamworker.gone rename to job_logs"],
    ),
    "no permission": (
        ["revoke insert, update on streamworker.jobs from limited"],
        ["grant insert, update on streamworker.jobs to limited"],
    ),
}


async def tell(server: PostgresServer, statements: list[str]) -> None:
    connection = await asyncpg.connect(server.url())
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def limited(server: PostgresServer) -> str:
    """The URL of a user who may do what is granted, and no more."""
    granted = "grant all on all tables in schema streamworker to limited"
    await tell(server, ["create role limited login", "grant usage on schema streamworker to limited", granted])
    return server.url().replace(f"{PG_USER}@", "limited@", 1)


@pytest.mark.parametrize("how", BROKEN)
async def test_whatever_keeps_it_from_recording_closes_the_claim_loop(redis_url, raw, own_postgres, caplog, how):
    caplog.set_level("INFO", "streamworker")
    breaks, mends = BROKEN[how]
    url = await limited(own_postgres) if how == "no permission" else own_postgres.url()
    app = App(settings=settings_for(redis_url, url, concurrency=5))
    ran: Counter[int] = Counter()

    @app.handler
    async def handler(payload: Job) -> None:
        ran[payload.n] += 1

    async with app, working(app) as worker:
        await app.enqueue(Job(n=-1))
        await eventually(lambda: ended(raw))
        await tell(own_postgres, breaks)
        await app.enqueue_many([Job(n=n) for n in range(300)])
        # A claim that was under way when the loop was closed has brought its jobs, and those have run.
        await eventually(lambda: worker._pipeline.fetcher.shut and worker._in_flight.busy == 0)
        before = len(ran)
        assert before < 300, "a batch, and what was claimed until it failed"
        begun = time.monotonic()
        while time.monotonic() < begun + 0.8:  # it is tried again and again; lookups would be answered
            await asyncio.sleep(0.05)
            assert worker._pipeline.record.outage.is_on() and len(ran) == before
        await tell(own_postgres, mends)
        await eventually(lambda: ended(raw), 30)
    assert set(ran.values()) == {1} and len(ran) == 301
    assert await ask(own_postgres, "select count(*) from streamworker.jobs where status = 'completed'") == 301
    assert caplog.text.count("ledger_down") == 1 == caplog.text.count("ledger_back")
    assert caplog.text.count("record_failed") == 0


@pytest.mark.parametrize("how", ["read-only", "full"])
async def test_a_transaction_that_the_server_cannot_begin_charges_nothing(redis_url, raw, own_postgres, how):
    breaks, mends = BROKEN[how]
    app = app_of(redis_url, own_postgres, concurrency=5)
    tried, done = Counter[int](), []

    @app.handler(max_attempts=1)
    async def handler(payload: Job, ctx: Context) -> None:
        tried[payload.n] += 1
        async with ctx.transaction():
            done.append(payload.n)

    async with app, working(app):
        await app.enqueue(Job(n=-1))
        await eventually(lambda: ended(raw))
        await tell(own_postgres, breaks)
        await app.enqueue_many([Job(n=n) for n in range(5)])
        await eventually(lambda: len(tried) > 1)
        await tell(own_postgres, mends)
        await eventually(lambda: ended(raw), 30)
    assert sorted(done) == list(range(-1, 5))
    assert not raw.exists(f"{Q}:dead")
    assert await ask(own_postgres, "select count(*) from streamworker.jobs where status = 'completed'") == 6


@asynccontextmanager
async def locking(server: PostgresServer, mode: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(server.url())
    await connection.execute(f"begin; lock table streamworker.jobs in {mode} mode")
    try:
        yield connection
    finally:
        connection.terminate()


@pytest.mark.parametrize("mode", ["access exclusive", "share"])
async def test_a_table_that_is_locked_is_no_fault_of_its_rows(redis_url, raw, own_postgres, mode, caplog):
    """A migration, or an index that is made without ``concurrently``: not row after row waits, and nothing is claimed."""
    caplog.set_level("INFO", "streamworker")
    app = app_of(redis_url, own_postgres, concurrency=5)
    ran: Counter[int] = Counter()

    @app.handler
    async def handler(payload: Job) -> None:
        ran[payload.n] += 1

    async with app, working(app) as worker:
        await app.enqueue(Job(n=-1))
        await eventually(lambda: ended(raw))
        async with locking(own_postgres, mode):
            await app.enqueue_many([Job(n=n) for n in range(1500)])
            await eventually(worker._pipeline.record.outage.is_on)
            assert len(ran) < 1500
        await eventually(lambda: ended(raw), 30)
    assert set(ran.values()) == {1} and len(ran) == 1501
    assert await ask(own_postgres, "select count(*) from streamworker.jobs where status = 'completed'") == 1501
    assert caplog.text.count("ledger_down") == 1 == caplog.text.count("ledger_back")
