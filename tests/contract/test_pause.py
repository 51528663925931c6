"""A paused queue is left alone by everybody within a second, also by a reader that was waiting for its next job."""

from __future__ import annotations

import time

import anyio
import pytest

from streamworker import App, Payload
from tests.conftest import eventually
from tests.contract.ground import out_of_memory
from tests.contract.helpers import job, list_in_all, names, settings, working


@pytest.fixture
async def operator_of(ground, redis_url):
    from streamworker import App, Settings

    async with App(settings=Settings(redis_url=redis_url, mode=ground.mode)).operator() as operator:
        yield operator


class Waiter:
    """A worker's claim loop and its ear, reduced to what it takes."""

    def __init__(self, broker, group) -> None:
        self.broker = broker
        self.claims = []
        self.rounds = 0
        self.heard: list[float] = []
        group.start_soon(broker.listen, self.heard.append)
        group.start_soon(self._loop)

    async def _loop(self) -> None:
        while True:
            claims = await self.broker.claim(10, 5.0, self.claims)
            self.claims += claims
            self.rounds += 1


def listening(raw, waiter):
    """Rings for a job that is due in a millisecond, until it is heard."""
    return lambda: raw.publish("stream:{q}:due", "1") is not None and waiter.heard


async def test_a_waiting_reader_hears_of_a_pause_and_of_its_end(broker_factory, operator_of, ground, raw):
    async with (
        broker_factory("w", queues=("q", "other")) as broker,
        broker_factory() as producer,
        anyio.create_task_group() as group,
    ):
        waiter = Waiter(broker, group)
        await eventually(listening(raw, waiter))
        await eventually(ground.blocked)
        before = waiter.rounds
        assert await operator_of.pause("q", "by me")
        await eventually(lambda: waiter.rounds > before, timeout=2.0)
        await producer.publish([job("held", "q"), job("free", "other")])
        await eventually(lambda: names(waiter.claims) == ["free"], timeout=2.0)
        before = waiter.rounds
        await producer.publish([job("free-2", "other")])
        await eventually(lambda: waiter.rounds > before)
        assert names(waiter.claims) == ["free", "free-2"]
        assert (await operator_of.depth(["q"]))[0].paused
        assert await operator_of.resume("q")
        await eventually(lambda: names(waiter.claims) == ["free", "free-2", "held"], timeout=2.0)
        group.cancel_scope.cancel()


@list_in_all
async def test_when_everything_is_paused_the_end_of_it_is_heard(broker_factory, operator_of, raw):
    await operator_of.pause("q", "by me")
    async with broker_factory("w") as broker, broker_factory() as producer, anyio.create_task_group() as group:
        waiter = Waiter(broker, group)
        await eventually(listening(raw, waiter))
        await producer.publish([job("held")])
        await eventually(lambda: waiter.rounds > 1)
        assert waiter.claims == []
        await operator_of.resume("q")
        await eventually(lambda: names(waiter.claims) == ["held"], timeout=1.0)
        group.cancel_scope.cancel()


async def test_without_a_bell_waits_are_short(broker_factory, operator_of, raw, monkeypatch):
    """Who may not subscribe looks again soon."""
    for module in ("claim", "stream_claim", "lists_brpop"):
        monkeypatch.setattr(f"streamworker.broker.{module}.SILENT_WAIT", 0.3)
    async with broker_factory("w") as broker:
        await broker.claim(1, 0, ())
        broker._source.silent = True
        begun = time.monotonic()
        assert await broker.claim(1, 5.0, ()) == []
        assert 0.25 < time.monotonic() - begun < 4


async def test_operators_and_the_relay_pause_independently(broker_factory, operator_of, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        raw.hset("stream:{q}:meta", "inactive", "1")
        assert await broker.claim(1, 0, ()) == []
        (depth,) = await operator_of.depth(["q"])
        assert (depth.paused, depth.inactive) == (True, True)
        assert await operator_of.pause("q", "by me at noon")
        assert not await operator_of.pause("q", "by you")
        assert await operator_of.paused("q") == "by me at noon"
        assert await operator_of.resume("q")
        assert not await operator_of.resume("q")
        assert await operator_of.paused("q") is None
        assert await broker.claim(1, 0, ()) == []  # the relay's word still holds
        raw.hdel("stream:{q}:meta", "inactive")
        assert names(await broker.claim(1, 0, ())) == ["a"]


async def test_purge(broker_factory, operator_of, ground, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job(f"j{i}", level=level) for i, level in enumerate(("high", "normal", "low") * 2)])
        await broker.publish([job("later", delay=100), job("much-later", delay=200)])
        raw.xadd("stream:{q}:dead", {"id": "d", "job": "{}"})
        held = await broker.claim(2, 0, ())
        assert await operator_of.purge("q", "ready", 3) == 3
        (depth,) = await operator_of.depth(["q"])
        assert (depth.ready, depth.running, depth.delayed, depth.dead) == (1, 2, 2, 1)
        assert await operator_of.purge("q", "ready", 100) == 1
        assert await operator_of.purge("q", "delayed", 1) == 1
        assert [row.job_id for row in (await operator_of.delayed("q")).rows] == ["much-later"]
        assert raw.hlen("stream:{q}:bodies") == 1
        assert await operator_of.purge("q", "dead", 100) == 1
        assert await operator_of.purge("nothing", "ready", 100) == 0
        (depth,) = await operator_of.depth(["q"])
        assert (depth.ready, depth.running, depth.delayed, depth.dead) == (0, 2, 1, 0)
        assert ground.held() == len(held)  # what is held stays held


async def test_purging_many(broker_factory, operator_of):
    async with broker_factory("w") as broker:
        await broker.publish([job(level="low") for _ in range(2500)])
        assert await operator_of.purge("q", "ready", 2400) == 2400
        assert (await operator_of.depth(["q"]))[0].ready == 100


async def test_a_fleet_pauses_within_a_second_and_what_runs_goes_on(operator_of, ground, raw):
    """Whole workers, busy and idle ones, and a kind that waits for its turn."""
    began: list[str] = []
    gate = anyio.Event()
    app = App(settings=settings(raw, ground, concurrency=3))

    class Plain(Payload, kind="plain", queue="q"):
        pass

    class Turn(Payload, kind="turn", queue="q"):
        pass

    @app.handler
    async def plain(payload: Plain) -> None:
        began.append("plain")

    @app.handler(concurrency=1)
    async def turn(payload: Turn) -> None:
        began.append("turn")
        await gate.wait()

    async with app, working(app, workers=3):
        await app.enqueue_many([Turn(), Turn(), Plain()])
        await eventually(lambda: sorted(began) == ["plain", "turn"])
        await eventually(lambda: raw.zcard("stream:{q}:due") == 1)
        assert await operator_of.pause("q", "by me")
        await anyio.sleep(1.0)  # the promise
        await app.enqueue_many([Plain() for _ in range(20)])
        gate.set()  # what runs ends, and calls the next, who has to wait as well
        await eventually(lambda: ground.held() == 0)
        await anyio.sleep(0.2)
        assert sorted(began) == ["plain", "turn"]
        assert await operator_of.resume("q")
        await eventually(lambda: len(began) == 23, timeout=30)
        await eventually(ground.empty, timeout=30)


async def test_a_server_that_refuses_writes_says_so_and_asking_writes_nothing(raw, ground):
    app = App(settings=settings(raw, ground))
    async with app, app.operator() as operator:
        ground.push("{}")
        before = sorted(raw.keys("*"))
        assert await operator.refusal(["q", "other"]) is None
        assert await operator.refusal([]) is None
        with out_of_memory(raw):
            await eventually(lambda: operator.refusal(["q"]))  # Redis 6.2 has not noticed yet
            for names in (["q", "other"], []):
                assert "refuses writes (OOM): it is out of memory" in (await operator.refusal(names) or "")
        assert sorted(raw.keys("*")) == before
        assert abs(await operator.now() - time.time()) < 30
