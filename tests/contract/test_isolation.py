"""What one job does to its task, its context and its timers reaches no other job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from weakref import WeakKeyDictionary

import anyio

from streamworker import App, Context, Payload
from tests.conftest import eventually
from tests.contract.helpers import settings, working


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
