"""Ticks: ten workers propose each, whatever their clocks say, and one job comes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import anyio
import pytest

from streamworker import App, Context, Payload, QueueWorker, Settings
from streamworker.broker import Tick
from streamworker.clock import Clock
from tests.conftest import eventually
from tests.contract.helpers import names, one

CRON = "stream:{q}:cron"


class Report(Payload, kind="report", queue="q"):
    day: int = 0


def tick(at: float, name: str = "s", body: bytes | None = None) -> Tick:
    return Tick("q", "normal", name, at, json.dumps({"id": str(at), "payload": {}}).encode() if body is None else body)


def clock(broker, schedules, *, skew: float = 0.0, stopping: anyio.Event | None = None) -> Clock:
    return Clock(broker, schedules, Settings(), stopping or anyio.Event(), now=lambda: time.time() + skew)


def of(app: App) -> list[str]:
    return [each.key for each in app.schedules]


# -- the broker


async def test_a_tick_comes_once_and_only_after_its_moment(broker_factory, ground):
    async with broker_factory("w") as broker, broker_factory() as other:
        now = time.time()
        assert not (await broker.propose(tick(now - 100))).added  # the schedule begins with it
        early = await broker.propose(tick(now + 50))
        assert not early.added
        assert 40 < early.early <= 51
        assert abs(early.now - now) < 10
        answers = [await each.propose(tick(now - 10)) for each in (broker, other, broker)]
        assert [answer.added for answer in answers] == [True, False, False]
        assert not (await other.propose(tick(now - 20))).added  # older than the last
        assert not (await other.propose(tick(now - 5, body=b""))).added  # passes
        assert not (await other.propose(tick(now - 7))).added
        assert names([await one(broker)]) == [str(now - 10)]
        assert ground.ready() == 0


async def test_schedules_do_not_know_each_other(broker_factory, ground, redis_url):
    async with broker_factory("w") as broker:
        now = time.time()
        for name in ("a", "b"):
            await broker.propose(tick(now - 100, name))
            assert (await broker.propose(tick(now - 10, name))).added
        async with App(settings=Settings(redis_url=redis_url, mode=ground.mode)).operator() as operator:
            assert await operator.ticks("q") == {name: pytest.approx(now - 10, abs=0.01) for name in ("a", "b")}
            assert await operator.ticks("nothing") == {}


# -- the loop


async def test_ten_workers_with_wrong_clocks_make_one_job_a_tick(broker_factory, ground, raw):
    app = App()
    app.cron("* * * * * *", Report())
    stopping = anyio.Event()
    async with broker_factory("w") as broker, anyio.create_task_group() as group:
        for worker in range(10):
            skew = (worker - 5) * 700.0
            group.start_soon(clock(broker, app.schedules, skew=skew, stopping=stopping).run)
        await eventually(lambda: ground.ready() >= 3, 20)
        stopping.set()
    bodies = [json.loads(body) for body in ground.waiting()]
    moments = [body["headers"]["tick"] for body in bodies]
    assert len(set(moments)) == len(moments)
    assert len({body["id"] for body in bodies}) == len(bodies)
    assert sorted(moments) == moments


@pytest.mark.parametrize(("missed", "jobs"), [("last", 1), ("skip", 0)])
async def test_what_was_missed(broker_factory, ground, raw, missed, jobs):
    app = App()
    app.cron("@hourly", Report(), missed=missed)
    (key,) = of(app)
    now = time.time()
    if app.schedules[0].previous(now) > now - 120:
        pytest.skip("the hour has just begun: nothing is missed")
    raw.hset(CRON, key, int((now - 10 * 3600) * 1000))
    async with broker_factory("w") as broker:
        seconds = await clock(broker, app.schedules).step()
        assert ground.ready() == jobs
        assert 0 < seconds <= 60
        assert int(raw.hget(CRON, key)) == app.schedules[0].previous(now) * 1000
        await clock(broker, app.schedules).step()
        assert ground.ready() == jobs


async def test_a_new_schedule_catches_nothing_up_and_a_changed_one_begins_anew(broker_factory, ground, raw):
    async with broker_factory("w") as broker:
        for expression in ("@hourly", "@daily"):
            app = App()
            app.cron(expression, Report())
            await clock(broker, app.schedules).step()
            assert raw.hexists(CRON, of(app)[0])
        assert ground.ready() == 0


async def test_between_ticks_nothing_is_sent(broker_factory, raw):
    app = App()
    app.cron("@yearly", Report())
    async with broker_factory("w") as broker:
        quiet = clock(broker, app.schedules)
        await quiet.step()
        raw.config_resetstat()
        for _ in range(100):
            assert await quiet.step() <= 60
        assert "cmdstat_evalsha" not in raw.info("commandstats")


async def test_workers_do_it(ground, redis_url):
    """From `App.cron` to the handler, with three workers."""
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))
    app.cron("* * * * * *", Report(day=7), priority="high", headers={"by": "test"})
    seen: list[tuple[str, int]] = []

    @app.handler
    async def report(payload: Report, ctx: Context) -> None:
        headers = ctx.job.headers or {}
        assert (headers["by"], headers["cron"], ctx.job.level) == ("test", "report", "high")
        seen.append((headers["tick"], payload.day))

    workers = [QueueWorker(app, redis=None, database=None, services=None) for _ in range(3)]
    lives = [asyncio.create_task(worker.start()) for worker in workers]
    await eventually(lambda: len(seen) >= 2, 30)
    for worker in workers:
        await worker.stop()
    await asyncio.gather(*lives)
    assert set(Counter(seen).values()) == {1}
    assert {day for _, day in seen} == {7}
