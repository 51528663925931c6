"""Schedules that are kept as data: put, changed and ticking at runtime, once, whoever dies and however many there are."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import anyio
import pytest

from streamworker import App, Context, Payload, QueueWorker, Settings
from streamworker.cron.stored import StoredSchedule, schedule_rows
from streamworker.errors import ConfigurationError, InvalidJob, UsageError
from streamworker.job import Job, ScheduleEntry
from streamworker.worker.scheduler import ScheduleLoop
from tests.conftest import eventually


class Report(Payload, kind="report", queue="q"):
    day: int = 0


def app_of(ground, redis_url: str) -> App:
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))

    @app.handler
    async def report(payload: Report) -> None: ...

    return app


def loop(store, process: str = "w", stopping: anyio.Event | None = None) -> ScheduleLoop:
    return ScheduleLoop(store, None, Settings(), stopping or anyio.Event(), process)


def overdue(raw, *names: str, by: float = 0.0) -> None:
    for name in names:
        raw.zadd("stream:{q}:schedules", {name: int((time.time() - by) * 1000)})  # never in the future


async def states(app: App) -> dict[str, tuple[str, float | None]]:
    return {each.stored.name: (each.stored.expression, each.next) async for each in app.schedules.list()}


async def test_put_change_pause_resume_and_remove(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app:
        app.cron("@daily", Report(), name="fixed")
        await app.schedules.put("nightly", "0 3 * * *", Report(day=1), tz="Europe/Berlin", by="ann", priority="low")
        state = await app.schedules.get("nightly")
        assert (state.stored.queue, state.stored.level, state.stored.by, state.known) == ("q", "low", "ann", True)
        assert state.next is not None
        assert 0 < state.next - time.time() <= 86_400
        assert [each.name for each in app.schedules] == ["fixed"]  # as a sequence, those in code

        overdue(raw, "nightly", by=5)
        before = (await app.schedules.get("nightly")).next
        await app.schedules.put("nightly", "0 3 * * *", Report(day=2), tz="Europe/Berlin")
        assert (await app.schedules.get("nightly")).next == before  # a deployment that puts it again misses no tick
        await app.schedules.edit("nightly", expression="@hourly", by="bob")
        assert (await app.schedules.get("nightly")).next != before

        assert await app.schedules.pause("nightly", by="ann")
        assert not await app.schedules.pause("nightly", by="bob")
        assert ((await app.schedules.get("nightly")).stored.paused, (await states(app))["nightly"][1]) == (
            "by ann",
            None,
        )
        await app.schedules.put("nightly", "@daily", Report())  # a deployment resumes nothing
        assert (await app.schedules.get("nightly")).next is None
        assert await app.schedules.resume("nightly")
        assert (await app.schedules.get("nightly")).next is not None
        assert ground.ready() == 0

        assert await app.schedules.remove("nightly")
        assert not await app.schedules.remove("nightly")
        assert await states(app) == {}
        with pytest.raises(UsageError, match="there is no schedule 'nightly'"):
            await app.schedules.pause("nightly")
        with pytest.raises(UsageError, match="the one of that name is code"):
            await app.schedules.pause("fixed")


async def test_what_makes_no_sense_is_refused_when_it_is_put(ground, redis_url):
    async with app_of(ground, redis_url) as app:
        app.cron("@daily", Report(), name="fixed")
        with pytest.raises(UsageError, match="is code"):
            await app.schedules.put("fixed", "@daily", Report())
        with pytest.raises(ConfigurationError, match="makes no sense"):
            await app.schedules.put("a", "every day", Report())
        with pytest.raises(ConfigurationError, match="is no time zone"):
            await app.schedules.put("a", "@daily", Report(), tz="Berlin/Europe")
        wrong = Job(**{**_fields(app.job(Report())), "payload": b'{"day": "monday"}'})
        with pytest.raises(InvalidJob, match="the payload is no Report"):
            await app.schedules.put("a", "@daily", wrong)
        await app.schedules.put("a", "@daily", Report())
        with pytest.raises(UsageError, match="on the queue q"):
            await app.schedules.put("a", "@daily", Report(), queue="other")
        assert list(await states(app)) == ["a"]


def _fields(job: Job) -> dict[str, object]:
    return {name: getattr(job, name) for name in job.__struct_fields__}


async def test_an_unknown_kind_says_so_and_ticks_all_the_same(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app:
        strange = Job(**{**_fields(app.job(Report())), "kind": "strange"})
        await app.schedules.put("odd", "@hourly", strange)
        async with app.operator() as operator:
            (row,) = [row async for row in schedule_rows(operator, app.schedules)]
            assert (row.owner, row.known, row.state) == ("data", False, "unknown kind")
            overdue(raw, "odd")
            await loop(operator.schedules).step()
        (body,) = ground.waiting()
        assert json.loads(body)["kind"] == "strange"


async def test_a_tick_comes_once_whoever_looks(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app, app.operator() as operator:
        await app.schedules.put("s", "@hourly", Report(day=3), headers={"by": "me"})
        overdue(raw, "s")
        store = operator.schedules
        first = await store.look("q", "a")
        assert [entry.name for entry in first.due] == ["s"]
        other = await store.look("q", "b")
        assert (other.due, 0 < (other.wait or 0) <= 2) == ([], True)  # until the first had the time to tick
        raw.delete("stream:{q}:schedules:timekeeper")  # it died, or was stopped for a while
        second = await store.look("q", "b")
        ticks = [loop(store)._tick(look.due[0], look.now) for look in (first, second)]
        assert await store.tick("q", [ticks[0]]) == [True]
        assert await store.tick("q", [ticks[1]]) == [False]
        assert await store.tick("q", [ticks[0]]) == [False]  # a repeat after a lost reply
        (body,) = ground.waiting()
        headers = json.loads(body)["headers"]
        assert (headers["by"], headers["cron"], "tick" in headers) == ("me", "s", True)
        state = await app.schedules.get("s")
        assert state.last == pytest.approx(time.time(), abs=3601)
        assert (state.next or 0) > time.time() - 1


async def test_a_change_between_look_and_tick_makes_the_tick_void(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app, app.operator() as operator:
        await app.schedules.put("s", "@hourly", Report(day=1))
        overdue(raw, "s")
        look = await operator.schedules.look("q", "a")
        tick = loop(operator.schedules)._tick(look.due[0], look.now)
        await app.schedules.edit("s", payload=json.dumps({"day": 2}).encode() and _raw({"day": 2}))
        assert await operator.schedules.tick("q", [tick]) == [False]
        await loop(operator.schedules, "b").step()
        (body,) = ground.waiting()
        assert json.loads(body)["payload"] == {"day": 2}
        await app.schedules.remove("s")
        assert await operator.schedules.tick("q", [tick]) == [False]
        assert ground.ready() == 1


def _raw(value):
    import msgspec

    return msgspec.Raw(json.dumps(value).encode())


async def test_missed_ticks(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app, app.operator() as operator:
        hours = f"{(time.gmtime().tm_min - 30) % 60} * * * *"  # the last tick was half an hour ago
        await app.schedules.put("last", hours, Report(day=1))
        await app.schedules.put("skip", hours, Report(day=2), missed="skip")
        overdue(raw, "last", "skip", by=5 * 3600)
        await loop(operator.schedules).step()
        assert [json.loads(body)["payload"]["day"] for body in ground.waiting()] == [1]  # one, though five were missed
        assert all(at is not None and at > time.time() for _, at in (await states(app)).values())


async def test_one_that_cannot_tick_here_holds_up_no_other(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app, app.operator() as operator:
        await app.schedules.put("good", "@hourly", Report())
        broken = StoredSchedule(name="bad", expression="@hourly", tz="Mars/Olympus", queue="q", kind="report")
        import msgspec

        entry = ScheduleEntry("q", "bad", msgspec.json.encode(broken), time.time() - 10)
        assert await operator.schedules.put(entry, b"", keep=False)
        overdue(raw, "good")
        await loop(operator.schedules).step()
        assert ground.ready() == 1
        assert (
            raw.zscore("stream:{q}:schedules", "bad") or 0
        ) > time.time() * 1000  # later, by a process that knows the zone


async def test_run_now_leaves_the_ticks_as_they_are(ground, redis_url):
    async with app_of(ground, redis_url) as app:
        await app.schedules.put("s", "@daily", Report(day=9))
        before = await states(app)
        ids = {await app.schedules.run_now("s") for _ in range(2)}
        assert len(ids) == ground.ready() == 2
        await app.schedules.pause("s")
        await app.schedules.run_now("s")
        assert ground.ready() == 3
        await app.schedules.resume("s")
        assert await states(app) == before


@pytest.mark.all
async def test_a_hundred_thousand_cost_one_look_and_one_timer_a_fleet(ground, redis_url, raw, monkeypatch):
    monkeypatch.setattr("streamworker.broker.schedules.LATE", 30.0)  # a step may take seconds on a busy machine
    async with app_of(ground, redis_url) as app, app.operator() as operator:
        await app.schedules.put("0", "@yearly", Report())
        definition = raw.hget("stream:{q}:schedules:defined", "0")
        later = (time.time() + 30) * 1000
        raw.eval(
            """for n = 0, 99999 do
                redis.call('ZADD', KEYS[1], ARGV[1] + n, n)
                redis.call('HSET', KEYS[2], n, (ARGV[2]:gsub('"0"', '"' .. n .. '"')))
            end""",
            *(2, "stream:{q}:schedules", "stream:{q}:schedules:defined", later, definition),
        )
        assert raw.zcard("stream:{q}:schedules") == raw.hlen("stream:{q}:schedules:defined") == 100_000
        fleet = [loop(operator.schedules, f"w{n}") for n in range(5)]
        raw.config_resetstat()
        waits = [await each.step() for each in fleet]
        assert 0 < min(waits) < max(waits) <= 61
        calls = raw.info("commandstats")
        assert calls["cmdstat_evalsha"]["calls"] == 5
        assert sum(stat["calls"] for name, stat in calls.items() if name.startswith("cmdstat_z")) <= 10
        assert "cmdstat_hgetall" not in calls
        overdue(raw, *(str(n) for n in range(450)))
        raw.delete("stream:{q}:schedules:timekeeper")
        while await fleet[0].step() == 0:
            assert await fleet[1].step() > 0  # nothing for the others meanwhile
        assert ground.ready() == 450


@pytest.mark.mode_free
async def test_workers_hear_of_a_change_and_one_takes_over_from_a_dead_one(ground, redis_url, raw):
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))
    seen: list[tuple[str, int]] = []

    @app.handler
    async def report(payload: Report, ctx: Context) -> None:
        seen.append(((ctx.job.headers or {})["tick"], payload.day))

    workers = [QueueWorker(app, redis=None, database=None, services=None) for _ in range(3)]
    lives = [asyncio.create_task(worker.start()) for worker in workers]
    async with app:
        for worker in workers:
            await worker.ready.wait()
        await app.schedules.put("s", "* * * * * *", Report(day=1))
        put = time.time()
        await eventually(lambda: len(seen) >= 2, 20)
        from datetime import datetime

        assert datetime.fromisoformat(seen[0][0]).timestamp() <= put + 2  # the first tick of all is there
        raw.set("stream:{q}:schedules:timekeeper", "a worker that was killed", px=2000)
        count = len(seen)
        await eventually(lambda: len(seen) >= count + 2, 20)
        await app.schedules.pause("s")
        await eventually(lambda: ground.ready() == 0, 20)
        await app.schedules.remove("s")
    for worker in workers:
        await worker.stop()
    await asyncio.gather(*lives)
    assert set(Counter(seen).values()) == {1}


@pytest.mark.mode_free
async def test_a_relay_ticks_where_no_worker_is(ground, redis_url):
    app = app_of(ground, redis_url)
    stopping = anyio.Event()
    async with app, app.relay_process() as relay, anyio.create_task_group() as group:
        group.start_soon(relay.run, stopping)
        await app.schedules.put("s", "* * * * * *", Report())
        await eventually(lambda: ground.ready() >= 2, 20)
        stopping.set()
