"""The app and its worker together, on a real server, without any setting in the environment."""

from __future__ import annotations

import asyncio

import pytest

from streamworker import App, Context, Payload, QueueWorker, Settings, Snooze
from streamworker.errors import UsageError
from streamworker.testing.draining import drain
from tests.conftest import eventually


class Step(Payload, kind="step", queue="steps"):
    n: int


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("REDIS_URL", "STREAMWORKER_REDIS_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("decoding", [False, True])
async def test_a_worker_lives_on_the_client_it_was_given_and_its_handlers_enqueue_there(ground, server, decoding):
    app = App()
    seen: list[tuple[int, object, object]] = []

    @app.handler
    async def step(payload: Step, ctx: Context) -> None:
        seen.append((payload.n, ctx.services, ctx.redis))
        if payload.n == 1:
            await app.enqueue(Step(n=2), delay=0.01)

    async with server.users_client(decode_responses=decoding) as client:
        ground.push('{"payload":{"n":1}}', queue="steps")
        settings = Settings(lease=1, mode=ground.mode)
        worker = QueueWorker(app, redis=client, database=None, services="post", settings=settings)
        task = asyncio.create_task(worker.start())
        try:
            await eventually(lambda: [n for n, _, _ in seen] == [1, 2], 5)
            assert {services for _, services, _ in seen} == {"post"}
            assert all(redis is client for _, _, redis in seen)
        finally:
            await worker.stop()
            await task
        assert await client.ping()  # what the user brought stays the user's


async def test_sync_handlers_enqueue_where_their_worker_is(ground, redis_url):
    app = App()
    seen: list[int] = []

    @app.handler
    def step(payload: Step) -> None:
        seen.append(payload.n)
        if payload.n < 3:
            app.enqueue_blocking(Step(n=payload.n + 1))

    worker = QueueWorker(
        app, redis=redis_url, database=None, services=None, settings=Settings(lease=1, mode=ground.mode)
    )
    task = asyncio.create_task(worker.start())
    try:
        async with App(settings=Settings(redis_url=redis_url, mode=ground.mode)) as producer:
            await producer.enqueue(Step(n=1))
        await eventually(lambda: seen == [1, 2, 3], 5)
    finally:
        await worker.stop()
        await task


async def test_enqueue_blocking_refuses_to_block_a_loop(redis_url):
    app = App(settings=Settings(redis_url=redis_url))
    with pytest.raises(UsageError, match="await enqueue"):
        app.enqueue_blocking(Step(n=1))


async def test_drain_runs_what_there_is_and_what_is_delayed(ground, redis_url):
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=1))
    seen: list[int] = []

    @app.handler
    async def step(payload: Step) -> None:
        seen.append(payload.n)
        if seen.count(3) == 1 and payload.n == 3:
            raise Snooze(60)

    async with app:
        await app.enqueue_many([Step(n=1), app.job(Step(n=2), delay=3600), Step(n=3)])
        drained = await drain(app)
        assert (sorted(seen), drained.done, drained.snoozed, drained.delayed) == ([1, 3], 1, 1, 2)
        drained = await drain(app, delayed=True)
        assert (sorted(seen), drained.done, drained.delayed) == ([1, 2, 3, 3], 2, 0)
    assert ground.held("steps") == ground.left(queue="steps") == 0
