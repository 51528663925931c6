"""What libraries keep by task, context or thread is a job's own: each with the real library, many jobs at once.

Django's connections: test_stacks.py. The context variables of streamworker itself: tests/lifecycle.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk
import sqlalchemy
from opentelemetry import baggage
from opentelemetry import context as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import get_current_span
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from streamworker import App, Context, Payload
from streamworker.otel import Tracing
from tests.conftest import eventually
from tests.postgres.working import settings_for, working

JOBS = 30


class Each(Payload, kind="each", queue="q"):
    n: int


class EachInThread(Payload, kind="thread", queue="q"):
    n: int


async def run_all(app: App[Any], raw: Any, payloads: list[Any]) -> None:
    """Enqueue, and run to the end with a worker that takes ten at a time."""
    async with app, working(app):
        await app.enqueue_many(payloads)
        await eventually(lambda: raw.xlen("stream:{q}") == 0 and not raw.exists("stream:{q}:due"))


@pytest.fixture
async def scoped(database_url: str, pg: Any) -> AsyncIterator[async_scoped_session[AsyncSession]]:
    await pg.execute("create table effect (n integer)")
    engine = create_async_engine(database_url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=20)
    yield async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
    await engine.dispose()


async def test_an_async_scoped_session_is_of_one_job(redis_url, raw, pg, scoped):
    """Half of the jobs fail, and leave their session as it is: nothing of it is committed by the jobs after them."""
    app = App(settings=settings_for(redis_url, None, ledger="off"))

    @app.handler(max_attempts=1)
    async def each(payload: Each) -> None:
        assert payload.n not in seen
        seen[payload.n] = session = scoped()
        await scoped.execute(sqlalchemy.text(f"insert into effect values ({payload.n})"))
        await asyncio.sleep(0.01)
        assert scoped() is session
        if payload.n % 2:
            raise ValueError("no")
        await scoped.commit()
        await scoped.remove()

    seen: dict[int, AsyncSession] = {}
    await run_all(app, raw, [Each(n=n) for n in range(JOBS)])
    assert len({id(session) for session in seen.values()}) == JOBS
    assert sorted(row["n"] for row in await pg.fetch("select n from effect")) == list(range(0, JOBS, 2))
    for session in seen.values():
        await session.close()


async def test_a_scoped_session_of_a_thread_that_is_removed_is_of_one_job(redis_url, database_url, raw, pg):
    await pg.execute("create table effect (n integer)")
    engine = sqlalchemy.create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"), pool_size=20)
    scoped: scoped_session[Session] = scoped_session(sessionmaker(engine))
    app = App(settings=settings_for(redis_url, None, ledger="off"))

    @app.handler(max_attempts=1)
    def each(payload: EachInThread) -> None:
        try:
            assert not scoped.registry.has()
            scoped.execute(sqlalchemy.text(f"insert into effect values ({payload.n})"))
            if payload.n % 2:
                raise ValueError("no")
            scoped.commit()
        finally:
            scoped.remove()

    await run_all(app, raw, [EachInThread(n=n) for n in range(JOBS)])
    assert sorted(row["n"] for row in await pg.fetch("select n from effect")) == list(range(0, JOBS, 2))
    engine.dispose()


@pytest.fixture
def sentry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The documented observer, and the events that Sentry would get."""
    monkeypatch.delenv("SENTRY_DSN", raising=False)
    path = Path(__file__).parents[2] / "examples/everyday/sentry.py"
    spec = importlib.util.spec_from_file_location("everyday_sentry", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    events: list[Any] = []
    before = sentry_sdk.get_client()
    spec.loader.exec_module(module)
    sentry_sdk.init(
        dsn="https://key@localhost/1",
        before_send=lambda event, hint: events.append(event),
        default_integrations=False,
        auto_enabling_integrations=False,
    )
    sentry_sdk.set_tag("program", "yes")  # before the worker: a scope that all jobs would share without the observer
    yield module.Sentry(), events
    sentry_sdk.get_client().close(timeout=0)
    sentry_sdk.get_global_scope().set_client(before)
    sentry_sdk.get_isolation_scope().clear()


@pytest.mark.parametrize("payload", [Each, EachInThread])
async def test_a_sentry_scope_is_of_one_job(redis_url, raw, sentry, payload):
    observer, events = sentry
    app = App(settings=settings_for(redis_url, None, ledger="off"), observers=[observer])
    barrier = threading.Barrier(5)

    @app.handler(max_attempts=1)
    async def each(payload: Each) -> None:
        sentry_sdk.set_tag(f"n{payload.n}", payload.n)
        sentry_sdk.add_breadcrumb(message=f"crumb {payload.n}")
        await asyncio.sleep(0.01)
        raise ValueError(payload.n)

    @app.handler(max_attempts=1)
    def in_thread(payload: EachInThread) -> None:
        sentry_sdk.set_tag(f"n{payload.n}", payload.n)
        sentry_sdk.add_breadcrumb(message=f"crumb {payload.n}")
        barrier.wait(10)
        raise ValueError(payload.n)

    await run_all(app, raw, [payload(n=n) for n in range(JOBS)])
    assert len(events) == JOBS
    for event in events:
        n = int(event["exception"]["values"][-1]["value"])
        assert event["tags"] == {"program": "yes", f"n{n}": n, "kind": payload.__kind__, "queue": "q"}
        assert [crumb["message"] for crumb in event["breadcrumbs"]["values"]] == [f"crumb {n}"]


@pytest.mark.parametrize("payload", [Each, EachInThread])
async def test_an_otel_context_is_of_one_job(redis_url, raw, payload):
    """A handler that attaches a context and never detaches it leaves it to no other job."""
    provider = TracerProvider()
    app = App(settings=settings_for(redis_url, None, ledger="off"), observers=[Tracing(tracer_provider=provider)])
    seen: list[tuple[int, Any, int]] = []

    def look(n: int) -> None:
        seen.append((n, dict(baggage.get_all()), get_current_span().get_span_context().span_id))
        otel.attach(baggage.set_baggage("n", str(n)))

    @app.handler
    async def each(payload: Each, ctx: Context) -> None:
        look(payload.n)
        await asyncio.sleep(0.005)
        assert baggage.get_baggage("n") == str(payload.n)

    @app.handler
    def in_thread(payload: EachInThread, ctx: Context) -> None:
        look(payload.n)
        assert baggage.get_baggage("n") == str(payload.n)

    await run_all(app, raw, [payload(n=n) for n in range(JOBS)])
    assert sorted(n for n, _, _ in seen) == list(range(JOBS))
    assert all(left == {} for _, left, _ in seen)
    spans = {span for _, _, span in seen}
    assert len(spans) == JOBS and 0 not in spans
    provider.shutdown()
