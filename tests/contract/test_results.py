"""What a handler returned, for whoever waits for it and for whoever comes later; and the ends that leave no result."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Context, Discard, Payload, QueueWorker, Settings
from streamworker.broker.pubsub import RedisResultWaiter
from streamworker.errors import JobCancelled, JobDead, ResultNotKept, ResultTimeout, UsageError
from streamworker.testing import drain
from tests.conftest import CLUSTER, eventually
from tests.contract.ground import out_of_memory


class Ask(Payload, kind="ask", queue="q"):
    how: str = "add"


class Plain(Payload, kind="plain", queue="q"):
    """Its handler keeps nothing."""


class Scene:
    def __init__(self, ground, redis_url, **settings) -> None:
        self.go = asyncio.Event()
        self.looks: list[Any] = []
        self.app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3, **settings))
        self.app.handler(result_ttl=60, max_attempts=1, backoff=Backoff(base=0.01))(self.ask)
        self.app.handler(self.plain)

    async def ask(self, payload: Ask, ctx: Context) -> Any:
        match payload.how:
            case "add":
                return {"sum": 3}
            case "nothing":
                return None
            case "odd":
                return object()
            case "much":
                return "x" * 300_000
            case "die":
                raise Discard("never")
            case "fail":
                raise ValueError("no")
            case "wait":
                await self.go.wait()
                return "at last"
            case "forever":
                await anyio.sleep_forever()
        return None

    async def plain(self, _: Plain) -> str:
        return "lost"

    @property
    def waiting(self) -> bool:
        """Somebody's ear is open."""
        subscriber = self.app._connection._broker._subscriber
        return any(each.open.is_set() for several in subscriber._by_channel.values() for each in several)


@pytest.fixture
async def scene(ground, redis_url):
    scene = Scene(ground, redis_url)
    async with scene.app:
        yield scene


@pytest.fixture
async def working(scene):
    worker = QueueWorker(scene.app, redis=None, database=None, services=None)
    life = asyncio.create_task(worker.start())
    try:
        yield worker
    finally:
        await worker.stop()
        await life


async def test_a_result_comes_to_whoever_waits_and_to_whoever_comes_later(scene, working, raw, monkeypatch):
    looked = RedisResultWaiter.kept

    async def kept(self: RedisResultWaiter) -> bytes | None:
        try:
            return await looked(self)
        finally:
            scene.looks.append(self)

    monkeypatch.setattr(RedisResultWaiter, "kept", kept)
    made = await scene.app.enqueue(Ask(how="wait"))
    got: list[Any] = []

    async def wait() -> None:
        got.append(await scene.app.result(made.id, timeout=30))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(wait)
        await eventually(lambda: len(scene.looks) == 5)
        raw.config_resetstat()
        await anyio.sleep(0.3)
        assert "cmdstat_get" not in raw.info("commandstats")  # nobody polls
        assert got == []
        scene.go.set()
    assert got == ["at last"] * 5
    assert await scene.app.result(made.id) == "at last"
    key = f"stream:{{q}}:result:{made.id}"
    assert 0 < raw.ttl(key) <= 60
    await eventually(scene.app._connection._broker._subscriber._task.done)
    others = ("worker", "sentinel-")  # workers hear the bell, sentinels each other
    listening = [client for client in raw.client_list() if client["sub"] != "0"]
    assert not [client for client in listening if not any(name in client["name"] for name in others)]


async def test_ends_that_leave_no_result(scene, working):
    ids = {how: (await scene.app.enqueue(Ask(how=how))).id for how in ("add", "nothing", "odd", "much", "die", "fail")}
    app = scene.app
    assert await app.result(ids["add"], timeout=30) == {"sum": 3}
    assert await app.result(ids["nothing"], timeout=30) is None
    for how, why in (("odd", "JSON"), ("much", "300002 bytes")):
        with pytest.raises(ResultNotKept, match=why):
            await app.result(ids[how], timeout=30)
    with pytest.raises(JobDead, match="never") as died:
        await app.result(ids["die"], timeout=30)
    assert (died.value.job_id, died.value.reason) == (ids["die"], "discarded: never")
    with pytest.raises(JobDead, match="ValueError: no"):
        await app.result(ids["fail"], timeout=30)


async def test_a_cancelled_job_has_no_result(scene, working):
    running = await scene.app.enqueue(Ask(how="forever"))
    delayed = await scene.app.enqueue(Ask(), delay=3600)
    refused: list[str] = []

    async def wait(job_id: str) -> None:
        with pytest.raises(JobCancelled):
            await scene.app.result(job_id, timeout=30)
        refused.append(job_id)

    async with anyio.create_task_group() as group:
        for each in (running, delayed):
            group.start_soon(wait, each.id)
        await eventually(lambda: scene.waiting and len(scene.app._connection._broker._subscriber._confirmed) == 2)
        for each in (running, delayed):
            await scene.app.cancel(each.id)
    assert sorted(refused) == sorted([running.id, delayed.id])


async def test_a_job_that_keeps_nothing_can_be_waited_for(scene, working, raw):
    made = await scene.app.enqueue(Plain(), delay=0.5)
    with pytest.raises(ResultNotKept, match="result_ttl"):
        await scene.app.result(made.id, timeout=30)
    assert not raw.keys("*:result:*")
    raw.hset("stream:{q}:meta", "waits", "1")  # long ago
    await scene.app.enqueue(Plain())
    await eventually(lambda: not raw.hexists("stream:{q}:meta", "waits"))


async def test_time_runs_out(scene):
    made = await scene.app.enqueue(Ask())
    with pytest.raises(ResultTimeout, match="not ended yet"):
        await scene.app.result(made.id, timeout=0.1)
    with pytest.raises(TimeoutError):
        await scene.app.result("nobody", timeout=0)


async def test_a_result_that_has_expired_is_said_to_be(scene, working, raw):
    made = await scene.app.enqueue(Ask())
    assert await scene.app.result(made.id, timeout=30) == {"sum": 3}
    remembered = f"stream:{{q}}:ended:{made.id}"
    assert 60 < raw.ttl(remembered) <= 120
    raw.delete(f"stream:{{q}}:result:{made.id}")  # as its time does
    with pytest.raises(
        ResultNotKept, match="is completed, but has no result: its result was kept for 60 s and has expired"
    ):
        await scene.app.result(made.id, timeout=30)
    raw.delete(remembered)
    with pytest.raises(ResultTimeout, match="longer ago than its result is kept"):
        await scene.app.result(made.id, timeout=0.1)


async def test_a_cancelled_job_is_not_remembered_as_completed(scene, working, raw):
    made = await scene.app.enqueue(Ask(how="forever"))
    await eventually(lambda: raw.keys("streamworker:worker:*"))
    await scene.app.cancel(made.id)
    with pytest.raises(JobCancelled):
        await scene.app.result(made.id, timeout=30)
    assert not raw.keys("*:ended:*")


async def test_an_ear_survives_its_connection(scene, working, raw, monkeypatch):
    monkeypatch.setattr("streamworker.broker.pubsub.LISTEN_RETRY", 0.1)
    made = await scene.app.enqueue(Ask(how="wait"))

    async with anyio.create_task_group() as group:

        async def wait() -> None:
            assert await scene.app.result(made.id, timeout=30) == "at last"

        group.start_soon(wait)
        await eventually(lambda: scene.waiting)
        for client in raw.client_list():
            if client["sub"] != "0" and client["cmd"].startswith("subscribe"):
                raw.client_kill(client["addr"])
        scene.go.set()


async def test_a_replayed_letter_is_not_dead_any_more(scene, ground, redis_url, raw):
    made = await scene.app.enqueue(Ask(how="die"))
    await drain(scene.app)
    key = f"stream:{{q}}:result:{made.id}"
    assert raw.exists(key)
    async with scene.app.operator() as operator:
        (letter,) = (await operator.dead("q")).rows
        assert await operator.replay(letter)
    assert not raw.exists(key)


@pytest.mark.skipif(CLUSTER, reason="the memory of one node is not that of the queue's")
async def test_without_memory_the_job_ends_all_the_same(scene, working, ground, raw):
    made = await scene.app.enqueue(Ask(how="wait"))
    got: list[Any] = []
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            got.append(await scene.app.result(made.id, timeout=30))

        group.start_soon(wait)
        await eventually(lambda: scene.waiting)
        with out_of_memory(raw):
            scene.go.set()
            await eventually(lambda: got)
            await eventually(ground.empty)
    assert got == ["at last"]


async def test_where_a_job_lies_must_be_known(redis_url):
    app = App(settings=Settings(redis_url=redis_url))
    with pytest.raises(UsageError, match="not open"):
        await app.result("x")
    async with app:
        with pytest.raises(UsageError, match="queue="):
            await app.result("x")
        with pytest.raises(ResultTimeout):
            await app.result("x", queue="q", timeout=0)
