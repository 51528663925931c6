"""Flows and signals on every library's connections: they are there if the caller's transaction commits, and not otherwise."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio.to_thread
import asyncpg
import pytest

from streamworker import App, Context, Flow, Payload, Settings, chain, group
from streamworker.encryption import Keys, new_key
from streamworker.errors import UsageError
from streamworker.postgres.enqueue import COPY_FROM
from tests.conftest import eventually
from tests.postgres.stacks import Stack, params
from tests.postgres.working import settings_for, working


class Step(Payload, kind="step", queue="q"):
    n: int = 0


@pytest.fixture
def app() -> App[None]:
    return App(settings=Settings())


@pytest.fixture(params=params())
def stack(request: Any) -> Stack:
    return request.param


@pytest.fixture
async def source(stack: Stack, database_url: str, pg: asyncpg.Connection) -> AsyncIterator[Any]:
    await pg.execute("create table effect (n integer)")
    async with stack.source(database_url) as source:
        yield source


async def start(app: App[Any], stack: Stack, given: Any, flow: Flow) -> Any:
    return app.start_blocking(flow, connection=given) if stack.blocking else await app.start(flow, connection=given)


async def signal(app: App[Any], stack: Stack, given: Any, *words: Any, **more: Any) -> bool:
    if stack.blocking:
        return app.signal_blocking(*words, connection=given, **more)
    return await app.signal(*words, connection=given, **more)


async def counts(pg: asyncpg.Connection) -> tuple[int, ...]:
    row = await pg.fetchrow(
        "select (select count(*) from streamworker.flows), (select count(*) from streamworker.flow_nodes where job_id is not null),"
        " (select count(*) from streamworker.flow_edges where condition <> 'end'), (select count(*) from streamworker.jobs),"
        " (select count(*) from streamworker.job_signals), (select count(*) from effect)"
    )
    return tuple(row)


@pytest.mark.parametrize("size", [3, COPY_FROM + 50], ids=["small", "large"])
async def test_a_flow_commits_or_vanishes_with_the_callers_rows(app, stack, source, pg, size):
    def flow(name: str) -> Flow:
        return chain(*(Step(n=n) for n in range(size)), name=name, key="1")

    async with stack.open(source) as given:
        await stack.execute(given, "insert into effect values (1)")
        answer = await start(app, stack, given, flow("gone"))
        assert answer.new
        assert await counts(pg) == (0, 0, 0, 0, 0, 0)
        await stack.rollback(given)
    assert await counts(pg) == (0, 0, 0, 0, 0, 0)
    async with stack.open(source) as given:
        await stack.execute(given, "insert into effect values (1)")
        answer = await start(app, stack, given, flow("there"))
        assert not (await start(app, stack, given, flow("there"))).new  # its key is taken, in this transaction too
        await stack.commit(given)
    assert await counts(pg) == (1, size, size - 1, size, 0, 1)
    assert await pg.fetchval("select id from streamworker.flows") == answer.id
    states = [
        tuple(row) for row in await pg.fetch("select status, count(*) from streamworker.jobs group by 1 order by 1")
    ]
    assert states == [("blocked", size - 1), ("queued", 1)]


async def test_a_savepoint_takes_its_flow_along(app, stack, source, pg):
    async with stack.open(source) as given:
        await start(app, stack, given, chain(Step(), name="kept"))
        with pytest.raises(ZeroDivisionError):
            async with stack.savepoint(given):
                await start(app, stack, given, group(Step(), Step(), name="gone"))
                raise ZeroDivisionError
        await stack.commit(given)
    assert await pg.fetchval("select array_agg(name) from streamworker.flows") == ["kept"]
    assert (await counts(pg))[:4] == (1, 1, 0, 1)


async def test_a_signal_commits_or_vanishes_with_the_callers_rows(app, stack, source, pg):
    async with stack.open(source) as given:
        assert await signal(app, stack, given, "job-1", "approved", {"by": "ann"}, queue="q")
        await stack.rollback(given)
    assert (await counts(pg))[4] == 0
    async with stack.open(source) as given:
        assert await signal(app, stack, given, "job-1", "approved", {"by": "ann"}, queue="q")
        assert not await signal(app, stack, given, "job-1", "approved", {"by": "bob"}, queue="q")
        await stack.commit(given)
    assert await pg.fetchval("select data->>'by' from streamworker.job_signals") == "ann"


async def test_the_other_kind_of_call_says_which_one(app, stack, source):
    async with stack.open(source) as given:
        with pytest.raises(UsageError, match=r"app.signal|psycopg|sqlalchemy|session|connection"):
            if stack.blocking:
                await app.signal("job-1", "go", connection=given, queue="q")
            else:
                app.signal_blocking("job-1", "go", connection=given, queue="q")


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
async def test_sync_code_sends_signals_of_its_own(redis_url, database_url, pg, sealed):
    """From a thread beside the worker's loop, from a sync handler, and from a script without any loop."""
    keys = Keys("k1", {"k1": new_key()}) if sealed else None
    app, got = App(settings=settings_for(redis_url, database_url, relay="on"), encryption=keys), []

    @app.handler
    async def step(payload: Step, ctx: Context) -> None:
        got.append((payload.n, await ctx.wait_for("go")))

    class Send(Payload, kind="send", queue="q"):
        to: str

    @app.handler
    def send(payload: Send) -> None:
        assert app.signal_blocking(payload.to, "go", "from a handler", queue="q")

    async with working(app), app:
        with pytest.raises(UsageError, match=r"signal_blocking\(\) would block this event loop: await signal\(\)"):
            app.signal_blocking("x", "go")
        jobs = [await app.enqueue(Step(n=n)) for n in range(3)]
        assert await anyio.to_thread.run_sync(lambda: app.signal_blocking(jobs[0].id, "go", {"by": 1}, queue="q"))
        await app.enqueue(Send(to=jobs[1].id))
        script = App(settings=settings_for(redis_url, database_url), encryption=keys)
        sent: list[bool] = []
        thread = threading.Thread(target=lambda: sent.append(script.signal_blocking(jobs[2].id, "go", None, queue="q")))
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        assert sent == [True]
        await eventually(lambda: len(got) == 3, timeout=30)
        assert not await anyio.to_thread.run_sync(lambda: app.signal_blocking(jobs[0].id, "go", 2))
    assert sorted(got) == [(0, {"by": 1}), (1, "from a handler"), (2, None)]
    stored = [
        row["data"] for row in await pg.fetch("select data::text from streamworker.job_signals where data is not null")
    ]
    assert all(("from a handler" in each or '"by"' in each) != sealed for each in stored)
