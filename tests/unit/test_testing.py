"""streamworker.testing: bare contexts, runs without Redis, and the pytest plugin in a pytest of its own."""

import asyncio
import importlib.metadata
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamworker import App, Context, Discard, Payload, testing
from streamworker.errors import ConfigurationError, InvalidJob, UsageError

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.anyio

PLUGIN = "streamworker.testing.plugin"
# Loading it by name as well as by its entry point would register it twice.
LOADED = any(each.value == PLUGIN for each in importlib.metadata.entry_points(group="pytest11"))


class Add(Payload, kind="add", queue="sums"):
    a: int
    when: datetime | None = None


class AddInThread(Payload, kind="add.thread", queue="sums"):
    a: int


release = threading.Event()
"""Set when threads that nobody waits for may end."""


def make_app(**options: Any) -> App[Any]:
    app: App[Any] = App(**options)

    @app.handler(timeout=0.1)
    async def add(payload: Add, ctx: Context[Any]) -> Any:
        if payload.a < 0:
            raise ValueError(payload.a)
        if payload.a == 99:
            await asyncio.sleep(30)
        return payload.a, ctx.attempt, ctx.services, payload.when

    @app.handler(timeout=0.05)
    def add_in_thread(payload: AddInThread, ctx: Context[Any]) -> Any:
        # Number 1 looks whether it is cancelled, number 2 never does.
        while not release.is_set() and not (ctx.cancelled and payload.a == 1):
            time.sleep(0.005)
        return ctx.cancelled

    return app


# -- context


def test_a_context_is_what_a_worker_would_hand_over():
    ctx = testing.context(Add(a=1), services="smtp", redis="redis", database="pool")
    assert (ctx.services, ctx.redis, ctx.database) == ("smtp", "redis", "pool")
    assert (ctx.job.kind, ctx.job.queue, ctx.job.level) == ("add", "sums", "normal")
    assert (ctx.attempt, ctx.last_attempt, ctx.delivery, ctx.worker_id) == (1, False, 1, "worker-test")
    assert not ctx.cancelled and not ctx.stopping
    assert ctx.deadline is not None
    assert abs(ctx.deadline - datetime.now(UTC) - timedelta(seconds=300)) < timedelta(seconds=10)


def test_a_context_for_hard_times():
    ctx = testing.context(Add(a=1), attempt=3, max_attempts=3, delivery=2, timeout=None, cancelled=True, stopping=True)
    assert (ctx.attempt, ctx.last_attempt, ctx.delivery, ctx.deadline) == (3, True, 2, None)
    assert ctx.cancelled and ctx.stopping
    with pytest.raises(ConfigurationError, match=r"testing\.context"):
        _ = ctx.redis


def test_a_context_of_a_job_with_options():
    job = make_app().job(Add(a=1), priority="high", headers={"tenant": "t1"})
    ctx = testing.context(job)
    assert ctx.job.id == job.id and ctx.job.level == "high" and ctx.job.headers == {"tenant": "t1"}


@pytest.mark.parametrize("wrong", [{"attempt": 0}, {"delivery": 0}])
async def test_counts_begin_at_one(wrong: dict[str, int]):
    with pytest.raises(UsageError):
        testing.context(Add(a=1), **wrong)
    with pytest.raises(UsageError):
        await testing.run(make_app(), Add(a=1), **wrong)


# -- run


async def test_run_returns_what_the_handler_returned():
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    outcome = await testing.run(make_app(), Add(a=1, when=moment), services="s", attempt=4)
    assert outcome == testing.Ok((1, 4, "s", moment))


async def test_run_returns_what_the_handler_raised():
    outcome = await testing.run(make_app(), Add(a=-1))
    assert isinstance(outcome, testing.Raised) and isinstance(outcome.error, ValueError)


async def test_run_minds_the_timeout():
    assert isinstance(await testing.run(make_app(), Add(a=99)), testing.TimedOut)


async def test_a_thread_is_told_and_then_left_behind():
    assert await testing.run(make_app(), AddInThread(a=1)) == testing.Ok(True)
    try:
        assert isinstance(await testing.run(make_app(), AddInThread(a=2)), testing.TimedOut)
    finally:
        release.set()


async def test_run_goes_through_the_middleware():
    async def refuse(ctx: Context[Any], call_next: Callable[[], Awaitable[Any]]) -> Any:
        raise Discard(f"no {ctx.job.kind}")

    outcome = await testing.run(make_app(middleware=[refuse]), Add(a=1))
    assert isinstance(outcome, testing.Raised) and str(outcome.error) == "no add"


async def test_run_enters_the_lifespan_unless_services_are_given():
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[str]:
        seen.append("in")
        yield "from the lifespan"
        seen.append("out")

    app = make_app(lifespan=lifespan)
    assert await testing.run(app, Add(a=1)) == testing.Ok((1, 1, "from the lifespan", None))
    assert seen == ["in", "out"]
    assert await testing.run(app, Add(a=1), services="fake") == testing.Ok((1, 1, "fake", None))
    assert seen == ["in", "out"]


async def test_what_never_comes_to_run_has_its_outcome_too():
    class Unknown(Payload, kind="unknown", queue="sums"):
        a: str

    assert isinstance(await testing.run(make_app(), Unknown(a="x")), testing.UnknownKind)
    with pytest.raises(InvalidJob, match=r"Add\.a: Expected `int`, got `str`"):  # as enqueue() says
        await testing.run(make_app(), Add(a="x"))  # type: ignore[arg-type]
    foreign = msgspec.structs.replace(make_app().job(Add(a=1)), payload=msgspec.Raw(b'{"a":"x"}'))
    assert isinstance(await testing.run(make_app(), foreign), testing.Undecodable)
    assert isinstance(await testing.run(make_app(), Add(a=1), delivery=6), testing.Abandoned)
    later = make_app().job(Add(a=1), run_at=datetime.now(UTC) + timedelta(hours=1))
    assert isinstance(await testing.run(make_app(), later), testing.Postponed)


# -- the module


def test_every_name_is_there():
    for name in testing.__all__:
        assert getattr(testing, name) is not None and name in dir(testing)
    with pytest.raises(AttributeError):
        _ = testing.nothing


def test_the_plugin_itself_imports_nothing_heavy():
    # What streamworker/__init__.py imports is its own affair; a stub stands for it.
    code = (
        "import sys, types, pytest\n"
        "stub = types.ModuleType('streamworker'); stub.__path__ = [sys.argv[1]]; sys.modules['streamworker'] = stub\n"
        f"before = set(sys.modules); import {PLUGIN}\n"
        "print(*sorted(name for name in set(sys.modules) - before if not name.startswith('streamworker.testing')))"
    )
    package = str(Path(testing.__file__).parents[1])
    shown = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, check=True).stdout
    assert set(shown.split()) <= {"secrets", "hmac", "_hashlib", "base64", "binascii"}


# -- the plugin

MODULE = """
    from contextlib import asynccontextmanager
    from streamworker import App, Backoff, Context, Payload, Snooze

    class Count(Payload, kind="count", queue="counting"):
        n: int

    entered, seen = [], []

    @asynccontextmanager
    async def lifespan():
        entered.append(1)
        yield seen

    app = App(lifespan=lifespan)

    @app.handler(max_attempts=3, backoff=Backoff(base=100))
    async def count(payload: Count, ctx: Context[list[int]]) -> None:
        if payload.n == 100 or (payload.n == 101 and ctx.attempt < 3):
            raise ValueError(payload.n)
        if payload.n == 102 and ctx.job.hop == 0:
            raise Snooze(50)
        if payload.n == 103:
            raise Snooze(50)
        if payload.n == 104:
            await app.enqueue(Count(n=1))
        ctx.services.append(payload.n)
"""

TESTS = """
    import datetime
    import pytest
    import shop
    from shop import Count
    from streamworker import StreamworkerError

    pytestmark = pytest.mark.anyio
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)

    @pytest.fixture
    def anyio_backend():
        return "asyncio"

    @pytest.fixture(autouse=True)
    def fresh():
        shop.entered.clear()
        shop.seen.clear()

    @pytest.fixture
    def streamworker_app():
        return shop.app

    async def test_jobs_run_and_keys_are_this_tests_own(streamworker_live_app, drain):
        async with streamworker_live_app as app:
            assert app is shop.app
            await app.enqueue_many(Count(n=n) for n in range(5))
            drained = await drain(app)
        assert (drained.done, drained.failed, drained.delayed, drained.dead) == (5, 0, 0, 0)
        assert sorted(shop.seen) == [0, 1, 2, 3, 4]
        assert len(shop.entered) == 1

    async def test_nothing_is_left_of_the_test_before(streamworker_live_app, drain):
        async with streamworker_live_app as app:
            assert (await drain(app)).done == 0

    async def test_what_waits_is_left_alone_or_due_at_once(streamworker_live_app, drain):
        async with streamworker_live_app as app:
            for n in (100, 101, 102):
                await app.enqueue(Count(n=n))
            await app.enqueue(Count(n=7), delay=1000)
            await app.enqueue(Count(n=8), run_at=later)
            first = await drain(app)
            assert (first.done, first.failed, first.snoozed, first.delayed, first.dead) == (0, 2, 1, 5, 0)
            assert {str(error) for error in first.errors} == {"100", "101"}
            second = await drain(app, delayed=True)
            assert (second.done, second.failed, second.delayed, second.dead) == (4, 3, 0, 1)
        assert sorted(shop.seen) == [7, 8, 101, 102]
        assert len(shop.entered) == 2

    async def test_due_jobs_and_jobs_of_jobs_run(streamworker_live_app, drain):
        async with streamworker_live_app as app:
            await app.enqueue(Count(n=104))
            await app.enqueue(Count(n=5), delay=0.001)
            import time
            time.sleep(0.01)
            assert (await drain(app)).done == 3

    async def test_services_of_the_test(streamworker_live_app, drain):
        mine = []
        async with streamworker_live_app as app:
            await app.enqueue(Count(n=6))
            await drain(app, services=mine)
        assert (mine, shop.seen, shop.entered) == ([6], [], [])

    async def test_for_ever_is_too_long(streamworker_live_app, drain):
        async with streamworker_live_app as app:
            await app.enqueue(Count(n=103))
            with pytest.raises(StreamworkerError, match="not done within 0.5 s"):
                await drain(app, delayed=True, timeout=0.5)

    def test_sync_code_enqueues_there_too(streamworker_live_app, streamworker_settings):
        import redis
        streamworker_live_app.enqueue_blocking(Count(n=1))
        client = redis.Redis.from_url(streamworker_settings.redis_url)
        assert client.xlen(streamworker_settings.namespace + "stream:{counting}") == 1
        client.close()
"""


def test_the_plugin_in_a_users_project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    pytester.makepyfile(shop=MODULE, test_shop=TESTS, test_without="def test_it(streamworker_live_app): ...")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(pytester.path), *(path for path in sys.path if path)]))
    monkeypatch.setenv("REDIS_URL", "redis://192.0.2.1")  # nobody's; the plugin must not look there
    options = [] if LOADED else ["-p", PLUGIN]
    result = pytester.runpytest_subprocess(*options, "-p", "no:valkey", "-p", "no:cacheprovider", "-q", timeout=50)
    result.assert_outcomes(passed=7, errors=1)
    result.stdout.fnmatch_lines(["*define a fixture `streamworker_app` that returns your App*"])
