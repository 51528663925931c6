"""Objects of users that do harm where the worker touches them: it goes on, and says what can be said."""

from __future__ import annotations

import asyncio
import io
import json
import time
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamworker import App, Backoff, Context, Discard, Payload, QueueWorker, Retry, Settings
from streamworker.errors import JobDead, ResultNotKept
from streamworker.observe import JobRun, Observer
from streamworker.redact import MAX_CHARS
from streamworker.telemetry import logs

pytestmark = pytest.mark.mode_free

RAISED = {
    "exit": SystemExit(3), "interrupt": KeyboardInterrupt(), "close": GeneratorExit(), "depth": RecursionError(),
    "cancel": asyncio.CancelledError(), "value": ValueError("no"),
}  # fmt: skip


def hostile(how: str) -> type[Exception]:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise RAISED[how]

        __repr__ = __str__

        @property
        def reason(self) -> str:
            raise RAISED[how]

    return Hostile


class Hurt(Payload, kind="hurt", queue="q"):
    how: str
    where: str = "error"


class Broken(Payload, kind="broken", queue="q"):
    how: str = ""

    def __post_init__(self) -> None:
        if self.how:
            raise RAISED[self.how]


class Fine(Payload, kind="fine", queue="q"):
    pass


class BrokenDiscard(Discard):
    def __init__(self, how: str) -> None:
        self.how = how

    @property
    def reason(self) -> str:
        raise RAISED[self.how]

    def __str__(self) -> str:
        raise RAISED[self.how]


class BrokenRetry(Retry):
    def __init__(self, how: str) -> None:
        super().__init__(1)
        self.how = how

    def __str__(self) -> str:
        raise RAISED[self.how]


class Result(dict[str, Any]):
    def __init__(self, how: str) -> None:
        self.how = how

    def __iter__(self) -> Any:
        raise RAISED[self.how]

    keys = values = items = __iter__

    def __len__(self) -> int:
        raise RAISED[self.how]

    def __str__(self) -> str:
        raise RAISED[self.how]

    __repr__ = __str__


class Watching(Observer):
    """Looks at everything, and fails."""

    def on_outcome(self, run: JobRun) -> None:
        assert run.error is None or len(run.error) <= MAX_CHARS
        if run.exception is not None:
            raise run.exception

    on_dead = on_outcome

    def __repr__(self) -> str:
        raise SystemExit(3)


def misbehave(payload: Hurt, ctx: Context) -> Any:
    match payload.where:
        case "error":
            raise hostile(payload.how)("x")
        case "group":
            raise ExceptionGroup("g", [hostile(payload.how)(), ValueError("v")]) from hostile(payload.how)()
        case "discard":
            raise BrokenDiscard(payload.how)
        case "retry":
            raise BrokenRetry(payload.how)
        case "result":
            return Result(payload.how)
        case "object":
            return hostile(payload.how)()
        case "log":
            ctx.log.info("look", thing=hostile(payload.how)(), many={hostile(payload.how)(): 1}, services=ctx.services)
    return None


class Services:
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


@asynccontextmanager
async def services() -> Any:
    yield Services()


def app_of(ground: Any, redis_url: str, kind: str, *observers: Observer) -> App[Any]:
    app: App[Any] = App(
        settings=Settings(redis_url=redis_url, mode=ground.mode, lease=2), lifespan=services, observers=observers
    )
    options: dict[str, Any] = {"max_attempts": 1, "backoff": Backoff(base=0.01), "result_ttl": 60}
    if kind == "async":

        @app.handler(**options)
        async def hurt(payload: Hurt, ctx: Context) -> Any:
            return misbehave(payload, ctx)
    else:
        app.handler(**options)(misbehave)

    @app.handler(result_ttl=60)
    async def broken(payload: Broken) -> None: ...

    @app.handler(result_ttl=60)
    async def fine(payload: Fine) -> int:
        return 7

    return app


@pytest.fixture
def written() -> Any:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logs.configure("info", "json")


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("how", RAISED)
async def test_no_object_of_a_users_ends_the_worker(ground, redis_url, kind, how, written):
    app = app_of(ground, redis_url, kind, Watching())
    async with app:
        ids = {
            where: (await app.enqueue(Hurt(how=how, where=where))).id
            for where in ("error", "group", "discard", "retry", "result", "object", "log")
        }
        ground.push(json.dumps({"id": "broken", "kind": "broken", "payload": {"how": how}}))
        after = await app.enqueue(Fine())
        worker = QueueWorker(app, redis=None, database=None, services=None)
        await worker.run(burst=True)
        assert await app.result(after.id, timeout=10) == 7
        for where in ("error", "group", "discard", "retry"):
            with pytest.raises(JobDead):
                await app.result(ids[where], timeout=10)
        with pytest.raises(JobDead, match="broken"):
            await app.result("broken", timeout=10)
        with pytest.raises(ResultNotKept, match="cannot be written as JSON"):
            await app.result(ids["object"], timeout=10)
        assert await app.result(ids["result"], timeout=10) == {}
        assert await app.result(ids["log"], timeout=10) is None
    assert ground.empty()
    assert {"job_dead", "look", "observer_failed", "worker_stopped"} <= {line["event"] for line in written()}


async def test_a_huge_message_is_bounded_wherever_it_goes(ground, redis_url, raw, written):
    class Huge(Payload, kind="huge", queue="q"):
        wish: str = ""

    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=2))

    @app.handler(max_attempts=2, backoff=Backoff(base=0.01), result_ttl=60)
    async def huge(payload: Huge) -> None:
        text = "x" * 20_000_000
        if payload.wish == "discard":
            raise Discard(text)
        if payload.wish == "retry":
            raise Retry(0.01, text)
        raise ValueError(text) from KeyError(text)

    async with app:
        ids = [(await app.enqueue(Huge(wish=wish))).id for wish in ("", "discard", "retry")]
        worker = QueueWorker(app, redis=None, database=None, services=None)
        life = asyncio.create_task(worker.start())
        for job_id in ids:
            with pytest.raises(JobDead):
                await app.result(job_id, timeout=60)
        await worker.stop()
        await life
    letters = raw.xrange("stream:{q}:dead")
    assert len(letters) == 3
    assert max(len(fields[b"error"]) for _, fields in letters) <= MAX_CHARS
    assert max(len(json.dumps(line)) for line in written()) < 30_000


async def test_what_is_stored_of_an_error_holds_no_password_and_no_control(ground, redis_url, raw, written):
    class Leak(Payload, kind="leak", queue="q"):
        pass

    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=2))

    @app.handler(max_attempts=1, result_ttl=60)
    async def leak(payload: Leak) -> None:
        raise RuntimeError("no postgresql://shop:S3cr3t@db/shop\npassword='S3cr3t x' a\u202eb\x9b31mc\u2028d\x1b[2J")

    async with app:
        made = await app.enqueue(Leak())
        await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
        with pytest.raises(JobDead) as caught:
            await app.result(made.id, timeout=10)
    ((_, fields),) = raw.xrange("stream:{q}:dead")
    stored = fields[b"error"].decode()
    assert stored == ("RuntimeError: no postgresql://shop:***@db/shop\npassword=*** a\\u202eb\\x9b31mc\\u2028d\\x1b[2J")
    assert "S3cr3t" not in str(caught.value) + json.dumps(written())


async def test_a_slow_text_keeps_the_lease_and_is_read_a_few_times_at_most(ground, redis_url):
    read: list[float] = []

    class Slow(Exception):
        def __str__(self) -> str:
            read.append(time.monotonic())
            time.sleep(0.3)
            return "slow"

    class Job(Payload, kind="slow", queue="q"):
        pass

    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=0.5))

    @app.handler(max_attempts=1, result_ttl=60)
    async def slow(payload: Job) -> None:
        raise Slow

    async with app:
        made = await app.enqueue(Job())
        await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
        with pytest.raises(JobDead, match="Slow: slow"):
            await app.result(made.id, timeout=10)
    assert len(read) <= 3
