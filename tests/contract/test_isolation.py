"""What one job does to its task, its context and its timers reaches no other job."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import pytest

from streamworker import App, Backoff, Context, Payload, QueueWorker
from streamworker import worker as worker_package
from streamworker.errors import StuckThread
from tests.conftest import eventually
from tests.contract.helpers import settings, working

pytestmark = pytest.mark.mode_free


class Step(Payload, kind="step", queue="q"):
    name: str


async def pages() -> AsyncIterator[int]:
    with anyio.fail_after(0.2):
        yield 1
        yield 2


async def test_what_a_failed_job_left_behind_reaches_no_other(ground, raw):
    """A timeout in a generator, a watchdog, and rows of a session that is kept by task."""
    app = App(settings=settings(raw, ground, concurrency=1))
    sessions: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()
    committed: list[str] = []
    attempts: list[tuple[str, int]] = []

    @app.handler(max_attempts=1)
    async def step(payload: Step, ctx: Context) -> None:
        attempts.append((payload.name, ctx.attempt))
        task = asyncio.current_task()
        assert task is not None
        session = sessions.setdefault(task, [])
        session.append(payload.name)
        if payload.name == "bad":
            async for _ in pages():
                break
            asyncio.get_running_loop().call_later(0.2, task.cancel)
            raise ValueError("never commit this")
        await asyncio.sleep(0.4)
        committed.extend(session)

    async with app, working(app):
        await app.enqueue_many([Step(name="bad"), Step(name="good")])
        await eventually(ground.empty)
    assert attempts == [("bad", 1), ("good", 1)]
    assert committed == ["good"]


async def test_a_job_that_others_cancel_runs_again_uncharged(ground, raw):
    app = App(settings=settings(raw, ground))
    tasks: list[asyncio.Task[Any]] = []
    attempts: list[tuple[int, int]] = []

    @app.handler(max_attempts=1)
    async def step(payload: Step, ctx: Context) -> None:
        attempts.append((ctx.attempt, ctx.job.hop))
        task = asyncio.current_task()
        assert task is not None
        if not tasks:
            tasks.append(task)
            await asyncio.sleep(100)

    async with app, working(app):
        await app.enqueue(Step(name="victim"))
        await eventually(lambda: tasks)
        tasks[0].cancel()
        await eventually(ground.empty)
    assert attempts == [(1, 0), (1, 1)]


@pytest.mark.parametrize("when", ["entering", "leaving"])
async def test_a_lifespan_that_does_not_end_is_an_error_of_start_and_stop_returns(ground, raw, monkeypatch, when):
    """In a process of the users' own, which only they may end."""
    monkeypatch.setattr(worker_package, "CLEAN_UP", 0.4)
    monkeypatch.setattr(worker_package, "LAST_CALL", 0.2)
    entered, let_go = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        entered.set()
        if when == "entering":
            await hang()
        yield
        await hang()

    app: App[None] = App(settings=settings(raw, ground, grace=0.0), lifespan=lifespan)

    @app.handler
    async def step(payload: Step) -> None: ...

    worker = QueueWorker(app, redis=None, database=None, services=None)
    life = asyncio.create_task(worker.start())
    await entered.wait()
    with anyio.fail_after(10):
        await worker.stop()
        with pytest.raises(StuckThread, match=r"in .*hang would not end"):
            await life
    let_go.set()
    await eventually(lambda: not any("QueueWorker" in repr(task) for task in asyncio.all_tasks()))


async def test_a_worker_that_is_stopped_while_it_starts_ends(ground, raw, monkeypatch):
    monkeypatch.setattr("streamworker.worker.LAST_CALL", 0.2)
    entered = asyncio.Event()

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        entered.set()
        await asyncio.sleep(100)
        yield

    app: App[None] = App(settings=settings(raw, ground), lifespan=lifespan)

    @app.handler
    async def step(payload: Step) -> None: ...

    worker = QueueWorker(app, redis=None, database=None, services=None)
    life = asyncio.create_task(worker.start())
    await entered.wait()
    with anyio.fail_after(10):
        await worker.stop()
        await life


async def test_a_job_never_runs_beside_its_own_call_in_a_thread(ground, raw):
    """`asyncio.to_thread` stops waiting at the timeout, and the thread goes on: the retry waits for it."""
    app = App(settings=settings(raw, ground, grace=20))
    let_go = threading.Event()
    ran: list[str] = []

    @app.handler(timeout=0.1, max_attempts=2, backoff=Backoff(base=0.01, jitter=0))
    async def step(payload: Step, ctx: Context) -> None:
        ran.append(f"{payload.name} {ctx.attempt}")
        if payload.name == "blocks" and ctx.attempt == 1:
            await asyncio.to_thread(let_go.wait, 20)

    async with app, working(app):
        await app.enqueue(Step(name="blocks"))
        await eventually(lambda: ran)
        await app.enqueue(Step(name="later"), delay=0.5)  # a retry would be due long before
        await eventually(lambda: "later 1" in ran)
        assert ran == ["blocks 1", "later 1"]
        let_go.set()
        await eventually(ground.empty)
    assert ran == ["blocks 1", "later 1", "blocks 2"]
