"""The app and its worker together, on a real server, without any setting in the environment."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from streamworker import App, Context, Handlers, Payload, QueueWorker, Settings, Snooze
from streamworker.errors import ConfigurationError, UsageError
from streamworker.job import Job
from streamworker.observe import Sender
from streamworker.testing import drain
from tests.conftest import eventually
from tests.contract.helpers import settings


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


async def _wrong(call):
    """What a coroutine of the app says on an event loop of another thread."""
    with pytest.raises(UsageError) as caught:
        await asyncio.to_thread(lambda: asyncio.run(call()))
    return str(caught.value)


async def _enter(app):
    async with app:
        pass


CALLS = {
    "enqueue": lambda app: app.enqueue(Step(n=9)),
    "enqueue_many": lambda app: app.enqueue_many([Step(n=9), app.job(Step(n=9), delay=60)]),
    "cancel": lambda app: app.cancel("x", queue="steps"),
    "result": lambda app: app.result("x", queue="steps", timeout=1),
    "find": lambda app: app.find("x"),
    "enter": _enter,
}


@pytest.mark.parametrize("call", CALLS)
async def test_every_coroutine_of_an_app_refuses_another_event_loop(ground, redis_url, call):
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, ledger="off"))
    async with app:
        said = await _wrong(lambda: CALLS[call](app))
        assert said == "this app is open on another event loop: make an App per loop, or call enqueue_blocking()"
        assert (await app.enqueue(Step(n=1))).new  # its own loop is none the worse for it
    assert ground.left(queue="steps") == 1


async def test_an_app_belongs_to_its_loop_while_it_is_still_being_opened(redis_url, own_server):
    app = App(settings=Settings(redis_url=own_server.url))
    own_server.pause()
    opening = asyncio.create_task(app.__aenter__())
    try:
        await eventually(lambda: app._connection._entries == 1)
        assert "another event loop" in await _wrong(lambda: _enter(app))
        with pytest.raises(UsageError, match="not open"):
            await app.enqueue(Step(n=1))
    finally:
        own_server.resume()
    await opening
    assert (await app.enqueue(Step(n=1))).new
    await app.__aexit__()
    await asyncio.to_thread(lambda: asyncio.run(_enter(app)))  # closed, it is nobody's


async def test_asyncio_run_in_a_sync_handler_harms_no_other_job(ground, redis_url):
    app = App()
    made, notes = [], []

    class Note(Payload, kind="note", queue="notes"): ...

    class Wrong(Payload, kind="wrong", queue="work"): ...

    class Right(Payload, kind="right", queue="work"): ...

    @app.handler
    async def note(payload: Note) -> None:
        notes.append(1)

    @app.handler(max_attempts=1)
    def wrong(payload: Wrong) -> None:
        made.append(asyncio.run(app.enqueue(Note())))

    @app.handler(max_attempts=1)
    async def right(payload: Right) -> None:
        made.append(await app.enqueue(Note()))

    @app.handler(max_attempts=1)
    def blocking(payload: Step) -> None:
        async def library() -> None:  # sync code far below an event loop of its own
            made.append(app.enqueue_blocking(Note()))

        asyncio.run(library())

    settings = Settings(redis_url=redis_url, lease=1, mode=ground.mode, concurrency=3)
    async with App(settings=settings) as producer:
        await producer.enqueue_many([each for n in range(10) for each in (Wrong(), Right(), Step(n=n))])
    worker = QueueWorker(app, redis=redis_url, database=None, services=None, settings=settings)
    assert await worker.run(burst=True) == 0
    assert (len(made), len(notes)) == (20, 20)
    assert ground.raw.xlen("stream:{work}:dead") == 10


async def test_enqueue_blocking_works_from_any_thread_any_number_of_times(ground, redis_url):
    settings = Settings(redis_url=redis_url, mode=ground.mode)
    app = App(settings=settings)
    async with app:

        def many(n: int) -> list[bool]:
            return [app.enqueue_blocking(Step(n=n)).new for _ in range(20)]

        answers = await asyncio.gather(*(asyncio.to_thread(many, n) for n in range(8)))
        with pytest.raises(UsageError, match="await enqueue"):
            app.enqueue_blocking(Step(n=1))  # here there is a better way
    assert [new for each in answers for new in each] == [True] * 160
    assert ground.left(queue="steps") == 160


@pytest.mark.parametrize(
    ("module", "asks", "patched"),
    [
        ("gevent.monkey", "is_module_patched", "socket"),
        ("gevent.monkey", "is_module_patched", "threading"),
        ("eventlet.patcher", "is_monkey_patched", "thread"),
    ],
)
async def test_a_process_that_is_patched_is_refused_at_the_first_call(redis_url, monkeypatch, module, asks, patched):
    app = App(settings=Settings(redis_url=redis_url))
    worker = QueueWorker(app, redis=None, database=None, services=None)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{asks: lambda part: part == patched}))
    for call in (
        lambda: app.enqueue_blocking(Step(n=1)),
        lambda: asyncio.run(_enter(app)),
        lambda: asyncio.run(worker.run()),
    ):
        with pytest.raises(UsageError, match=f"{module.partition('.')[0]} has patched this process"):
            await asyncio.to_thread(call)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{asks: lambda part: False}))  # imported alone is no harm
    assert (await asyncio.to_thread(app.enqueue_blocking, Step(n=1))).new


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


class Late(Payload, kind="late", queue="late"):
    pass


async def test_nothing_can_be_added_while_a_worker_runs(raw, ground):
    """It has looked which queues, limits and batches there are: what comes later would run here in part, or never."""
    app, included = App(settings=settings(raw, ground)), Handlers[None]()
    app.include(included)

    @app.handler
    async def step(payload: Step) -> None: ...

    async def late(payload: Late) -> None: ...

    worker = QueueWorker(app, redis=None, database=None, services=None)

    class Other(Payload, kind="other", queue="others"):
        pass

    @included.handler  # made, and not started yet
    async def other(payload: Other) -> None: ...

    async def tried() -> None:
        for add, what in (
            (lambda: app.handler(late), "the handler .*late"),
            (lambda: included.handler(late), "the handler .*late"),
            (lambda: app.include(Handlers()), "a group of handlers"),
            (lambda: included.include(Handlers()), "a group of handlers"),
            (lambda: app.cron("@daily", Late()), "the schedule 'late'"),
        ):
            with pytest.raises(ConfigurationError, match=f"{what} comes after a worker of its app has started"):
                add()

    task = asyncio.create_task(worker.start())
    await eventually(lambda: raw.keys("streamworker:worker:*"))
    await tried()
    (heartbeat,) = raw.keys("streamworker:worker:*")
    assert raw.hget(heartbeat, "queues") == b"others,steps"
    await worker.stop()
    await task
    included.handler(late)
    assert app.queues == ["others", "late", "steps"]


async def test_jobs_of_a_generator_are_made_when_it_yields_them(ground, raw):
    """One moment stands for all jobs of a list; what a slow generator yields later was made later."""
    made: list[datetime] = []

    class Noted(Sender):
        @contextmanager
        def sending(self, jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
            made.extend(job.created_at for job in jobs)
            yield jobs

    def slow() -> Iterator[Step]:
        for n in range(2):
            before = datetime.now(UTC)
            while datetime.now(UTC) <= before:
                pass
            yield Step(n=n)

    async with App(settings=settings(raw, ground), observers=[Noted()]) as app:
        await app.enqueue_many(slow())
        await app.enqueue_many([Step(n=2), Step(n=3)])
    first, second, third, fourth = made
    assert first < second < third == fourth
