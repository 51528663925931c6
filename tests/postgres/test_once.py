"""ctx.transaction() in a worker: whatever the handler does around it, its writes happen once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest

from streamworker import App, Backoff, Context, QueueWorker
from streamworker.errors import ConfigurationError, Unreachable
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working

Q = "stream:{q}"


@pytest.fixture
async def app(redis_url: str, database_url: str, pg: asyncpg.Connection) -> App[None]:
    await pg.execute("create table effect (job text, hop bigint)")
    return App(settings=settings_for(redis_url, database_url))


def put(raw: Any, job_id: str, **fields: Any) -> None:
    raw.xadd(Q, {"job": json.dumps({"id": job_id, "kind": "job", "payload": {}, **fields})})


async def ended(raw: Any) -> bool:
    return not any(raw.xlen(Q + level) for level in (":high", "", ":low")) and not raw.exists(f"{Q}:due")


async def effects(pg: asyncpg.Connection) -> list[str]:
    return [each["job"] for each in await pg.fetch("select job from effect order by job")]


async def statuses(pg: asyncpg.Connection) -> dict[str, str]:
    return {each["id"]: each["status"] for each in await pg.fetch("select id, status from streamworker.jobs")}


async def write(ctx: Context) -> None:
    async with ctx.transaction() as pg:
        await pg.execute("insert into effect values ($1, $2)", ctx.job.id, ctx.job.hop)


@pytest.mark.parametrize("afterwards", ["raises", "exits", "times out", "cancels itself", "returns"])
async def test_after_the_commit_the_job_is_done_whatever_the_handler_does(app, raw, pg, afterwards, caplog):
    @app.handler(timeout=0.3)
    async def handler(_: Job, ctx: Context) -> Any:
        await write(ctx)
        match afterwards:
            case "raises":
                raise ValueError("too late")
            case "exits":
                raise SystemExit(3)
            case "times out":
                await asyncio.sleep(60)
            case "cancels itself":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(60)
            case "returns":
                return {"n": 1}
        return None

    async with working(app) as worker:
        put(raw, "a")
        await eventually(lambda: ended(raw))
    assert await effects(pg) == ["a"] and await statuses(pg) == {"a": "completed"}
    assert worker._in_flight.counts.done == 1
    assert not raw.exists(f"{Q}:dead")
    assert ("failed_after_commit" in caplog.text) == (afterwards != "returns")
    if afterwards == "returns":
        assert json.loads(await pg.fetchval("select result from streamworker.jobs")) == {"n": 1}
    assert await pg.fetchval("select outcome from streamworker.job_logs") == "ok"


async def test_a_failed_attempt_writes_nothing_and_the_next_one_does(app, raw, pg):
    @app.handler(max_attempts=3, backoff=Backoff(base=0.3, jitter=0))
    async def handler(_: Job, ctx: Context) -> None:
        async with ctx.transaction() as connection:
            await connection.execute("insert into effect values ($1, $2)", ctx.job.id, ctx.job.hop)
            if ctx.attempt == 1:
                raise ValueError("no")

    async with working(app):
        put(raw, "a")
        await eventually(lambda: raw.zcard(f"{Q}:due"))
        assert await effects(pg) == [] and await statuses(pg) == {"a": "retrying"}
        await eventually(lambda: ended(raw))
    assert await effects(pg) == ["a"] and await statuses(pg) == {"a": "completed"}


async def test_once_a_run(app, raw, pg, caplog):
    @app.handler(max_attempts=1)
    async def handler(_: Job, ctx: Context) -> None:
        try:
            async with ctx.transaction():
                raise ValueError("no")
        except ValueError:
            await write(ctx)

    async with working(app):
        put(raw, "a")
        await eventually(lambda: ended(raw))
    assert await effects(pg) == []
    ((_, letter),) = raw.xrange(f"{Q}:dead")
    assert b"once in a run" in letter[b"error"]


async def test_busy_is_no_failure(app, raw, pg):
    """Another run of the job, here a session of ours, holds its row: the job comes back, and nothing is charged."""

    seen = []

    @app.handler(max_attempts=1)
    async def handler(_: Job, ctx: Context) -> None:
        try:
            await write(ctx)
        except Exception as error:
            seen.append(repr(error))  # handlers that catch errors must not see this one
        seen.append(str(ctx.attempt))

    await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('a', 'q', 'dispatched')")
    async with working(app):
        async with pg.transaction():
            await pg.execute("select * from streamworker.jobs for update")
            put(raw, "a")
            await eventually(lambda: raw.zcard(f"{Q}:due"))
            (body,) = raw.hvals(f"{Q}:bodies")
            assert json.loads(body).get("attempt_count", 0) == 0
        await eventually(lambda: ended(raw))
    assert await effects(pg) == ["a"] and seen == ["1"]


async def test_a_job_that_was_completed_meanwhile_is_done(app, raw, pg):
    """Looked up before it ran, completed by its twin before it wrote."""
    inside, go, after = asyncio.Event(), asyncio.Event(), []

    @app.handler(max_attempts=1)
    async def handler(_: Job, ctx: Context) -> None:
        inside.set()
        await go.wait()
        await write(ctx)
        after.append(ctx.job.id)

    async with working(app) as worker:
        put(raw, "a")
        await inside.wait()
        await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('a', 'q', 'completed')")
        go.set()
        await eventually(lambda: ended(raw))
        assert worker._in_flight.counts.skipped == 1
    assert await effects(pg) == [] and after == [] and not raw.exists(f"{Q}:dead")


@pytest.mark.parametrize("fails", [False, True])
async def test_complete_in_the_users_own_transaction(app, raw, pg, fails):
    @app.handler(max_attempts=1)
    async def handler(_: Job, ctx: Context) -> None:
        async with ctx.database.acquire() as connection, connection.transaction():
            await connection.execute("insert into effect values ($1, 0)", ctx.job.id)
            await ctx.complete(connection)
        if fails:
            raise ValueError("too late")

    async with working(app) as worker:
        put(raw, "a")
        await eventually(lambda: ended(raw))
    assert await effects(pg) == ["a"] and await statuses(pg) == {"a": "completed"}
    assert not raw.exists(f"{Q}:dead") and worker._in_flight.counts.done == 1


async def test_ledger_and_users_pool(app, raw, pg, database_url):
    @app.handler
    async def handler(_: Job, ctx: Context) -> None:
        assert ctx.database is pool
        await write(ctx)

    async with asyncpg.create_pool(database_url, min_size=0, max_size=2) as pool, working(app, database=pool):
        for n in range(20):
            put(raw, f"job-{n}")
        await eventually(lambda: ended(raw))
    assert len(await effects(pg)) == 20


async def test_the_users_pool_alone(redis_url, raw, pg, app, database_url):
    """Without a URL the ledger uses the pool too, and leaves nothing behind in its sessions."""
    app = App(settings=settings_for(redis_url, None))

    @app.handler
    async def handler(_: Job, ctx: Context) -> None:
        await write(ctx)

    async with asyncpg.create_pool(database_url, min_size=0, max_size=3) as pool:
        async with working(app, database=pool):
            for n in range(20):
                put(raw, f"job-{n}")
            await eventually(lambda: ended(raw))
        assert await pool.fetchval("show enable_seqscan") == "on"
    assert len(await effects(pg)) == 20
    assert set((await statuses(pg)).values()) == {"completed"}


async def begin(app: App[Any], database: Any = None) -> None:
    worker = QueueWorker(app, redis=None, database=database, services=None)
    await worker.start()


async def test_a_pool_to_another_database_is_refused(app, database_url, empty_database):
    app.handler(_handler)
    async with asyncpg.create_pool(empty_database, min_size=0) as pool:
        with pytest.raises(ConfigurationError, match="different databases"):
            await begin(app, pool)


async def test_a_schema_that_is_not_there(redis_url, empty_database, raw, caplog):
    app: App[None] = App(settings=settings_for(redis_url, empty_database, ledger="on"))
    app.handler(_handler)
    with pytest.raises(ConfigurationError, match="streamworker migrate up") as caught:
        await begin(app)
    assert caught.value.exit_code == 78
    automatic: App[None] = App(settings=settings_for(redis_url, empty_database))
    automatic.handler(_handler)
    async with working(automatic):
        put(raw, "a")
        await eventually(lambda: ended(raw))
    assert caplog.text.count("ledger_off") == 1
    # Half a schema is no reason to work without one.
    connection = await asyncpg.connect(empty_database)
    await connection.execute("create schema streamworker; create table streamworker.jobs (id text)")
    await connection.close()
    with pytest.raises(ConfigurationError, match="older release"):
        await begin(automatic)


async def test_a_user_without_rights(redis_url, database_url, pg):
    await pg.execute("create role nobody login")
    try:
        app: App[None] = App(settings=settings_for(redis_url, database_url.replace("postgres@", "nobody@")))
        app.handler(_handler)
        with pytest.raises(ConfigurationError, match="permission denied|grant"):
            await begin(app)
    finally:
        await pg.execute("drop role nobody")


async def test_no_server(redis_url):
    app: App[None] = App(settings=settings_for(redis_url, "postgresql://u@127.0.0.1:1/x"))
    app.handler(_handler)
    with pytest.raises(Unreachable, match="does not answer") as caught:
        await begin(app)
    assert caught.value.exit_code == 69


async def test_off(redis_url, database_url, raw, pg):
    app: App[None] = App(settings=settings_for(redis_url, database_url, ledger="off"))
    errors = []

    @app.handler(max_attempts=1)
    async def handler(_: Job, ctx: Context) -> None:
        assert await ctx.database.fetchval("select 1") == 1
        try:
            ctx.transaction()
        except ConfigurationError as error:
            errors.append(str(error))

    async with working(app):
        put(raw, "a")
        await eventually(lambda: ended(raw))
    assert "DATABASE_URL" in errors[0]
    assert await statuses(pg) == {}


async def _handler(_: Job) -> None:
    pass
