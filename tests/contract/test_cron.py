"""Ticks: ten workers propose each, whatever their clocks say, and one job comes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from datetime import datetime

import anyio
import pytest

from streamworker import App, Context, Payload, QueueWorker, Settings
from streamworker.cron import Schedule, schedule
from streamworker.job import CronTick, CronTickResult
from streamworker.worker.scheduler import CronLoop
from tests.conftest import eventually
from tests.contract.helpers import names, one

CRON = "stream:{q}:cron"


class Report(Payload, kind="report", queue="q"):
    day: int = 0


def tick(at: float, name: str = "s", body: bytes | None = None) -> CronTick:
    return CronTick(
        "q", "normal", name, at, json.dumps({"id": str(at), "payload": {}}).encode() if body is None else body
    )


def clock(broker, schedules, *, skew: float = 0.0, stopping: anyio.Event | None = None) -> CronLoop:
    return CronLoop(broker, schedules, Settings(), stopping or anyio.Event(), now=lambda: time.time() + skew)


def of(app: App) -> list[str]:
    return [each.key for each in app.schedules]


# -- the broker


async def test_a_tick_comes_once_and_only_after_its_moment(broker_factory, ground):
    async with broker_factory("w") as broker, broker_factory() as other:
        now = time.time()
        assert not (await broker.offer_tick(tick(now - 100))).added  # the schedule begins with it
        early = await broker.offer_tick(tick(now + 50))
        assert not early.added
        assert 40 < early.early <= 51
        assert abs(early.now - now) < 10
        answers = [await each.offer_tick(tick(now - 10)) for each in (broker, other, broker)]
        assert [answer.added for answer in answers] == [True, False, False]
        assert not (await other.offer_tick(tick(now - 20))).added  # older than the last
        assert not (await other.offer_tick(tick(now - 5, body=b""))).added  # passes
        assert not (await other.offer_tick(tick(now - 7))).added
        assert names([await one(broker)]) == [str(now - 10)]
        assert ground.ready() == 0


async def test_schedules_do_not_know_each_other(broker_factory, ground, redis_url):
    async with broker_factory("w") as broker:
        now = time.time()
        for name in ("a", "b"):
            await broker.offer_tick(tick(now - 100, name))
            assert (await broker.offer_tick(tick(now - 10, name))).added
        async with App(settings=Settings(redis_url=redis_url, mode=ground.mode)).operator() as operator:
            assert await operator.ticks("q") == {name: pytest.approx(now - 10, abs=0.01) for name in ("a", "b")}
            assert await operator.ticks("nothing") == {}


# -- the loop


@pytest.mark.mode_free
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
    now = time.time()
    # Half an hour ago, whenever this runs: a moment that has just passed is not missed.
    app.cron(f"{(time.gmtime(now).tm_min + 30) % 60} * * * *", Report(), missed=missed)
    (key,) = of(app)
    assert now - 1900 < app.schedules[0].previous(now) < now - 1700
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


# -- what is lost, set back and rolled back meanwhile


def bound(
    schedule_name: str, expression: str, key: str, at: float, before: float | None, **options: object
) -> CronTick:
    """A proposal as a worker makes it."""
    body = json.dumps({"id": f"{key}/{at}", "payload": {}}).encode()
    return CronTick("q", "normal", f"{schedule_name} {expression} UTC", at, body, schedule_name, before, **options)


async def test_the_first_tick_after_redis_lost_everything_comes(broker_factory, ground, raw):
    """With ten minutes between ticks nothing but the worker's own memory can know that this one is owed."""
    async with broker_factory("w") as broker, broker_factory() as other:
        now = time.time()
        for each in (broker, other):
            assert not (await each.offer_tick(bound("s", "x", "a", now - 1200, None))).added
        raw.flushall()
        answers = [await each.offer_tick(bound("s", "x", "a", now - 600, now - 1200)) for each in (broker, other)]
        assert [answer.added for answer in answers] == [True, False]
        raw.flushall()  # what has ticked does not tick again
        assert not (await broker.offer_tick(bound("s", "x", "a", now - 600, now - 600))).added
        assert not (await other.offer_tick(bound("s", "x", "a", now - 600, None))).added  # nor for a worker that is new
        assert ground.ready() == 0
        assert raw.hlen(CRON) == 2


@pytest.mark.mode_free
async def test_living_workers_lose_no_tick_to_a_flush(broker_factory, ground, raw):
    app = App()
    app.cron("* * * * * *", Report())
    stopping = anyio.Event()
    async with broker_factory("w") as broker, anyio.create_task_group() as group:
        for skew in (0.0, -700.0, 700.0):
            group.start_soon(clock(broker, app.schedules, skew=skew, stopping=stopping).run)
        await eventually(lambda: ground.ready() >= 1, 20)
        raw.flushall()
        flushed = time.time()
        await eventually(lambda: ground.ready() >= 2, 20)
        stopping.set()
    moments = [datetime.fromisoformat(json.loads(body)["headers"]["tick"]).timestamp() for body in ground.waiting()]
    assert moments[0] <= flushed + 1  # the very first after it
    assert moments[1] == moments[0] + 1


@pytest.mark.mode_free
async def test_a_clock_that_is_put_back_stops_no_tick(broker_factory, ground):
    app = App()
    app.cron("* * * * * *", Report())
    shift = 0.0
    stopping = anyio.Event()
    async with broker_factory("w") as broker, anyio.create_task_group() as group:
        mine = CronLoop(broker, app.schedules, Settings(), stopping, now=lambda: time.time() + shift)
        group.start_soon(mine.run)
        await eventually(lambda: ground.ready() >= 1, 20)
        shift = -3600.0
        before = ground.ready()
        await eventually(lambda: ground.ready() >= before + 3, 20)
        assert abs(mine.now() - time.time()) < 30
        stopping.set()


@pytest.mark.mode_free
async def test_a_server_whose_clock_is_set_is_asked_again_within_a_minute(broker_factory):
    """Both ways; what is left to wait stays as long as it was."""
    app = App()
    for minute in range(3):
        app.cron(f"{minute} 3 * * *", Report(), name=str(minute))
    answers = [1_800_000_000.0]

    class Server:
        async def offer_tick(self, tick: CronTick) -> CronTickResult:
            return CronTickResult(0.0 if abs((tick.now or 0) - answers[0]) < 5 else 0.001, added=False, now=answers[0])

    for moved in (-86_400.0 * 40, +86_400.0 * 40):
        mine = clock(Server(), app.schedules)
        for _ in range(3):
            await mine.step()
            await anyio.sleep(0.06)
        assert 0 < await mine.step() <= 60
        answers[0] += moved
        mine._due = dict.fromkeys(mine._due, 0.0)  # a minute later
        for _ in range(4):
            assert 0 <= await mine.step() <= 60
            await anyio.sleep(0.06)
        assert 1 < await mine.step() <= 60
        assert abs(mine.now() - answers[0]) < 30


async def test_a_schedule_that_is_rolled_back_owes_nothing(broker_factory, ground, raw):
    """03:00 for a week, then 04:00 for a week, then 03:00 again: its last tick is a week old, and was not missed."""
    async with broker_factory("w") as broker:
        now = time.time()
        await broker.offer_tick(bound("s", "3", "a", now - 14 * 86_400, None))
        await broker.offer_tick(bound("s", "4", "b", now - 7 * 86_400, None))
        assert raw.hget(CRON, "s 3 UTC") is None
        raw.hset(CRON, "s 3 UTC", int((now - 14 * 86_400) * 1000))  # as releases before this one left it
        assert not (await broker.offer_tick(bound("s", "3", "c", now - 3600, None))).added
        assert (await broker.offer_tick(bound("s", "3", "c", now - 60, now - 3600))).added


async def test_of_two_releases_of_a_schedule_the_newer_one_ticks(broker_factory, ground, raw):
    async with broker_factory("old") as old, broker_factory("new") as new:
        now = time.time()
        await old.offer_tick(bound("s", "3", "a", now - 500, None))
        await new.offer_tick(bound("s", "4", "b", now - 400, None))
        assert not (await old.offer_tick(bound("s", "3", "a", now - 300, now - 500))).added
        assert (await new.offer_tick(bound("s", "4", "b", now - 200, now - 400))).added
        # The newer one is gone, as after a rollback that kept some old workers: they take over, from then on.
        raw.hset(CRON, "current:s", f"{int((now - 190) * 1000)} s 4 UTC")
        assert not (await old.offer_tick(bound("s", "3", "a", now - 195, now - 300))).added
        raw.hset(CRON, "current:s", f"{int((now - 190) * 1000)} s 4 UTC")
        assert (await old.offer_tick(bound("s", "3", "a", now - 100, now - 195))).added
        assert not (await new.offer_tick(bound("s", "4", "b", now - 90, now - 200))).added


async def test_what_a_failover_took_is_proposed_again(broker_factory, ground, raw):
    app = App()
    app.cron("@hourly", Report())
    async with broker_factory("w") as broker:
        mine = clock(broker, app.schedules)
        await mine.step()
        (key,) = of(app)
        raw.hset(CRON, key, int(raw.hget(CRON, key)) - 3_600_000)  # a replica that lagged
        mine._due = dict.fromkeys(mine._due, 0.0)  # a minute later
        await mine.step()
        assert ground.ready() == 1


@pytest.mark.mode_free
async def test_the_floor_between_proposals_holds_whatever_a_schedule_says():
    """No calendar may spin, not even one that says that its next tick lies in the past."""
    calls = []

    class Never(Schedule, frozen=True, eq=False):
        def next(self, now: float) -> float:
            return now - 1000

    class Server:
        async def offer_tick(self, tick: CronTick) -> CronTickResult:
            calls.append(tick)
            return CronTickResult(0.0, added=False, now=time.time())

    daily = schedule("30 2 * * *", Report(), tz="Europe/Berlin", missed="last", name=None)
    spinning = Never(daily.name, daily.expression, daily.zone, daily.missed, daily.job)
    with anyio.move_on_after(1.5):
        await clock(Server(), [spinning]).run()
    assert 1 <= len(calls) <= 3


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


@pytest.mark.mode_free
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
