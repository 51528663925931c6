"""Deduplication keys that are held until their jobs have started or ended, and jobs that replace others."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Context, Discard, Payload, QueueWorker, Snooze
from streamworker.broker.base import RedisBroker
from streamworker.errors import JobCancelled, StreamworkerError, UsageError
from streamworker.worker.inflight import WorkerCounts
from tests.conftest import eventually
from tests.contract.helpers import settings, working

KEY = "stream:{q}:key:k"


class Sync(Payload, kind="sync", queue="q"):
    n: int = 0
    how: str = ""


class Scene:
    """An app, and what its handlers did."""

    def __init__(self, raw, ground, **options: Any) -> None:
        self.raw, self.ground = raw, ground
        self.began: list[int] = []
        self.go = asyncio.Event()
        self.app = App(settings=settings(raw, ground, **options))
        self.app.handler(timeout=60, max_attempts=2, backoff=Backoff(base=0.02, jitter=0))(self.sync)

    async def sync(self, payload: Sync, ctx: Context) -> None:
        self.began.append(payload.n)
        match payload.how:
            case "wait":
                await self.go.wait()
            case "fail":
                raise ValueError("no luck")
            case "discard":
                raise Discard("never")
            case "snooze" if ctx.job.hop == 0:
                raise Snooze(0.3)

    async def put(self, n: int = 0, how: str = "", **options: Any) -> Any:
        return await self.app.enqueue(Sync(n=n, how=how), **{"key": "k", **options})

    @property
    def holder(self) -> str | None:
        found = self.raw.get(KEY)
        return None if found is None else found.decode()

    def gone(self) -> bool:
        return not self.raw.exists(KEY)


@pytest.fixture
async def scene(raw, ground):
    scene = Scene(raw, ground)
    async with scene.app:
        yield scene


async def pending(operator: Any) -> list[Any]:
    rows, after = [], ""
    while after is not None:
        page = await operator.pending("q", after)
        rows, after = rows + page.rows, page.after
    return rows


def counts(worker: QueueWorker) -> WorkerCounts:
    return worker._in_flight.counts if hasattr(worker, "_in_flight") else WorkerCounts()


# -- held until it has ended


@pytest.mark.parametrize("how", ["", "fail", "discard", "snooze"])
async def test_a_key_is_free_as_soon_as_its_job_has_ended(scene, ground, how):
    first = await scene.put(1, how, unique="done")
    again = await scene.put(2, unique="done")
    assert (again.id, again.new) == (first.id, False)
    async with working(scene.app):
        await eventually(lambda: ground.empty() and scene.gone())
        assert set(scene.began) == {1}
        assert (await scene.put(3, unique="done")).new
        await eventually(lambda: 3 in scene.began and scene.gone())


async def test_it_is_held_while_the_job_runs(scene, ground):
    first = await scene.put(1, "wait", unique="done")
    async with working(scene.app):
        await eventually(lambda: scene.began)
        assert (await scene.put(2, unique="done")).id == first.id
        assert (await scene.put(3, key_ttl=5)).id == first.id  # one key, however it is asked for
        scene.go.set()
        await eventually(scene.gone)
        assert (await scene.put(4, unique="done")).new
        await eventually(ground.empty)
    assert scene.began == [1, 4]


async def test_it_is_held_while_a_retry_waits(scene, raw):
    scene.app.handler_of("sync", "q")
    first = await scene.put(1, "snooze", unique="done")
    async with working(scene.app) as (worker,):
        await eventually(lambda: counts(worker).released == 1)
        assert scene.holder == first.id and raw.pttl(KEY) > 6 * 86_400_000
        await eventually(lambda: counts(worker).done == 1 and scene.gone())


@pytest.mark.parametrize(
    "end", ["cancel delayed", "cancel", "drop", "bury", "purge", "purge delayed", "expire", "erase"]
)
async def test_it_is_free_however_its_job_ends(scene, ground, raw, broker_factory, end):
    options: dict[str, Any] = {"delay": 600} if "delayed" in end else {}
    if end == "expire":
        options["expires_at"] = datetime.now(UTC) - timedelta(seconds=5)
    first = await scene.put(1, unique="done", **options)
    assert scene.holder == first.id
    async with scene.app.operator() as operator, broker_factory("dead") as dead:
        if end in ("drop", "bury"):
            await dead.claim(1, 0, ())
            (entry,) = await pending(operator)
            assert await (operator.drop(entry) if end == "drop" else operator.bury(entry, "by hand"))
        elif end.startswith("purge"):
            assert await operator.purge("q", "delayed" if "delayed" in end else "ready", 10) == 1
        elif end == "erase":
            raw.xadd("stream:{q}:dead", {"job": ground.waiting()[0], "id": first.id})
            (letter,) = (await operator.dead("q")).rows
            assert await operator.erase(letter)
        else:
            if end.startswith("cancel"):
                await scene.app.cancel(first.id)
            async with working(scene.app):
                await eventually(scene.gone)
    assert scene.gone()
    assert (await scene.put(2, unique="done")).new


async def test_a_job_of_before_frees_nothing_of_its_successor(scene, ground, raw, broker_factory):
    await scene.put(1, unique="done")
    raw.set(KEY, "another")
    async with working(scene.app):
        await eventually(lambda: scene.began == [1] and ground.empty())
    assert scene.holder == "another"


async def test_a_worker_that_dies_frees_nothing_and_its_rescuer_does(ground, raw, broker_factory):
    scene = Scene(raw, ground, lease=1)
    async with scene.app, broker_factory("dead") as dead:
        first = await scene.put(1, unique="done")
        (claim,) = await dead.claim(1, 0, ())
        ground.ripen(claim)
        assert scene.holder == first.id
        async with working(scene.app):
            await eventually(lambda: scene.began == [1] and scene.gone())


async def test_a_key_whose_job_vanished_runs_out(scene, ground, raw):
    await scene.put(1, unique="done")
    assert 6 * 86_400_000 < raw.pttl(KEY) <= 7 * 86_400_000
    await scene.put(2, unique="done", key="other", delay=86_400, key_ttl=60)
    assert 86_400_000 < raw.pttl("stream:{q}:key:other") <= 86_460_000


async def test_a_dead_letter_takes_its_key_again_or_stays(scene, ground, raw):
    await scene.put(1, "discard", unique="done")
    async with scene.app.operator() as operator:
        async with working(scene.app):
            await eventually(lambda: raw.xlen("stream:{q}:dead") == 1)
        assert scene.gone()
        second = await scene.put(2, unique="done")
        (letter,) = (await operator.dead("q")).rows
        with pytest.raises(StreamworkerError, match="another job has the key"):
            await operator.replay(letter)
        assert raw.xlen("stream:{q}:dead") == 1 and scene.holder == second.id
        await operator.purge("q", "ready", 10)
        assert await operator.replay(letter)
        assert scene.holder == letter.job_id


# -- held until it starts


async def test_a_key_is_free_when_its_job_starts(scene, ground):
    first = await scene.put(1, "wait", unique="started")
    assert (await scene.put(2, unique="started")).id == first.id
    async with working(scene.app):
        await eventually(lambda: scene.began == [1])
        assert scene.gone()
        second = await scene.put(3, "wait", unique="started")
        assert second.new
        await eventually(lambda: scene.began == [1, 3])
        scene.go.set()
        await eventually(ground.empty)


async def test_a_batch_starts_all_its_jobs(raw, ground):
    seen: list[int] = []
    app = App(settings=settings(raw, ground))

    @app.handler(batch=10, linger=0.05)
    async def syncs(payloads: list[Sync]) -> None:
        seen.extend(payload.n for payload in payloads)

    async with app:
        for n in range(3):
            await app.enqueue(Sync(n=n), key=str(n), unique="started" if n else "done")
        async with working(app):
            await eventually(lambda: len(seen) == 3 and ground.empty())
            await eventually(lambda: not raw.keys("stream:{q}:key:*") and not raw.keys("stream:{q}:held:*"))


# -- replaced


async def test_a_delayed_job_is_rewritten_in_place(scene, ground, raw):
    first = await scene.put(1, delay=600, unique="done", priority="low")
    again = await scene.put(2, delay=50, replace=True, unique="done", priority="high")
    assert (again.id, again.new, again.replaced) == (first.id, False, first.id)
    ((member, at),) = raw.zrange("stream:{q}:due", 0, -1, withscores=True)
    (body,) = raw.hvals("stream:{q}:bodies")
    document = json.loads(body)
    assert (document["id"], document["payload"]["n"]) == (first.id, 2)
    assert member.startswith(b"high/") and raw.hkeys("stream:{q}:bodies") == [member]
    seconds, _ = raw.time()
    assert 40 < at / 1000 - seconds <= 51
    now = await scene.put(3, replace=True, unique="done")
    assert now.id == first.id
    async with working(scene.app):
        await eventually(lambda: scene.began == [3] and scene.gone())


async def test_a_ready_job_is_cancelled_and_its_successor_waits_at_the_end(scene, ground, raw):
    first = await scene.put(1, unique="done")
    other = await scene.put(9, key="other")
    again = await scene.put(2, replace=True, unique="done")
    assert again.new and again.replaced == first.id and scene.holder == again.id
    ending = asyncio.create_task(scene.app.result(first.id, timeout=30))
    await eventually(lambda: raw.hget("stream:{q}:meta", "waits"))
    async with working(scene.app) as (worker,):
        await eventually(lambda: scene.began == [9, 2] and scene.gone())
        with pytest.raises(JobCancelled):
            await ending
        await eventually(lambda: counts(worker).cancelled == 1)
    assert other.new


async def test_a_job_that_has_started_is_not_replaced(scene, ground):
    first = await scene.put(1, "wait", unique="done")
    async with working(scene.app):
        await eventually(lambda: scene.began == [1])
        again = await scene.put(2, replace=True, unique="done")
        assert (again.id, again.new, again.replaced) == (first.id, False, None)
        scene.go.set()
        await eventually(lambda: ground.empty() and scene.gone())
    assert scene.began == [1]


async def test_a_job_that_was_replaced_after_its_claim_does_not_start(scene, ground, raw, broker_factory):
    """Between claim and start nobody has told the worker: the start asks."""
    first = await scene.put(1, unique="done")
    async with broker_factory("w") as broker:
        (claim,) = await broker.claim(1, 0, ())
        assert not claim.cancelled
        again = await scene.put(2, replace=True, unique="done")
        assert await broker.begin("q", [("k", first.id, True)]) == [False]
        assert scene.holder == again.id
        assert await broker.begin("q", [("k", again.id, True)]) == [True]
        assert scene.gone()


async def test_twenty_that_replace_at_once_leave_one(scene, ground, raw):
    async with anyio.create_task_group() as group:
        for n in range(20):
            group.start_soon(lambda n=n: scene.put(n, replace=True))
    async with working(scene.app):
        await eventually(lambda: ground.empty() and scene.gone())
    assert len(scene.began) == 1


async def test_a_repeated_call_changes_nothing(scene, ground, raw):
    """The reply to the first try was lost: the producer sends the same again."""
    job = scene.app.job(Sync(n=1), key="k", unique="done")
    first = await scene.app.enqueue(job)
    assert await scene.app.enqueue(job) == first and first.new
    assert ground.ready() == 1
    newer = scene.app.job(Sync(n=2), key="k", unique="done", replace=True)
    second = await scene.app.enqueue(newer)
    assert await scene.app.enqueue(newer) == second and second.replaced == first.id, (
        "which one was cancelled is told again"
    )
    assert ground.ready() == 2


# -- debounced


async def test_each_enqueue_pushes_the_time_up_to_the_most(scene, ground, raw):
    async def due() -> float:
        ((_, at),) = raw.zrange("stream:{q}:due", 0, -1, withscores=True)
        return at / 1000

    first = await scene.put(1, debounce=30, debounce_max=40)
    began = await due()
    await asyncio.sleep(0.05)
    again = await scene.put(2, debounce=30, debounce_max=40)
    assert again.id == first.id and 0 < await due() - began < 5
    last = await scene.put(3, debounce=39, debounce_max=40)
    assert last.id == first.id
    await scene.put(4, debounce=40, debounce_max=40)
    assert await due() - began == pytest.approx(10, abs=0.01)  # 40 s after the first, not after the last
    assert json.loads(raw.hvals("stream:{q}:bodies")[0])["payload"]["n"] == 4


async def test_what_comes_while_it_runs_runs_afterwards(scene, ground):
    await scene.put(1, "wait", debounce=0.05)
    async with working(scene.app):
        await eventually(lambda: scene.began == [1])
        assert (await scene.put(2, debounce=0.05)).new
        scene.go.set()
        await eventually(lambda: scene.began == [1, 2] and ground.empty())


# -- what makes no sense, and what costs nothing


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"unique": "done"}, "give key="),
        ({"replace": True}, "give key="),
        ({"debounce": 2}, "give key="),
        ({"key": "k", "unique": "ended"}, "'done', 'started'"),
        ({"key": "k", "debounce": 2, "delay": 3}, "leave delay"),
        ({"key": "k", "debounce_max": 2}, "needs a debounce"),
        ({"key": "k", "debounce": 5, "debounce_max": 2}, "not longer"),
        ({"key": "k", "replace": 1}, "must be bool"),
    ],
)
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(UsageError, match=says):
        App().job(Sync(), **options)


def test_no_option_is_misspelled_in_silence():
    with pytest.raises(TypeError, match="'dealy'"):
        App().job(Sync(), dealy=5)


async def test_plain_jobs_and_keys_with_a_time_ask_nothing(scene, ground, raw, monkeypatch):
    asked: list[str] = []

    async def begin(*args: Any) -> list[bool]:
        asked.append("begin")
        return []

    monkeypatch.setattr(RedisBroker, "begin", begin)
    await scene.app.enqueue_many([Sync(n=n) for n in range(5)])
    await scene.put(7, key_ttl=60)
    async with working(scene.app):
        await eventually(lambda: len(scene.began) == 6 and ground.empty())
    assert not asked and scene.holder is not None
