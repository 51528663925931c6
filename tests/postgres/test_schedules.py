"""Schedules that are kept as data survive the loss of Redis: the ledger is their durable record."""

from __future__ import annotations

import time

import anyio
import msgspec
import pytest

from streamworker import App, Payload, Settings
from streamworker.broker.dispatcher import RedisDispatcher
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.redis.client import RedisAddress
from streamworker.cron.stored import ScheduleMirror
from streamworker.errors import Unreachable
from streamworker.postgres.outbox import PostgresOutbox
from streamworker.postgres.pool import open_database
from streamworker.worker.scheduler import ScheduleLoop
from tests.conftest import eventually


class Report(Payload, kind="report", queue="q"):
    day: int = 0


def app_of(redis_url, database_url, mode="stream") -> App:
    app = App(settings=Settings(redis_url=redis_url, database_url=database_url, mode=mode, lease=1))

    @app.handler
    async def report(payload: Report) -> None: ...

    return app


@pytest.fixture(params=[QueueKeys, ListKeys], ids=["stream", "list"])
async def dispatcher(request, redis_url):
    made = RedisDispatcher(RedisAddress(redis_url), request.param, group="workers", namespace="")
    yield made
    await made.close()


@pytest.fixture
def mode(dispatcher):
    return "list" if isinstance(dispatcher._keys("q"), ListKeys) else "stream"


OTHER_TURN = "update streamworker.schedule_looks set at = '-infinity'"


@pytest.fixture
async def mirror(dispatcher, database_url, pg):
    """``await mirror()``: what a relay does when it is its turn."""
    database = await open_database(database_url, name="test")
    made = ScheduleMirror(dispatcher.schedules, PostgresOutbox(database).schedules, anyio.Event())

    async def step(*, whole: bool = False) -> None:
        await pg.execute("delete from streamworker.schedule_looks" if whole else OTHER_TURN)
        await made.step()

    await step(whole=True)
    yield step
    database.close()


async def listed(app) -> dict[str, tuple[int, str]]:
    found = {}
    async for state in app.schedules.list():
        stored = state.stored
        found[stored.name] = (int(bytes(stored.payload).partition(b":")[2].strip(b" }")), stored.paused)
        assert (state.next is None) == bool(stored.paused)
    return found


async def kept(pg) -> dict[str, bool]:
    rows = await pg.fetch("select name, definition is not null as there from streamworker.schedules")
    return {row["name"]: row["there"] for row in rows}


async def test_flushall_loses_no_schedule(redis_url, database_url, raw, mode, mirror, pg):
    async with app_of(redis_url, database_url, mode) as app:
        await app.schedules.put("nightly", "0 3 * * *", Report(day=1))
        await app.schedules.put("paused", "@daily", Report(day=2))
        await app.schedules.pause("paused", by="ann")
        await app.schedules.put("gone", "@daily", Report(day=3))
        assert await app.schedules.remove("gone")
        assert await kept(pg) == {"nightly": True, "paused": True, "gone": False}
        before = await listed(app)
        raw.flushall()
        assert await listed(app) == {}
        await mirror()
        assert await listed(app) == before == {"nightly": (1, ""), "paused": (2, "by ann")}
        state = await app.schedules.get("nightly")
        assert state.next is not None
        assert 0 < state.next - time.time() <= 86_400
        raw.zadd("stream:{q}:schedules", {"nightly": round(time.time() * 1000) - 5})
        await ScheduleLoop(app._connection.broker().schedules, None, Settings(), anyio.Event(), "w").step()
        assert raw.xlen("stream:{q}") + raw.llen("queue:q") == 1  # and it ticks


async def test_a_relay_restores_them_by_itself(redis_url, database_url, raw, pg, monkeypatch):
    monkeypatch.setattr("streamworker.cron.stored.COMPARE", 0.3)
    app = app_of(redis_url, database_url)
    async with app, app.relay_process() as relaying, anyio.create_task_group() as group:
        stopping = anyio.Event()
        group.start_soon(relaying.run, stopping)
        await app.schedules.put("nightly", "0 3 * * *", Report(day=1))
        raw.flushall()

        async def there():
            return await listed(app) == {"nightly": (1, "")}

        await eventually(there, 30)
        stopping.set()


async def test_what_is_changed_without_a_ledger_is_kept_too(redis_url, database_url, raw, mode, mirror, pg):
    """The command line on a machine without DATABASE_URL, and schedules of before the upgrade."""
    bare = App(settings=Settings(redis_url=redis_url, mode=mode))
    async with bare, app_of(redis_url, database_url, mode) as app:
        await bare.schedules.put("old", "@daily", Report(day=1))
        await mirror()
        assert await kept(pg) == {"old": True}
        await bare.schedules.put("other", "@daily", Report(day=5))
        assert await bare.schedules.remove("old")
        await mirror(whole=True)
        assert await kept(pg) == {"old": False, "other": True}
        await bare.schedules.edit("other", payload=msgspec.Raw(b'{"day":6}'))
        await mirror(whole=True)
        raw.flushall()
        await mirror()
        assert await listed(app) == {"other": (6, "")}
        assert await app.schedules.remove("other")
        await app.schedules.put("other", "@hourly", Report(day=7))
        await mirror(whole=True)
        assert await listed(app) == {"other": (7, "")}


async def test_an_old_backup_of_redis_gets_the_newer_definitions(redis_url, database_url, raw, mode, mirror, pg):
    async with app_of(redis_url, database_url, mode) as app:
        await app.schedules.put("a", "@daily", Report(day=1))
        await app.schedules.put("removed", "@daily", Report(day=1))
        backup = {key: raw.dump(key) for key in raw.keys("*schedules*")}
        await app.schedules.put("a", "@hourly", Report(day=2))
        await app.schedules.remove("removed")
        for key, value in backup.items():
            raw.restore(key, 0, value, replace=True)
        assert (await listed(app)).keys() == {"a", "removed"}
        await mirror(whole=True)
        assert await listed(app) == {"a": (2, "")}
        assert (await app.schedules.get("a")).stored.expression == "@hourly"


async def test_one_relay_of_all_looks(database_url, pg):
    database = await open_database(database_url, name="test")
    ledger = PostgresOutbox(database).schedules
    first, second = await ledger.look(5, 3600), await ledger.look(5, 3600)
    assert first is not None
    assert (first.whole, second) == (True, None)
    await pg.execute(OTHER_TURN)
    third = await ledger.look(5, 3600)
    assert third is not None
    assert not third.whole
    database.close()


async def test_a_schedule_is_not_put_while_the_ledger_is_away(redis_url, raw):
    """What returned is durable: without PostgreSQL it raises, and nothing is stored."""
    away = "postgresql://nobody@127.0.0.1:1/none?connect_timeout=1"
    async with App(settings=Settings(redis_url=redis_url, database_url=away, ledger="on")) as app:
        with pytest.raises(Unreachable):
            await app.schedules.put("a", "@daily", Report())
    assert raw.keys("*schedules*") == []
