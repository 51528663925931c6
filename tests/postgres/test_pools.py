"""Connections for handlers: a few, which cannot starve each other, and whose waiting is named; behind poolers, too."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest

from streamworker import App, Backoff, Context, Payload, Settings
from streamworker.errors import ConfigurationError, NoConnection
from streamworker.postgres import pool as pools
from streamworker.postgres.pool import NamedPool, Pressure, open_database
from streamworker.postgres.sqlstate import is_outage
from streamworker.telemetry import logs
from streamworker.wiring import examine, most_connections
from tests.conftest import eventually
from tests.postgres.databases import CLEANER
from tests.postgres.pgbouncer import PgBouncer
from tests.postgres.working import Job, settings_for, working

Q = "stream:{q}"
DEAD = f"{Q}:dead"


@pytest.fixture
def written() -> Iterator[Any]:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    yield lambda event: [each for each in map(json.loads, stream.getvalue().splitlines()) if each["event"] == event]
    logs.configure("info", "json")


def name_of(database_url: str) -> str:
    return database_url.split("@/")[1].split("?", maxsplit=1)[0]


async def test_a_transaction_and_a_connection_beside_it_cannot_starve_each_other(redis_url, database_url, raw, pg):
    app: App[None] = App(settings=settings_for(redis_url, database_url, concurrency=30, database_connections=3))

    @app.handler(timeout=20, max_attempts=1)
    async def handler(_: Job, ctx: Context) -> None:
        async with ctx.transaction() as connection:
            await connection.fetchval("select pg_sleep(0.02)")
            async with ctx.database.acquire() as other:
                await other.fetchval("select 1")

    async def ended() -> bool:
        return not raw.xlen(Q)

    async with app, working(app):
        await app.enqueue_many([Job(n=n) for n in range(60)])
        await eventually(ended, 30)
    assert raw.xlen(DEAD) == 0
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 60


class Ask(Payload, kind="ask", queue="q"):
    how: str


@pytest.mark.parametrize("how", ["acquire", "fetch", "gather", "transaction"])
async def test_a_job_that_times_out_while_it_waits_for_a_connection_says_so(redis_url, database_url, raw, how):
    app: App[None] = App(settings=settings_for(redis_url, database_url, database_connections=1))
    held, go = asyncio.Event(), asyncio.Event()

    @app.handler(timeout=30, max_attempts=1)
    async def hold(_: Job, ctx: Context) -> None:
        async with ctx.transaction(), ctx.database.acquire():
            held.set()
            await go.wait()

    @app.handler(timeout=0.3, max_attempts=1, backoff=Backoff(base=0.01))
    async def ask(payload: Ask, ctx: Context) -> None:
        match payload.how:
            case "acquire":
                async with ctx.database.acquire():
                    pass
            case "fetch":
                await ctx.database.fetchval("select 1")
            case "gather":
                await asyncio.gather(ctx.database.fetchval("select 1"), ctx.database.fetchval("select 1"))
            case "transaction":
                async with ctx.transaction():
                    pass

    async with app, working(app):
        await app.enqueue(Job())
        await held.wait()
        await app.enqueue(Ask(how=how))
        await eventually(lambda: raw.xlen(DEAD) == 1, 20)
        go.set()
        ((_, fields),) = raw.xrange(DEAD)
    what = "ctx.transaction()" if how == "transaction" else "ctx.database"
    error = fields["error"] if "error" in fields else fields[b"error"].decode()
    assert error.startswith("timed out after 0.3 s: waited "), error
    assert error.endswith(f" s for a connection of {what} (1 connections, all taken)"), error


async def test_waiting_ends_with_an_error_that_names_the_pool_and_the_log_says_it_once(
    database_url, monkeypatch, written
):
    monkeypatch.setattr(pools, "ACQUIRE_TIMEOUT", 0.3)
    monkeypatch.setattr(pools, "NOTICE", 0.1)
    async with NamedPool(database_url, what="ctx.database", size=2, pressure=Pressure()) as pool:
        async with pool.acquire(), pool.acquire():
            for _ in range(2):
                with pytest.raises(
                    NoConnection, match=r"waited [0-9.]+ s for a connection of ctx.database \(2 connections, all"
                ):
                    await pool.fetchval("select 1")
        assert await pool.fetchval("select 1") == 1
    (line,) = written("database_waiting")
    assert "STREAMWORKER_DATABASE_CONNECTIONS" in line["hint"]


async def test_how_many_connections_a_worker_opens_at_most(redis_url, database_url, raw, pg):
    settings = settings_for(redis_url, database_url, concurrency=50, database_connections=2, relay="on")
    app: App[None] = App(settings=settings)
    most = 0
    others = f"pid <> pg_backend_pid() and application_name <> '{CLEANER}'"

    @app.handler(timeout=20)
    async def handler(_: Job, ctx: Context) -> None:
        async with ctx.transaction() as connection, ctx.database.acquire() as other:
            await connection.fetchval("select pg_sleep(0.01)")
            await other.fetchval("select pg_sleep(0.01)")

    async def ended() -> bool:
        nonlocal most
        count = f"select count(*) from pg_stat_activity where datname = current_database() and {others}"
        most = max(most, await pg.fetchval(count))
        return not raw.xlen(Q)

    async with app, working(app):
        await app.enqueue_many([Job(n=n) for n in range(100)])
        await eventually(ended, 30)
    assert 4 < most <= most_connections(settings) == 12


@pytest.mark.parametrize("ledger", ["on", "off"])
async def test_handlers_queries_behind_a_pooler_with_and_without_a_ledger(
    redis_url, database_url, postgres, raw, ledger
):
    bouncer = PgBouncer(postgres, size=3)
    app: App[None] = App(
        settings=settings_for(redis_url, bouncer.url(name_of(database_url)), ledger=ledger, concurrency=30)
    )

    @app.handler(max_attempts=1)
    async def handler(payload: Job, ctx: Context) -> None:
        async with ctx.database.acquire() as connection:
            assert await connection.fetchval("select $1::int + 1", payload.n) == payload.n + 1
            assert await connection.fetchval("select $1::int + 2", payload.n) == payload.n + 2

    async def ended() -> bool:
        return not raw.xlen(Q)

    try:
        async with app, working(app):
            await app.enqueue_many([Job(n=n) for n in range(200)])
            await eventually(ended, 30)
    finally:
        bouncer.close()
    assert raw.xlen(DEAD) == 0


async def test_a_pooler_with_fewer_sessions_than_the_worker_wants(
    redis_url, database_url, postgres, raw, pg, monkeypatch, written
):
    """In session mode each connection keeps its session: the pools have to give theirs to each other."""
    monkeypatch.setattr(pools, "NOTICE", 1.2)
    bouncer = PgBouncer(postgres, mode="session", size=4)
    settings = settings_for(redis_url, bouncer.url(name_of(database_url)), concurrency=30, relay="on")
    app: App[None] = App(settings=settings)

    @app.handler(timeout=60, max_attempts=1)
    async def handler(_: Job, ctx: Context) -> None:
        async with ctx.transaction() as connection:
            await connection.fetchval("select pg_sleep(0.05)")
        await ctx.database.fetchval("select 1")

    async def ended() -> bool:
        return not raw.xlen(Q)

    try:
        async with app, working(app):
            await app.enqueue_many([Job(n=n) for n in range(100)])
            await eventually(ended, 60)
    finally:
        bouncer.close()
    assert raw.xlen(DEAD) == 0
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 100
    lines = written("database_waiting")
    assert lines
    assert all("gives no other" in line["reason"] and "pooler" in line["hint"] for line in lines)
    assert len(lines) == len({line["reason"].split("connection of")[1].split("(")[0] for line in lines}), (
        "each pool once"
    )


async def test_statement_mode_is_refused_with_what_to_do(database_url, postgres):
    bouncer = PgBouncer(postgres, mode="statement")
    try:
        with pytest.raises(ConfigurationError, match="statement mode.*transaction"):
            await open_database(bouncer.url(name_of(database_url)))
        pool = NamedPool(bouncer.url(name_of(database_url)), what="ctx.database", size=1, pressure=Pressure())
        async with pool:
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError), match="statement pooling"):
                await pool.fetchval("select 1")
    finally:
        bouncer.close()


def test_without_a_ledger_only_handlers_connect():
    assert most_connections(Settings(ledger="off", database_connections=7)) == 7
    assert most_connections(Settings(database_url="postgresql://h/x", relay="off")) == 25
    assert most_connections(Settings(database_url="postgresql://h/x")) == 28


@pytest.mark.parametrize("mode", ["straight", "transaction", "session", "statement"])
async def test_check_tries_postgresql_as_a_worker_uses_it(redis_url, database_url, postgres, mode):
    settings = settings_for(redis_url, database_url, database_connections=3, relay="on")
    if mode == "straight":
        (found,) = await examine(settings, database_url)
        assert (found.severity, found.subject) == ("ok", "postgresql")
        assert found.sentence == "it answers directly; a worker opens up to 14 connections, and 14 are there"
        return
    bouncer = PgBouncer(postgres, mode=mode, size=4)
    try:
        found, *more = await examine(settings, bouncer.url(name_of(database_url)))
    finally:
        bouncer.close()
    match mode:
        case "transaction":
            assert (found.severity, "14 are there" in found.sentence) == ("ok", True)
            assert ["STREAMWORKER_DATABASE_DIRECT_URL" in each.sentence for each in more] == [True]
        case "session":
            assert found.severity == "warning"
            assert "gives 4 of the 14 connections" in found.sentence
            assert "default_pool_size" in found.sentence
        case "statement":
            assert found.severity == "error"
            assert "statement mode" in found.sentence


@pytest.mark.parametrize(("ledger", "severity"), [("on", "error"), ("auto", "warning"), ("off", None)])
async def test_check_says_that_the_schema_is_missing(redis_url, empty_database, ledger, severity):
    found = await examine(settings_for(redis_url, empty_database, ledger=ledger), empty_database)
    assert [(each.severity, "migrate up" in each.sentence) for each in found[1:]] == (
        [(severity, True)] if severity else []
    )


async def test_check_counts_what_max_connections_leaves(redis_url, database_url, pg):
    role, password = "few", "pw"
    await pg.execute(
        f"create role {role} login password '{password}' connection limit 5; grant pg_read_all_data to {role}"
    )
    try:
        url = database_url.replace("postgres@", f"{role}:{password}@", 1)
        found, *_ = await examine(settings_for(redis_url, url, database_connections=3, relay="off"), url)
    finally:
        await pg.execute(f"drop role {role}")
    assert found.severity == "warning", found
    assert "raise max_connections" in found.sentence


async def test_whatever_a_server_that_goes_makes_of_a_statement_is_an_outage(own_postgres):
    """Between its goodbye and the end of the connection there is a turn of the event loop or two, in which asyncpg knows neither."""
    said = set()
    for turns in range(8):
        connection = await asyncpg.connect(own_postgres.url())
        own_postgres.stop()
        for _ in range(turns):
            await asyncio.sleep(0)
        with pytest.raises(Exception, match="connection|state") as raised:
            await connection.fetchval("select 1")
        assert is_outage(raised.value), repr(raised.value)
        said.add(type(raised.value))
        own_postgres.start()
    assert {asyncpg.InterfaceError, asyncpg.InternalClientError} <= said
