"""What observers are told of every job, in both modes."""

from __future__ import annotations

import asyncio
import contextvars
import json
import time
from collections import Counter
from typing import Any

import pytest

from streamworker import App, Backoff, Discard, Payload, QueueWorker, Settings, Snooze
from streamworker.job import Dead, Done, ReleaseAt, RetryAt, Settled
from streamworker.observe import JobRun, Observer, Settlement
from streamworker.telemetry import logs
from streamworker.testing import drain
from tests.conftest import eventually

pytestmark = pytest.mark.mode_free

current: contextvars.ContextVar[str] = contextvars.ContextVar("current")


class Step(Payload, kind="step", queue="steps"):
    what: str = "ok"


class Block(Payload, kind="block", queue="steps"):
    """For a handler that runs in a thread."""


class Diary(Observer):
    """Remembers what it was told, as it was at that moment."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str, int]] = []
        self.runs: list[JobRun] = []
        self.dead: list[JobRun] = []
        self.settled: list[Settlement] = []

    def on_start(self, run: JobRun) -> None:
        assert run.outcome is run.exception is run.verdict is run.seconds is None
        self.told.append(("start", run.job_id, "", run.attempt))

    def on_outcome(self, run: JobRun) -> None:
        self.told.append(("outcome", run.job_id, run.word, run.attempt))
        self.runs.append(run)

    def on_settled(self, settlement: Settlement) -> None:
        self.settled.append(settlement)

    def on_dead(self, run: JobRun) -> None:
        self.told.append(("dead", run.job_id, run.word, run.attempt))
        self.dead.append(run)


def make_app(redis_url: str, mode: str, *observers: Observer) -> App[None]:
    app = App(settings=Settings(redis_url=redis_url, mode=mode, lease=1), observers=observers)  # type: ignore[arg-type]

    @app.handler(max_attempts=2, timeout=0.2, backoff=Backoff(base=0, jitter=0))
    async def step(payload: Step) -> None:
        match payload.what:
            case "fail":
                raise ValueError("no such invoice")
            case "discard":
                raise Discard("deleted")
            case "snooze":
                raise Snooze(3600)
            case "hang":
                await asyncio.sleep(60)

    return app


async def test_a_job_that_fails_is_told_from_its_start_to_its_death(ground, redis_url):
    diary = Diary()
    async with make_app(redis_url, ground.mode, diary) as app:
        job = (await app.enqueue(Step(what="fail"), headers={"tenant": "t1"})).id
        await drain(app, delayed=True)
    assert diary.told == [
        ("start", job, "", 1), ("outcome", job, "raised", 1),
        ("start", job, "", 2), ("outcome", job, "raised", 2), ("dead", job, "raised", 2),
    ]  # fmt: skip
    first, last = diary.runs
    assert diary.dead == [last]
    assert isinstance(last.exception, ValueError)
    assert last.exception.__traceback__ is not None
    assert last.error == "ValueError: no such invoice"
    assert (last.queue, last.kind, last.level, last.known, last.deliveries) == ("steps", "step", "normal", True, 1)
    assert last.handler is not None
    assert last.handler.endswith("make_app.<locals>.step")
    assert last.headers["tenant"] == "t1"
    assert last.payload == Step(what="fail")
    assert [run.last_attempt for run in diary.runs] == [False, True]
    assert isinstance(first.verdict, RetryAt)
    assert last.verdict == Dead("failed 2 of 2 attempts", "ValueError: no such invoice", charged=True)
    assert first.seconds is not None
    assert first.waited is not None
    assert time.time() - 60 < (first.started_at or 0) <= time.time()
    assert last.worker_id.startswith("worker-")


async def test_every_outcome_has_its_word_and_its_verdict(ground, redis_url):
    diary = Diary()
    async with make_app(redis_url, ground.mode, diary) as app:
        for what in ("ok", "discard", "snooze", "hang"):
            await app.enqueue(Step(what=what))
        ground.push('{"payload":{"what":5}}', queue="steps")
        ground.push('{"payload":{},"kind":"from another world"}', queue="steps")
        ground.push("no json", queue="steps")
        await drain(app)
    words = Counter(run.word for run in diary.runs)
    assert words["timed_out"] >= 1
    assert {word: count for word, count in words.items() if word != "timed_out"} == {
        "ok": 1, "discarded": 1, "snoozed": 1, "undecodable": 2, "unknown_kind": 1,
    }  # fmt: skip
    by_word = {run.word: run for run in diary.runs}
    assert isinstance(by_word["ok"].verdict, Done)
    assert isinstance(by_word["snoozed"].verdict, ReleaseAt)
    assert isinstance(by_word["unknown_kind"].verdict, ReleaseAt)
    assert (by_word["unknown_kind"].known, by_word["unknown_kind"].handler) == (False, None)
    assert by_word["timed_out"].error == "timed out after 0.2 s"
    assert by_word["timed_out"].exception is None
    assert isinstance(by_word["discarded"].exception, Discard)
    never = [run for run in diary.runs if run.started_at is None]
    assert Counter(run.word for run in never) == {"undecodable": 2, "unknown_kind": 1}
    assert all(run.seconds is None and run.waited is None for run in never)
    starts = [told for told in diary.told if told[0] == "start"]
    assert len(starts) == len(diary.runs) - len(never)
    dead = Counter(run.word for run in diary.dead)
    assert (dead["discarded"], dead["undecodable"]) == (1, 2)
    settled = [pair for settlement in diary.settled for pair in settlement.items]
    assert {run for run, _ in settled} == set(diary.runs)
    assert all(result is Settled.SETTLED for _, result in settled)
    assert all(settlement.seconds >= 0 for settlement in diary.settled)


async def test_a_run_whose_job_was_taken_away_is_told_as_lost(ground, redis_url):
    diary, begun, go = Diary(), asyncio.Event(), asyncio.Event()
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=1), observers=[diary])

    @app.handler(timeout=None)
    async def step(payload: Step) -> None:
        begun.set()
        await go.wait()

    worker = QueueWorker(app, redis=None, database=None, services=None)
    async with app:
        await app.enqueue(Step())
        task = asyncio.create_task(worker.start())
        try:
            await asyncio.wait_for(begun.wait(), 10)
            for place in (*ground.raw.keys("stream:*"), *ground.raw.keys("queue:*")):
                ground.raw.delete(place)
            go.set()
            await eventually(lambda: bool(diary.settled), 10)
        finally:
            go.set()
            await worker.stop()
            await task
    assert [result for settlement in diary.settled for _, result in settlement.items] == [Settled.LOST]
    assert diary.dead == []


class Stage(Observer):
    """Sets a context variable around the handler, as a tracer does."""

    def __init__(self) -> None:
        self.tokens: dict[JobRun, contextvars.Token[str]] = {}

    def on_start(self, run: JobRun) -> None:
        self.tokens[run] = current.set(run.job_id)

    def on_outcome(self, run: JobRun) -> None:
        current.reset(self.tokens.pop(run))  # raises in any other context than that of on_start


async def test_the_handler_sees_what_an_observer_set_and_the_next_one_does_not(ground, redis_url):
    stage, seen = Stage(), {}
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=1, concurrency=1), observers=[stage])

    @app.handler
    async def step(payload: Step) -> None:
        seen["async"] = current.get()

    @app.handler
    def block(payload: Block) -> None:
        seen["thread"] = current.get()

    async with app:
        jobs = await app.enqueue_many([Step(), Block()])
        await drain(app)
    assert seen == {"async": jobs[0].id, "thread": jobs[1].id}
    assert stage.tokens == {}


class Broken(Observer):
    def on_start(self, run: JobRun) -> None:
        raise RuntimeError("broken")

    on_outcome = on_dead = on_start

    def on_settled(self, settlement: Settlement) -> None:
        raise RuntimeError("broken")


async def test_a_broken_observer_harms_neither_jobs_nor_other_observers(ground, redis_url, capsys):
    logs.configure("info", "json")
    diary = Diary()
    async with make_app(redis_url, ground.mode, Broken(), diary) as app:
        await app.enqueue_many([Step(), Step(), Step(what="discard")])
        drained = await drain(app)
    assert (drained.done, drained.dead) == (2, 1)
    assert (len(diary.runs), len(diary.dead)) == (3, 1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = [line["observer"] for line in lines if line["event"] == "observer_failed"]
    assert sorted(set(told)) == ["Broken.on_settled", "Broken.on_start"]
    assert len(told) == 2  # not once a job


async def test_without_observers_the_worker_calls_what_it_always_called(redis_url, monkeypatch):
    """No observers, no cost: no dispatch is made."""
    from streamworker import worker
    from streamworker.worker import observers

    made: list[Any] = []
    monkeypatch.setattr(worker, "dispatch_to", lambda *args: made.append(observers.dispatch_to(*args)))
    async with make_app(redis_url, "stream") as app:
        await app.enqueue(Step())
        await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)  # `drain` observes
    assert set(made) == {None}


@pytest.mark.parametrize("names", [["on_dead"], ["on_start", "on_outcome"]])
def test_what_an_observer_does_not_override_is_not_called(names):
    from streamworker.worker.observers import overridden

    made = type("Made", (Observer,), {name: lambda self, run: None for name in names})()
    called = [name for name in ("on_start", "on_outcome", "on_settled", "on_dead") if overridden([made], name)]
    assert called == names
