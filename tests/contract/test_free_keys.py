"""A deduplication key is free once its job was ended by hand; however that was, and by nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from streamworker import App, Context, Discard, Payload, Retry
from streamworker.broker import Operator
from tests.conftest import eventually
from tests.contract.helpers import settings, working

KEYS = ["meeting:7", "a \"quoted\" \\ key", "über\n\u2028 \U0001f600", "k" * 3000, "{}", "%b{}"]  # fmt: skip


class Remind(Payload, kind="remind", queue="q"):
    text: str = ""
    end: str = "well"


def app_of(raw: Any, ground: Any) -> App:
    app = App(settings=settings(raw, ground, lease=3, grace=0.2, concurrency=2))
    app.running = asyncio.Event()
    app.ended = []

    @app.handler(max_attempts=2)
    async def remind(payload: Remind, ctx: Context) -> None:
        app.running.set()
        if payload.end == "dead":
            raise Discard("why")
        if payload.end == "retry":
            raise Retry("later", after=3600)
        if payload.end == "hang":
            await asyncio.Event().wait()
        app.ended.append(ctx.job.id)

    return app


@pytest.fixture
async def app(raw, ground):
    app = app_of(raw, ground)
    async with app:
        yield app


async def is_free(app: App, key: str, was: str) -> bool:
    """Whether the key brings a new job now; else it must bring the old one."""
    again = await app.enqueue(Remind(), delay=7200, key=key)
    assert again.new == (again.id != was)
    return again.new


async def the_only(operator: Operator, listing: str) -> Any:
    found: list[Any] = []

    async def one() -> bool:
        found.clear()
        after: str | None = ""
        while after is not None:
            page = await getattr(operator, listing)("q", after)
            found.extend(page.rows)
            after = page.after
        return len(found) == 1

    await eventually(one)
    return found[0]


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
@pytest.mark.parametrize("end", ["cancel", "drop", "drop listed", "purge"])
async def test_of_a_delayed_job(app, ground, key, end):
    first = await app.enqueue(Remind(), delay=3600, key=key)
    assert not await is_free(app, key, first.id)
    async with app.operator() as operator:
        if end == "cancel":
            assert await app.cancel(first.id) == "cancelled"
        elif end == "purge":
            assert await operator.purge("q", "delayed", 100) == 1
        else:
            row = await the_only(operator, "delayed")
            whole = await operator.delayed_job("q", row.handle) if end == "drop" else row
            assert await operator.forget(whole)
    assert ground.empty()
    assert await is_free(app, key, first.id)


@pytest.mark.parametrize("key", KEYS[:3], ids=range(3))
async def test_of_ready_jobs_that_are_purged(app, ground, key):
    first = await app.enqueue(Remind(), key=key)
    other = await app.enqueue(Remind(), key="other")
    async with app.operator() as operator:
        assert await operator.purge("q", "ready", 1) == 1
        assert await operator.purge("q", "ready", 100) == 1
    assert await is_free(app, key, first.id)
    assert await is_free(app, "other", other.id)


async def test_of_waiting_and_running_jobs_that_are_cancelled(app, ground):
    """As soon as a worker has let them go."""
    running = await app.enqueue(Remind(end="hang"), key="running")
    async with working(app):
        await app.running.wait()
        assert await app.cancel(running.id) == "asked"
        await eventually(lambda: not ground.left())
        assert await is_free(app, "running", running.id)
    waiting = await app.enqueue(Remind(end="hang"), key="waiting")
    assert await app.cancel(waiting.id) == "asked"
    assert not await is_free(app, "waiting", waiting.id)
    async with working(app):
        await eventually(lambda: not ground.left())
        assert await is_free(app, "waiting", waiting.id)
    assert app.ended == []


@pytest.mark.parametrize("end", ["drop", "bury", "purge", "retry and drop"])
async def test_of_jobs_that_are_held_or_dead(app, ground, end):
    first = await app.enqueue(Remind(end="dead" if end != "bury" else "hang"), key="k")
    async with app.operator() as operator, working(app):
        if end == "bury":
            await app.running.wait()
            assert await operator.bury(await the_only(operator, "pending"), "by hand")
        letter = await the_only(operator, "dead")
        assert not await is_free(app, "k", first.id)  # nobody said that it shall not run any more
        if end == "retry and drop":
            assert await operator.replay(letter)
            letter = await the_only(operator, "dead")
        assert await (operator.purge("q", "dead", 10) if end == "purge" else operator.erase(letter))
        assert await is_free(app, "k", first.id)


async def test_of_pending_jobs_that_are_dropped(app, ground):
    first = await app.enqueue(Remind(end="hang"), key="k")
    async with app.operator() as operator, working(app):
        await app.running.wait()
        assert await operator.drop(await the_only(operator, "pending"))
        assert await is_free(app, "k", first.id)


async def test_of_a_job_that_waits_for_its_retry(app, ground):
    first = await app.enqueue(Remind(end="retry"), key="k")
    async with working(app):
        await eventually(lambda: ground.raw.exists("stream:{q}:due"))
    assert await app.cancel(first.id) == "cancelled"
    assert await is_free(app, "k", first.id)


async def test_another_jobs_key_is_left_alone(app, ground, raw):
    """It ran out or was freed, and another job has taken it since; or a producer wrote another job's key."""
    first = await app.enqueue(Remind(), delay=3600, key="k")
    raw.delete("stream:{q}:key:k")
    second = await app.enqueue(Remind(), delay=3600, key="k")
    assert second.new
    assert await app.cancel(first.id) == "cancelled"
    assert not await is_free(app, "k", second.id)
    ground.push(b'{"id":"x","key":"k","payload":{}}')
    ground.push(b'{"id":7,"key":["k"],"payload":{}}')
    async with app.operator() as operator:
        assert await operator.purge("q", "ready", 10) == 2
    assert not await is_free(app, "k", second.id)


async def test_an_end_by_itself_frees_no_key(app, ground):
    done = await app.enqueue(Remind(), key="done")
    async with working(app):
        await eventually(lambda: app.ended)
        await eventually(ground.empty)
    assert not await is_free(app, "done", done.id)


async def test_jobs_of_earlier_releases_have_no_key_in_them(app, ground, raw):
    """Their keys stay, and so do their documents."""
    ground.push(b'{"id":"old","kind":"remind","payload":{"end":"dead"}}')
    raw.set("stream:{q}:key:k", "old")
    async with app.operator() as operator, working(app):
        letter = await the_only(operator, "dead")
        assert await operator.erase(letter)
        assert not await operator.erase(letter)
    assert raw.get("stream:{q}:key:k") == b"old"
