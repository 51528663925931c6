"""Cancelled jobs: delayed ones are gone, waiting ones never start, running ones are told, and none of them is a failure."""

from __future__ import annotations

import asyncio
import threading
import time

import anyio
import pytest

from streamworker import App, Context, Payload, QueueWorker, Settings, Snooze
from streamworker.broker import SettleRequest
from streamworker.errors import UsageError
from streamworker.job import Drop, Settled
from tests.conftest import eventually
from tests.contract.helpers import job, names, one, release, retry, settle_one

CANCELLED, META = "stream:{q}:cancelled", "stream:{q}:meta"


def dropped(claim, name) -> SettleRequest:
    return SettleRequest(claim, Drop(), None, name, "k")


def marked(raw) -> bool:
    return bool(raw.hexists(META, "cancelled"))


# -- the broker


async def test_a_delayed_job_is_gone_at_once(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish(
            [job(f"j{i}", delay=1000) for i in range(50)] + [job("a*b", delay=9), job("a/j7", delay=9)]
        )
        assert await broker.cancel("q", "j7")
        assert await broker.cancel("q", "a*b")
        assert raw.zcard("stream:{q}:due") == raw.hlen("stream:{q}:bodies") == 50
        assert not raw.exists(CANCELLED)
        assert not marked(raw)
        assert not await broker.cancel("q", "j7")


async def test_a_waiting_job_is_claimed_as_cancelled_and_its_end_takes_the_mark(broker_factory, ground, raw):
    async with broker_factory("w") as broker, broker_factory() as caller:
        await broker.publish([job("a"), job("b"), job("c")])
        assert not await caller.cancel("q", "b")
        claims = await broker.claim(10, 0, ())
        assert [(name, claim.cancelled) for name, claim in zip(names(claims), claims, strict=True)] == [
            ("a", False), ("b", True), ("c", False),
        ]  # fmt: skip
        assert await settle_one(broker, dropped(claims[1], "b")) is Settled.SETTLED
        assert await settle_one(broker, dropped(claims[1], "b")) is Settled.LOST
        assert ground.held() == 2
        assert not raw.exists(CANCELLED)
        assert not marked(raw)


async def test_a_mark_that_is_set_while_a_reader_blocks_holds_for_what_it_is_given(broker_factory, ground, raw):
    async with broker_factory("w") as broker, broker_factory() as caller, anyio.create_task_group() as group:
        await broker.claim(1, 0, ())  # knows that nothing is cancelled
        told: list[bool] = []
        heard: list[float] = []
        group.start_soon(broker.listen, heard.append, lambda: told.append(True))
        await eventually(lambda: raw.publish("stream:{q}:due", "1") is not None and heard)
        claims = []

        async def claim() -> None:
            while not claims:
                claims.extend(await broker.claim(1, 5.0, ()))

        group.start_soon(claim)
        await eventually(ground.blocked)
        await caller.cancel("q", "late")
        await eventually(lambda: told)
        await caller.publish([job("late")])
        await eventually(lambda: claims)
        assert claims[0].cancelled
        group.cancel_scope.cancel()


async def test_what_is_held_is_found_by_the_lease_thread(broker_factory):
    async with broker_factory("w") as broker, broker_factory() as caller:
        await broker.publish([job("a"), job("b")])
        claims = await broker.claim(10, 0, ())
        assert await broker.cancelled(claims) == []
        await caller.cancel("q", "b")
        assert names(await broker.cancelled(claims)) == ["b"]


@pytest.mark.parametrize("ending", [retry, release], ids=["retried", "released"])
async def test_a_job_that_goes_on_elsewhere_stays_cancelled(broker_factory, ending):
    async with broker_factory("w") as broker, broker_factory("v") as other:
        await broker.publish([job("next")])
        claim = await one(broker)
        await broker.cancel("q", "next")
        args = (claim, 0) if ending is retry else (claim,)
        await settle_one(broker, ending(*args))
        await broker.promote()
        assert (await one(other)).cancelled


async def test_an_orphan_is_cancelled_and_a_zombie_cannot_settle_it(broker_factory, ground):
    async with broker_factory("zombie") as zombie, broker_factory("rescuer") as rescuer:
        await zombie.publish([job("a")])
        claim = await one(zombie)
        await zombie.cancel("q", "a")
        ground.ripen(claim)
        ground.sweep_soon(rescuer)
        taken = await one(rescuer)  # its first look: nobody told it that there are marks
        assert taken.cancelled
        assert await settle_one(rescuer, dropped(taken, "a")) is Settled.SETTLED
        for late in (dropped(claim, "a"), retry(claim, time.time() + 100), release(claim)):
            assert await settle_one(zombie, late) is Settled.LOST
        assert ground.empty()


async def test_what_a_lost_reply_brought_is_judged_too(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        await one(broker)
        await broker.cancel("q", "a")
        (stray,) = await broker.own_pending(())
        assert stray.cancelled


async def test_a_mark_can_be_taken_back_and_does_not_live_for_ever(broker_factory, ground, redis_url, raw):
    async with (
        broker_factory("w") as broker,
        App(settings=Settings(redis_url=redis_url, mode=ground.mode)).operator() as operator,
    ):
        await broker.publish([job("a"), job("b")])
        await operator.cancel("q", "a")
        assert await operator.uncancel("q", "a")
        assert not await operator.uncancel("q", "a")
        assert not marked(raw)
        await operator.cancel("q", "b")
        assert 0 < raw.ttl(CANCELLED) <= 7 * 86_400
        raw.zadd(CANCELLED, {"b": 1})  # long ago
        claims = await broker.claim(10, 0, ())
        assert [claim.cancelled for claim in claims] == [False, False]
        raw.delete(CANCELLED)
        await broker.claim(10, 0, claims)
        await broker.publish([job("c")])
        await broker.claim(1, 0, claims)
        assert not marked(raw)  # seen to be so, nobody asks again


async def test_whoever_cancels_nothing_pays_nothing(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job()])
        await broker.claim(1, 0, ())  # the first look is for orphans of before
        raw.config_resetstat()
        for _ in range(10):
            await broker.publish([job()])
            await one(broker)
        assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] == 10


# -- the worker


class Task(Payload, kind="task", queue="q"):
    how: str = ""


class Scene:
    """An app with a worker, and what its handlers did."""

    def __init__(self, ground, redis_url) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []
        self.seen: list[bool] = []
        self.may_end = threading.Event()
        self.app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3, concurrency=2))
        self.app.handler(timeout=60)(self.task)
        self.worker = QueueWorker(self.app, redis=None, database=None, services=None)

    async def task(self, payload: Task, ctx: Context) -> None:
        self.began.append(ctx.job.id)
        try:
            match payload.how:
                case "await":
                    await anyio.sleep_forever()
                case "look":
                    while not ctx.cancelled:
                        with anyio.CancelScope(shield=True):
                            await asyncio.sleep(0.01)
                case "snooze":
                    try:
                        await anyio.sleep_forever()
                    except asyncio.CancelledError:
                        raise Snooze(0) from None
        finally:
            self.seen.append(ctx.cancelled)
            self.ended.append(ctx.job.id)

    @property
    def counts(self):
        return self.worker._in_flight.counts


@pytest.fixture
async def scene(ground, redis_url):
    scene = Scene(ground, redis_url)
    async with scene.app:
        life = asyncio.create_task(scene.worker.start())
        await eventually(lambda: hasattr(scene.worker, "_lease") and scene.worker._lease.renewed_at, 30)
        try:
            yield scene
        finally:
            await scene.worker.stop()
            await life


@pytest.mark.parametrize("how", ["await", "snooze"])
async def test_a_running_handler_is_told_and_ends_as_cancelled(scene, ground, raw, how):
    made = await scene.app.enqueue(Task(how=how))
    await eventually(lambda: scene.began)
    assert await scene.app.cancel(made.id) == "asked"
    await eventually(lambda: scene.counts.cancelled == 1)
    assert scene.seen == [True]
    assert (scene.counts.retried, scene.counts.dead, scene.counts.released, scene.counts.done) == (0, 0, 0, 0)
    await eventually(ground.empty)
    assert not raw.exists(CANCELLED, "stream:{q}:dead")
    again = await scene.app.enqueue(Task())  # its slot is as good as new
    await eventually(lambda: again.id in scene.ended)


async def test_without_the_bell_the_lease_thread_looks_by_itself(scene, raw, monkeypatch):
    made = await scene.app.enqueue(Task(how="await"))
    await eventually(lambda: scene.began)
    monkeypatch.setattr(scene.worker._lease, "look", lambda: None)
    await scene.app.cancel(made.id)
    await eventually(lambda: scene.counts.cancelled == 1)


async def test_a_waiting_job_never_starts(scene, ground, raw):
    blockers = [await scene.app.enqueue(Task(how="await")) for _ in range(2)]
    await eventually(lambda: len(scene.began) == 2)
    waiting = await scene.app.enqueue(Task())
    later = await scene.app.enqueue(Task(), delay=3600)
    assert await scene.app.cancel(waiting.id) == "asked"
    assert await scene.app.cancel(later.id) == "cancelled"
    for each in blockers:
        await scene.app.cancel(each.id)
    await eventually(lambda: scene.counts.cancelled == 3)
    assert set(scene.began) == {each.id for each in blockers}
    await eventually(ground.empty)
    assert not raw.exists(CANCELLED)


async def test_one_that_ends_regularly_without_looking_has_done_its_work(ground, redis_url):
    """And one that looked has not: threads and loops are told nothing else."""
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))
    go, began, kinds = threading.Event(), [], {"look": 0, "work": 0}

    @app.handler
    def task(payload: Task, ctx: Context) -> None:
        began.append(ctx.job.id)
        kinds[payload.how] += 1
        if payload.how == "work":
            go.wait(30)
            return
        while not ctx.cancelled:
            time.sleep(0.01)

    worker = QueueWorker(app, redis=None, database=None, services=None)
    life = asyncio.create_task(worker.start())
    try:
        async with app:
            ids = [(await app.enqueue(Task(how=how))).id for how in kinds]
            await eventually(lambda: len(began) == 2)
            for each in ids:
                await app.cancel(each)
            await eventually(lambda: worker._in_flight.counts.cancelled == 1)
            run = next(run for run in worker._in_flight.snapshot() if run.outcome is None)
            await eventually(lambda: run.cause is not None)
            go.set()
            await eventually(lambda: worker._in_flight.counts.done == 1)
            await eventually(ground.empty)
    finally:
        go.set()
        await worker.stop()
        await life
    assert worker._in_flight.counts.cancelled == 1


async def test_where_a_job_lies_must_be_known(redis_url):
    app = App(settings=Settings(redis_url=redis_url))
    with pytest.raises(UsageError, match="not open"):
        await app.cancel("x")
    async with app:
        with pytest.raises(UsageError, match="queue="):
            await app.cancel("x")
        assert await app.cancel("x", queue="q") == "asked"
