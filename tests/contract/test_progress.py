"""How far a running job has come: told by its handler, written by the lease thread, seen by operators, gone with the run."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from streamworker import App, Context, Payload, QueueWorker, Settings
from streamworker.broker.base import RedisBroker
from streamworker.errors import UsageError
from streamworker.testing import context
from tests.conftest import CLUSTER, eventually


class Load(Payload, kind="load", queue="q"):
    name: str = ""


class Thread(Payload, kind="thread", queue="q"):
    """For a handler that runs in a thread."""


class Scene:
    def __init__(self, ground, redis_url) -> None:
        self.settings = Settings(redis_url=redis_url, mode=ground.mode, lease=1)
        self.app = App(settings=self.settings)
        self.step = asyncio.Event()
        self.end = asyncio.Event()
        self.may_end = threading.Event()
        self.app.handler(self.load)
        self.app.handler(self.thread)

    async def load(self, payload: Load, ctx: Context) -> None:
        if payload.name == "quiet":
            await self.step.wait()
            return
        for n in range(1000):  # far more often than anybody wants to know
            ctx.progress(n, 2000, "reading")
        await self.step.wait()
        ctx.progress(2000, 2000, "writing")
        await self.end.wait()

    def thread(self, _: Thread, ctx: Context) -> None:
        ctx.progress(3)
        self.may_end.wait(30)

    @asynccontextmanager
    async def working(self):
        worker = QueueWorker(self.app, redis=None, database=None, services=None)
        life = asyncio.create_task(worker.start())
        try:
            async with self.app, self.app.operator() as operator:
                yield operator
        finally:
            self.may_end.set()
            self.end.set()
            self.step.set()
            await worker.stop()
            await life


@pytest.fixture
def scene(ground, redis_url, monkeypatch):
    monkeypatch.setattr("streamworker.worker.lease.TELL", 0.1)
    return Scene(ground, redis_url)


async def pending(operator):
    rows, after = [], ""
    while after is not None:
        page = await operator.pending("q", after)
        rows, after = rows + page.rows, page.after
    return rows


def fields(raw) -> list[str]:
    return [
        name.decode() for key in raw.keys("streamworker:worker:*") for name in raw.hkeys(key) if b"progress" in name
    ]


async def test_operators_see_it_while_the_job_runs(scene, raw):
    async with scene.working() as operator:
        made = await scene.app.enqueue(Load())

        async def told() -> str:
            rows = await pending(operator)
            return rows[0].progress.text if rows and rows[0].progress is not None else ""

        async def says(text: str) -> bool:
            return await told() == text

        await eventually(lambda: says("999 of 2000 (50 %) reading"), 20)
        scene.step.set()
        await eventually(lambda: says("2000 of 2000 (100 %) writing"), 20)
        assert fields(raw) == [f"progress:{made.id}"]
        scene.end.set()
        await eventually(lambda: fields(raw) == [], 20)


@pytest.mark.mode_free
async def test_a_thread_tells_too_and_is_not_asked_for_a_total(scene, raw):
    async with scene.working() as operator:
        await scene.app.enqueue(Thread())
        await eventually(lambda: fields(raw), 20)
        (row,) = await pending(operator)
        assert (row.progress.done, row.progress.total, row.progress.text) == (3, None, "3")


@pytest.mark.mode_free
async def test_whoever_says_nothing_costs_nothing(scene, raw):
    async with scene.working() as operator:
        await scene.app.enqueue(Load(name="quiet"))

        async def held() -> bool:
            return bool(await pending(operator))

        await eventually(held, 20)
        (row,) = await pending(operator)
        assert row.progress is None
        assert fields(raw) == []


@pytest.mark.mode_free
@pytest.mark.skipif(CLUSTER, reason="counts the commands of one node")
async def test_what_has_not_changed_is_not_written_again(scene, raw, monkeypatch):
    written: list[dict[str, object]] = []
    original = RedisBroker.progress

    async def progress(self, told, ended) -> None:
        written.append(dict(told))
        await original(self, told, ended)

    monkeypatch.setattr(RedisBroker, "progress", progress)
    async with scene.working():
        await scene.app.enqueue(Load())
        await eventually(lambda: written, 20)
        for _ in range(2):  # rounds of the lease thread
            beats = raw.info("commandstats")["cmdstat_pexpire"]["calls"]
            await eventually(lambda beats=beats: raw.info("commandstats")["cmdstat_pexpire"]["calls"] > beats, 20)
        assert len(written) == 1  # of a thousand words


def test_what_makes_no_sense_is_refused():
    ctx = context(Load())
    for done, total in ((-1, None), (1, -1), (float("nan"), 1), (float("inf"), 1), (1, float("inf"))):
        with pytest.raises(UsageError, match="numbers"):
            ctx.progress(done, total)
    ctx.progress(1, 0, "x" * 1000)
    assert ctx.reported.text == "1 of 0 " + "x" * 200
