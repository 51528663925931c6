"""Jobs are claimed ahead of free slots where jobs end fast, and no job waits for the slot of a slow one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import anyio
import pytest

from streamworker import App, Payload, QueueWorker
from streamworker.worker import fetcher
from tests.conftest import eventually
from tests.contract.helpers import settings, working

SLOTS = 8


class Task(Payload, kind="task", queue="q"):
    n: int
    slow: bool = False


@pytest.fixture(autouse=True)
def on_any_machine(monkeypatch):
    """However slow the machine, jobs of a millisecond count as fast."""
    monkeypatch.setattr(fetcher, "AHEAD", 0.1)


def made(raw: Any, ground: Any, running: Counter[str], ran: list[int], go: anyio.Event) -> App:
    app = App(settings=settings(raw, ground, concurrency=SLOTS))

    @app.handler
    async def task(payload: Task) -> None:
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        try:
            await (go.wait() if payload.slow else anyio.sleep(0.001))
            ran.append(payload.n)
        finally:
            running["now"] -= 1

    return app


def claimed(worker: QueueWorker) -> int:
    """Jobs that a worker has claimed and not finished."""
    return worker._in_flight.busy if hasattr(worker, "_in_flight") else 0


async def test_fast_jobs_are_claimed_ahead_and_what_slow_ones_overtake_is_handed_back(raw, ground):
    running, ran, go = Counter[str](), list[int](), anyio.Event()
    app = made(raw, ground, running, ran, go)
    worker = QueueWorker(app, redis=None, database=None, services=None)

    async with app, anyio.create_task_group() as group:
        await app.enqueue_many([Task(n) for n in range(2000)])
        await app.enqueue_many([Task(2000 + n, slow=True) for n in range(3 * SLOTS)])
        group.start_soon(worker.start)
        await eventually(lambda: claimed(worker) > SLOTS, 30)
        await eventually(lambda: len(ran) == 2000 and running["now"] == SLOTS and ground.held("q") == SLOTS, 30)
        assert running["most"] == SLOTS, "what is claimed ahead waits for a slot"
        async with working(app):  # another one takes what the first one can hold no slot for
            await eventually(lambda: running["now"] == 2 * SLOTS)
            go.set()
            await eventually(lambda: sorted(ran) == list(range(2000 + 3 * SLOTS)))
        await worker.stop()
    assert len(ran) == len(set(ran)) and worker._in_flight.counts.lost == 0


async def test_at_a_stop_what_was_claimed_ahead_is_handed_back(raw, ground):
    running, ran, go = Counter[str](), list[int](), anyio.Event()
    app = made(raw, ground, running, ran, go)
    worker = QueueWorker(app, redis=None, database=None, services=None)
    async with app, anyio.create_task_group() as group:
        await app.enqueue_many([Task(n) for n in range(8_000)])
        group.start_soon(worker.start)
        await eventually(lambda: claimed(worker) > SLOTS, 30)
        await worker.stop()
    assert ground.held("q") == 0 and ground.ready(queue="q") == 8_000 - len(ran)
    assert len(ran) == len(set(ran))


async def test_no_claim_takes_more_than_half_of_the_slots_where_jobs_are_slow(raw, ground, monkeypatch):
    running, ran, go = Counter[str](), list[int](), anyio.Event()
    app = made(raw, ground, running, ran, go)
    worker = QueueWorker(app, redis=None, database=None, services=None)
    asked: list[int] = []
    claim = fetcher.Fetcher._claim

    async def noted(self: fetcher.Fetcher, limit: int) -> Any:
        asked.append(limit)
        return await claim(self, limit)

    monkeypatch.setattr(fetcher.Fetcher, "_claim", noted)
    async with app, anyio.create_task_group() as group:
        await app.enqueue_many([Task(n, slow=True) for n in range(SLOTS)])
        group.start_soon(worker.start)
        await eventually(lambda: running["now"] == SLOTS, 30)
        assert max(asked) == SLOTS // 2, "the rest is for other workers"
        await app.enqueue_many([Task(SLOTS + n) for n in range(4000)])
        go.set()
        await eventually(lambda: max(asked) > SLOTS // 2, 30)
        await eventually(lambda: len(ran) == SLOTS + 4000, 30)
        assert max(asked) <= SLOTS, "at most as many again as may run"
        await worker.stop()


async def test_a_job_starts_before_the_worker_looks_for_the_next_one(raw, ground, monkeypatch):
    events: list[str] = []
    claim = fetcher.Fetcher._claim

    async def noted(self: fetcher.Fetcher, limit: int) -> Any:
        events.append("look")
        if claims := await claim(self, limit):
            events.append("brought")
        return claims

    monkeypatch.setattr(fetcher.Fetcher, "_claim", noted)
    app = App(settings=settings(raw, ground, concurrency=SLOTS))

    @app.handler
    async def task(payload: Task) -> None:
        events.append("start")

    async with app, working(app):
        for n in range(10):
            events.clear()
            await app.enqueue(Task(n))
            await eventually(lambda: "start" in events)
            assert events[events.index("start") - 1] == "brought", "no look, and so no round trip, between them"
