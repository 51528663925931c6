"""Every library's connections: a job commits or vanishes with the caller's rows, and a job's effects commit with its end."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import django.db
import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.db.transaction import TransactionManagementError
from sqlalchemy.ext.asyncio import async_scoped_session

from streamworker import App, Backoff, Context, Handlers, Payload, Settings
from streamworker.errors import ConfigurationError, RunEnded, Unreachable, UsageError
from streamworker.integrations.django import DjangoApp
from streamworker.loops import at_once
from streamworker.postgres import Effect
from streamworker.postgres.enqueue import COPY_FROM
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.pool import open_database
from tests.conftest import eventually
from tests.postgres.proxy import CuttingProxy
from tests.postgres.stacks import Asyncpg, AsyncSqlalchemy, Django, Stack, params
from tests.postgres.test_transaction import effects, job, run
from tests.postgres.working import settings_for, working


class Bill(Payload, kind="bill", queue="billing"):
    number: int = 0
    text: str = ""


SCOPED = ("sqlalchemy-scoped-asyncpg", "sqlalchemy-scoped-blocking")


@pytest.fixture
def app() -> App[None]:
    return App(settings=Settings())


@pytest.fixture(params=params())
def stack(request: Any) -> Stack:
    return request.param


@pytest.fixture
async def source(stack: Stack, database_url: str, pg: asyncpg.Connection) -> AsyncIterator[Any]:
    await pg.execute(
        "create table effect (n integer); create table once (n integer unique deferrable initially deferred)"
    )
    async with stack.source(database_url) as source:
        yield source


async def enqueue(app: App[Any], stack: Stack, given: Any, payload: Any, **options: Any) -> Any:
    if stack.blocking:
        return app.enqueue_blocking(payload, connection=given, **options)
    return await app.enqueue(payload, connection=given, **options)


async def numbers(pg: asyncpg.Connection) -> list[int]:
    rows = await pg.fetch(
        "select payload->>'number' as n from streamworker.jobs where status = 'queued' order by created_at, id"
    )
    return sorted(int(each["n"]) for each in rows)


# -- enqueue(connection=)


async def test_a_job_commits_or_vanishes_with_the_callers_rows(app, stack, source, pg):
    async with stack.open(source) as given:
        await stack.execute(given, "insert into effect values (1)")
        done = await enqueue(app, stack, given, Bill(number=1, text='100% $1 :x "ü"'), headers={"a": [1, None]})
        assert done.new and await numbers(pg) == []
        await stack.commit(given)
    assert (await numbers(pg), await effects(pg)) == ([1], [1])
    async with stack.open(source) as given:
        await enqueue(app, stack, given, Bill(number=2))
        await stack.execute(given, "insert into effect values (2)")
        await stack.rollback(given)
    assert (await numbers(pg), await effects(pg)) == ([1], [1])
    row = await pg.fetchrow("select * from streamworker.jobs")
    assert (row["id"], row["queue_name"], row["kind"], row["hop"]) == (done.id, "billing", "bill", 0)
    assert json.loads(row["payload"]) == {"number": 1, "text": '100% $1 :x "ü"'}
    assert json.loads(row["headers"]) == {"a": [1, None]}


async def test_a_savepoint_takes_its_jobs_along(app, stack, source, pg):
    async with stack.open(source) as given:
        await enqueue(app, stack, given, Bill(number=1))
        with pytest.raises(ZeroDivisionError):
            async with stack.savepoint(given):
                await enqueue(app, stack, given, Bill(number=2))
                raise ZeroDivisionError
        async with stack.savepoint(given):
            await enqueue(app, stack, given, Bill(number=3))
        await stack.commit(given)
    assert await numbers(pg) == [1, 3]


async def test_a_commit_that_fails_enqueues_nothing(app, stack, source, pg):
    with pytest.raises(stack.broken):
        async with stack.open(source) as given:
            await stack.execute(given, "insert into once values (1), (1)")
            await enqueue(app, stack, given, Bill(number=1))
            await stack.commit(given)
    assert await numbers(pg) == []


async def test_keys_delays_and_payloads_that_jsonb_cannot_hold(app, stack, source, pg):
    async with stack.open(source) as given:
        first = await enqueue(app, stack, given, Bill(number=1), key="k", delay=3600, priority="low")
        again = await enqueue(app, stack, given, Bill(number=2), key="k")
        odd = await enqueue(app, stack, given, Bill(number=3, text="a\x00b"))
        await stack.commit(given)
    assert (first.new, again.new, again.id == first.id, odd.new) == (True, False, True, True)
    rows = {
        each["id"]: each
        for each in await pg.fetch("select *, run_at > now() + interval '50 min' as later from streamworker.jobs")
    }
    assert set(rows) == {first.id, odd.id}
    assert (rows[first.id]["level"], rows[first.id]["later"]) == ("low", True)
    assert rows[odd.id]["payload"] is None and json.loads(rows[odd.id]["document"])["payload"]["text"] == "a\x00b"


@pytest.mark.parametrize("stack", params(only=lambda each: not each.blocking), indirect=True)
@pytest.mark.parametrize("count", [3, COPY_FROM + 5])
async def test_many_keep_their_options(app, stack, database_url, pg, count):
    jobs = [
        app.job(Bill(number=n, text="tab\t back\\slash \n ü"), **({"delay": 60} if n == 1 else {}))
        for n in range(count)
    ]
    async with stack.source(database_url) as source, stack.open(source) as given:
        answers = await app.enqueue_many(jobs, connection=given)
        assert await numbers(pg) == []
        await stack.commit(given)
    assert [each.id for each in answers] == [each.id for each in jobs]
    assert await numbers(pg) == list(range(count))
    assert await pg.fetchval("select count(*) from streamworker.jobs where run_at is not null") == 1
    assert await pg.fetchval("select distinct payload->>'text' from streamworker.jobs") == "tab\t back\\slash \n ü"


async def test_what_commits_by_itself_is_refused(app, stack, database_url, pg):
    async with stack.autocommitting(database_url) as given:
        with pytest.raises(UsageError, match="connection= needs a transaction that the job shares"):
            await enqueue(app, stack, given, Bill())
    assert await pg.fetchval("select count(*) from streamworker.jobs") == 0


async def test_a_database_without_the_schema_is_named(app, stack, empty_database):
    async with stack.source(empty_database) as source, stack.open(source) as given:
        with pytest.raises(ConfigurationError, match="run `streamworker migrate up` on it"):
            await enqueue(app, stack, given, Bill())
        await stack.rollback(given)


async def test_the_wrong_call_names_the_right_one(app, stack, source):
    async with stack.open(source) as given:
        if stack.blocking:
            with pytest.raises(UsageError, match=r"blocks: call app.enqueue_blocking\(\.\.\., connection="):
                await app.enqueue(Bill(), connection=given)
        else:
            with pytest.raises(UsageError, match=r"must be awaited: await app.enqueue\(\.\.\., connection="):
                app.enqueue_blocking(Bill(), connection=given)
        await stack.rollback(given)


@pytest.mark.parametrize("given", [object(), 5, "postgresql://", app], ids=["object", "int", "str", "function"])
async def test_what_is_no_connection_is_refused_in_a_sentence_that_names_what_is(given):
    app = App(settings=Settings())
    for refused in (
        lambda: at_once(app.enqueue(Bill(), connection=given)),
        lambda: app.enqueue_blocking(Bill(), connection=given),
    ):
        with pytest.raises(UsageError) as error:
            refused()
        for word in (type(given).__name__, "asyncpg", "psycopg", "SQLAlchemy", "Django", "select streamworker.enqueue"):
            assert word in str(error.value)


async def test_a_session_of_another_database_system_is_refused(app, tmp_path):
    import sqlalchemy
    from sqlalchemy.orm import Session

    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/x.db")
    with Session(engine) as session, pytest.raises(UsageError, match="leads to sqlite"):
        app.enqueue_blocking(Bill(), connection=session)
    engine.dispose()


async def test_a_session_inside_run_sync(app, database_url, pg):
    """What sync code gets that an AsyncSession calls: its own Session, on the event loop."""
    stack = AsyncSqlalchemy("asyncpg", "session")
    async with stack.source(database_url) as source, source() as session:
        await session.run_sync(lambda inner: app.enqueue_blocking(Bill(number=1), connection=inner))
        await session.commit()
    assert await numbers(pg) == [1]


def test_the_core_imports_none_of_the_libraries():
    code = """
import sys
import streamworker, streamworker.cli, streamworker.testing
from streamworker.worker import QueueWorker
import streamworker.postgres.ledger, streamworker.wiring
roots = {name.partition('.')[0] for name in sys.modules}
print(sorted(roots & {'sqlalchemy', 'psycopg', 'psycopg_pool', 'django', 'fastapi', 'pydantic'}))
print(sorted(name for name in sys.modules if name.startswith('streamworker.integrations')))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


# -- ctx.transaction(source) and ctx.complete(connection)


@pytest.fixture
async def ledger(database_url: str) -> AsyncIterator[PostgresLedger]:
    async with opened(database_url) as ledger:
        yield ledger


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[PostgresLedger]:
    database = await open_database(url)
    async with asyncpg.create_pool(url, min_size=0, max_size=2) as pool:
        yield PostgresLedger(database, pool, "worker-1")
        database.close()
        pool.terminate()


@asynccontextmanager
async def entered(transaction: Any) -> AsyncIterator[Any]:
    """A transaction of either sort; a blocking one in this very thread."""
    if hasattr(transaction, "__aenter__"):
        async with transaction as given:
            yield given
    else:
        with transaction as given:
            yield given


@pytest.mark.parametrize("stack", params(*SCOPED, "sqlalchemy-connection-blocking"), indirect=True)
async def test_the_writes_and_the_end_of_the_job_commit_together(stack, source, ledger, pg):
    transaction = ledger.transaction(run(), None, source)
    assert hasattr(transaction, "__aenter__") is not stack.blocking
    async with entered(transaction) as given:
        await stack.execute(given, "insert into effect values (1)")
        assert (await job(pg))["status"] is None
        assert transaction.effect is Effect.OPEN
    assert transaction.effect is Effect.COMMITTED
    assert (await effects(pg), (await job(pg))["status"]) == ([1], "completed")


@pytest.mark.parametrize("stack", params(*SCOPED), indirect=True)
async def test_an_error_undoes_all_of_it(stack, source, ledger, pg):
    transaction = ledger.transaction(run(), None, source)
    with pytest.raises(ValueError, match="no"):
        async with entered(transaction) as given:
            await stack.execute(given, "insert into effect values (1)")
            raise ValueError("no")
    assert transaction.effect is Effect.UNDONE
    assert await effects(pg) == [] and (await job(pg))["status"] is None


async def test_a_job_that_ended_is_not_begun(stack, source, ledger, pg):
    await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('a', 'q', 'completed')")
    transaction = ledger.transaction(run(), None, source)
    with pytest.raises(RunEnded):
        async with entered(transaction):
            pytest.fail("it must not begin")
    assert transaction.effect is Effect.ENDED


async def test_a_job_that_another_run_holds_comes_back_later(stack, source, ledger, pg):
    async with pg.transaction():
        await pg.execute("insert into streamworker.jobs (id, queue_name) values ('a', 'q')")
        transaction = ledger.transaction(run(), None, source)
        with pytest.raises(RunEnded):
            async with entered(transaction):
                pytest.fail("it must not begin")
    assert transaction.effect is Effect.BUSY


async def test_a_commit_that_fails_undoes_all_of_it(stack, source, ledger, pg):
    transaction = ledger.transaction(run(), None, source)
    with pytest.raises(stack.broken):
        async with entered(transaction) as given:
            await stack.execute(given, "insert into effect values (1)")
            await stack.execute(given, "insert into once values (1), (1)")
    assert transaction.effect is Effect.UNDONE
    assert await effects(pg) == [] and (await job(pg))["status"] is None


async def test_a_savepoint_inside_is_undone_alone(stack, source, ledger, pg):
    transaction = ledger.transaction(run(), None, source)
    async with entered(transaction) as given:
        await stack.execute(given, "insert into effect values (1)")
        with pytest.raises(ZeroDivisionError):
            async with stack.savepoint(given):
                await stack.execute(given, "insert into effect values (2)")
                raise ZeroDivisionError
        async with stack.savepoint(given):
            await stack.execute(given, "insert into effect values (3)")
    assert (await effects(pg), (await job(pg))["status"]) == ([1, 3], "completed")


async def test_a_commit_inside_the_block_is_a_mistake(stack, source, ledger, pg):
    """Also where the library begins the next transaction by itself: the job is not completed apart from its writes."""
    transaction = ledger.transaction(run(), None, source)
    # psycopg and Django refuse it in their own words, before anything is committed.
    by_library = stack.name.startswith(("psycopg", "django"))
    with pytest.raises(
        (psycopg.ProgrammingError, TransactionManagementError) if by_library else UsageError,
        match="Transaction context|when an 'atomic' block is active" if by_library else "inside the block",
    ):
        async with entered(transaction) as given:
            await (stack.execute(given, "commit") if isinstance(stack, Asyncpg) else stack.commit(given))
            await stack.execute(given, "insert into effect values (1)")
    assert transaction.effect is Effect.UNDONE
    assert (await job(pg))["status"] == (None if by_library else "running")
    if not isinstance(stack, Asyncpg):  # what was written after the commit is undone
        assert await effects(pg) == []


@pytest.mark.parametrize("cut", ["reply", "request"])
async def test_a_commit_whose_answer_is_lost_is_looked_up(stack, database_url, ledger, pg, cut):
    await pg.execute("create table effect (n integer)")
    async with CuttingProxy(database_url) as proxy, stack.source(proxy.url) as source:
        transaction = ledger.transaction(run(), None, source)

        async def work() -> None:
            async with entered(transaction) as given:
                await stack.execute(given, "insert into effect values (1)")
                proxy.cut(b"COMMIT", after=cut == "reply")

        async def done() -> None:
            await (asyncio.to_thread(at_once, work()) if stack.blocking else work())

        if cut == "reply":
            await done()
            assert transaction.effect is Effect.COMMITTED
            assert (await effects(pg), (await job(pg))["status"]) == ([1], "completed")
        else:
            with pytest.raises(Unreachable):
                await done()
            assert transaction.effect is Effect.LOST
            assert await effects(pg) == [] and (await job(pg))["status"] is None
        assert proxy.cuts == 1


async def test_a_server_that_is_away_releases_the_job(stack, ledger, monkeypatch):
    monkeypatch.setattr(stack, "patience", 0.3)
    url = "postgresql://nobody@127.0.0.1:1/nowhere"
    async with stack.source(url) as source:
        transaction = ledger.transaction(run(), None, source)
        with pytest.raises(Unreachable):
            async with entered(transaction):
                pytest.fail("it must not begin")
    assert transaction.effect is Effect.LOST


async def test_complete_in_the_users_own_transaction(stack, source, ledger, pg):
    for commits in (False, True):
        async with stack.open(source) as given:
            await stack.execute(given, "insert into effect values (1)")
            work = ledger.complete(run(), given, blocking=stack.blocking)
            await work
            assert (await job(pg))["status"] is None
            await (stack.commit if commits else stack.rollback)(given)
        assert (await job(pg))["status"] == ("completed" if commits else None)
    assert await effects(pg) == [1]
    async with stack.open(source) as given:
        with pytest.raises(RunEnded):
            await ledger.complete(run(), given, blocking=stack.blocking)
        await stack.rollback(given)


@pytest.mark.parametrize("stack", params(only=lambda each: not each.blocking), indirect=True)  # what blocks cannot be
async def test_a_cancelled_handler_leaves_nothing_behind(stack, source, ledger, pg):
    transaction = ledger.transaction(run(), None, source)

    async def handler() -> None:
        async with transaction as given:
            await stack.execute(given, "insert into effect values (1)")
            await stack.execute(given, "select pg_sleep(60)")

    task = asyncio.create_task(handler())
    # PostgreSQL ignores a request to cancel what it has not begun: its reader would sleep on, whatever the driver does.
    begun = "select count(*) = 1 from pg_stat_activity where wait_event = 'PgSleep' and query like '%pg_sleep(60)'"
    await eventually(lambda: pg.fetchval(begun))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transaction.effect is Effect.UNDONE
    assert await effects(pg) == []
    await eventually(
        lambda: pg.fetchval(
            "select count(*) = 0 from pg_stat_activity where state like 'idle in transaction%' or query like '%pg_sleep(60)'"
        )
    )


@pytest.mark.parametrize("source", [5, "postgresql://", object()], ids=["int", "str", "object"])
async def test_what_has_no_connections_is_refused_in_a_sentence_that_names_what_has(ledger, source):
    with pytest.raises(UsageError, match="sessionmaker or an engine of SQLAlchemy, a pool of asyncpg or psycopg"):
        ledger.transaction(run(), None, source)


# -- in a worker


class Write(Payload, kind="write", queue="q"):
    n: int


class Finish(Payload, kind="finish", queue="q"):
    n: int


def insert(stack: Stack, given: Any, payload: Any) -> Any:
    return stack.execute(given, f"insert into effect values ({payload.n})")


OPTIONS: Any = {"max_attempts": 3, "backoff": Backoff(base=0.1, jitter=0)}


def blocking_handlers(app: App[Any], stack: Stack, source: Any) -> None:
    @app.handler(**OPTIONS)
    def write(payload: Write, ctx: Context) -> None:
        with ctx.transaction(source) as given:
            at_once(insert(stack, given, payload))
            if ctx.attempt == 1:
                raise ValueError("no")
        raise ValueError("too late")

    @app.handler(**OPTIONS)
    def finish(payload: Finish, ctx: Context) -> None:
        async def whole() -> None:
            async with stack.open(source) as given:
                await insert(stack, given, payload)
                ctx.complete_blocking(given)
                await stack.commit(given)

        at_once(whole())
        if ctx.attempt == 1:
            raise ValueError("too late")


def async_handlers(app: App[Any], stack: Stack, source: Any) -> None:
    @app.handler(**OPTIONS)
    async def write(payload: Write, ctx: Context) -> None:
        async with ctx.transaction(source) as given:
            await insert(stack, given, payload)
            if ctx.attempt == 1:
                raise ValueError("no")
        raise ValueError("too late")

    @app.handler(**OPTIONS)
    async def finish(payload: Finish, ctx: Context) -> None:
        async with stack.open(source) as given:
            await insert(stack, given, payload)
            await ctx.complete(given)
            await stack.commit(given)
        if ctx.attempt == 1:
            raise ValueError("too late")


@pytest.mark.parametrize("stack", params(*SCOPED), indirect=True)
async def test_a_workers_handlers_write_once(stack, source, redis_url, database_url, raw, pg):
    """One attempt fails inside the block; another after it has committed: each job has its row, once."""
    app = App(settings=settings_for(redis_url, database_url, relay="on"))
    (blocking_handlers if stack.blocking else async_handlers)(app, stack, source)
    async with stack.open(source) as given:
        for payload in (Write(n=1), Finish(n=2)):
            await enqueue(app, stack, given, payload)
        await stack.commit(given)
    async with working(app):
        await eventually(lambda: pg.fetchval("select count(*) = 2 from streamworker.jobs where status = 'completed'"))
        await eventually(lambda: raw.xlen("stream:{q}") == 0)
    assert await effects(pg) == [1, 2]
    if isinstance(source, async_scoped_session):
        assert not source.registry.registry  # no session of a job that has ended


# -- DjangoApp


async def test_djangos_connections_are_closed_after_each_job(redis_url, database_url, raw, pg):
    """Of a thread and of async handlers, whether they were registered with the app or with a group that it includes."""
    stack = Django()
    stack.configure(database_url)
    await pg.execute("create table effect (n integer)")
    app = DjangoApp(settings=settings_for(redis_url, None, ledger="off"))
    group = Handlers[Any]()
    pids = "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    before = {each["pid"] for each in await pg.fetch(pids)}
    seen: list[int] = []

    @app.handler(max_attempts=1)
    def write(payload: Write) -> None:
        with django.db.connection.cursor() as cursor:
            cursor.execute("insert into effect values (%s) returning pg_backend_pid()", [payload.n])
            seen.append(cursor.fetchone()[0])
        if payload.n == 2:
            raise ValueError("no")

    @group.handler
    async def finish(payload: Finish) -> None:
        await sync_to_async(write)(Write(n=payload.n))

    app.include(group)
    async with app, working(app):
        for payload in (Write(n=1), Write(n=2), Finish(n=3)):
            await app.enqueue(payload)
        await eventually(lambda: len(seen) == 3 and raw.xlen("stream:{q}") == 0)
        await eventually(lambda: same_sessions(pg, pids, before))
    assert await effects(pg) == [1, 2, 3]
    assert len(set(seen)) == 3 and not set(seen) & before


async def same_sessions(pg: asyncpg.Connection, pids: str, before: set[int]) -> bool:
    return {each["pid"] for each in await pg.fetch(pids)} == before
