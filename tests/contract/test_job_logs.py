"""Logs that stay with their jobs: kept by the run that holds the claim, bounded, clean, each run apart. Without a ledger."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest

from streamworker import App, Backoff, Context, Payload, ProcessContext, Retry
from streamworker.broker.base import RedisBroker
from streamworker.codec import read as read_document
from streamworker.job import Settled
from streamworker.results import LIFE, LogLine
from streamworker.views.job_log import JobLogLine
from streamworker.worker import job_logs
from streamworker.worker.job_logs import RunLog
from tests.conftest import eventually
from tests.contract.helpers import job, one, recover, settings, working

foreign = logging.getLogger("a.library")


@pytest.fixture(autouse=True)
def lines_gather_for_a_moment(monkeypatch):
    monkeypatch.setattr(job_logs, "GATHER", 0.05)


class Work(Payload, kind="work", queue="q"):
    how: str = "say"


class Heavy(Payload, kind="heavy", queue="q"):
    how: str = "say"


def work_in_process(_: Heavy, ctx: ProcessContext) -> None:
    ctx.log.info("begun", url="redis://u:hunter2@host/0", attempt_of=ctx.attempt)
    try:
        raise ValueError("inside")
    except ValueError:
        ctx.log.bind(step=2).exception("failed")


class Scene:
    def __init__(self, ground: Any, raw: Any, job_log: str = "ctx", **options: Any) -> None:
        self.app = App(settings=settings(raw, ground, lease=3.0, job_log=job_log, **options))
        self.app.handler(max_attempts=2, backoff=Backoff(base=0.01))(self.work)
        self.app.handler(process=True)(work_in_process)
        self.go = asyncio.Event()
        self.begun = asyncio.Event()

    async def work(self, payload: Work, ctx: Context) -> None:
        match payload.how:
            case "say":
                ctx.log.info("said", attempt_of=ctx.attempt)
                ctx.log.bind(more=[1]).warning("and more", payload={"secret": 1}, url="redis://u:hunter2@host/0")
            case "fail once":
                ctx.log.info("attempt %d", ctx.attempt)
                if ctx.attempt == 1:
                    raise Retry(after=0.01)
            case "raise inside":
                try:
                    raise ValueError("password=hunter2 \x1b[31m")
                except ValueError:
                    ctx.log.exception("it failed")
            case "many":
                for number in range(30):
                    ctx.log.info("line %d", number)
            case "wait":
                ctx.log.info("first")
                self.begun.set()
                await self.go.wait()
                ctx.log.info("last")
            case "thread":
                await asyncio.to_thread(lambda: ctx.log.info("of a thread"))
                own = threading.Thread(target=lambda: ctx.log.info("of a thread of its own"))
                own.start()
                await asyncio.to_thread(own.join)
            case "library":
                foreign.warning("by the library: %s", "password=hunter2")
                await asyncio.to_thread(foreign.warning, "in its thread")
                ctx.log.info("by ctx")

    async def lines(self, job_id: str, *, follow: bool = True) -> list[JobLogLine]:
        with anyio.fail_after(20):
            return [line async for line in self.app.job_log(job_id, follow=follow)]

    async def texts(self, how: str) -> list[str]:
        made = await self.app.enqueue(Work(how=how))
        async with working(self.app):
            return [line.text for line in await self.lines(made.id)]


@asynccontextmanager
async def scene(ground: Any, raw: Any, job_log: str = "ctx", **options: Any) -> AsyncIterator[Scene]:
    made = Scene(ground, raw, job_log, **options)
    async with made.app:
        yield made


async def test_what_a_handler_logs_is_kept_with_its_job_and_is_clean(ground, raw):
    async with scene(ground, raw) as it:
        made = await it.app.enqueue(Work())
        async with working(it.app):
            first, second = await it.lines(made.id)
        assert (first.text, first.level, first.attempt, first.hop, first.deliveries) == (
            "said attempt_of=1",
            "info",
            1,
            0,
            1,
        )
        assert second.level == "warning"
        assert second.text == "and more more=[1] payload=[not logged] url=redis://u:***@host/0"
        assert await it.lines(made.id, follow=False) == [first, second]
        assert 0 < raw.pttl(key_of(raw)) <= LIFE * 1000


def key_of(raw: Any) -> bytes:
    (key,) = raw.keys("*:log:*")
    return key


async def test_an_exception_is_kept_with_its_traceback_and_controls_are_spelled_out(ground, raw):
    async with scene(ground, raw) as it:
        (text,) = await it.texts("raise inside")
        assert text.startswith("it failed\nTraceback (most recent call last):")
        assert "ValueError: password=***" in text
        assert "hunter2" not in text
        assert "\x1b" not in text


async def test_each_attempt_is_apart(ground, raw):
    async with scene(ground, raw) as it:
        made = await it.app.enqueue(Work(how="fail once"))
        async with working(it.app):
            lines = await it.lines(made.id)
        assert [(line.text, line.attempt, line.hop) for line in lines] == [("attempt 1", 1, 0), ("attempt 2", 2, 1)]


async def test_the_last_lines_are_kept_and_it_is_said_how_many_are_missing(ground, raw):
    async with scene(ground, raw, job_log_lines=10) as it:
        made = await it.app.enqueue(Work(how="many"))
        async with working(it.app):
            lines = await it.lines(made.id)
        assert [line.text for line in lines] == [f"line {number}" for number in range(20, 30)]
        assert [line.missed for line in lines] == [20] + [0] * 9


async def test_lines_are_read_while_the_job_runs(ground, raw):
    async with scene(ground, raw) as it:
        made = await it.app.enqueue(Work(how="wait"))
        async with working(it.app):
            lines = it.app.job_log(made.id, follow=True)
            with anyio.fail_after(20):
                assert (await anext(lines)).text == "first"
                it.go.set()
                assert [line.text async for line in lines] == ["last"]


async def test_threads_log_too(ground, raw):
    async with scene(ground, raw) as it:
        assert await it.texts("thread") == ["of a thread", "of a thread of its own"]


async def test_the_logging_of_libraries_is_kept_only_where_it_is_wanted(ground, raw):
    async with scene(ground, raw, "all") as it:
        assert await it.texts("library") == [
            "by the library: password=*** logger_name=a.library", "in its thread logger_name=a.library", "by ctx",
        ]  # fmt: skip
    async with scene(ground, raw) as it:
        assert await it.texts("library") == ["by ctx"]
    assert not [each for each in logging.getLogger().handlers if type(each).__module__.startswith("streamworker")]


async def test_a_handler_in_a_process_logs_by_its_worker(ground, raw):
    async with scene(ground, raw) as it:
        made = await it.app.enqueue(Heavy())
        async with working(it.app):
            first, second = await it.lines(made.id)
    assert (first.level, first.text) == ("info", "begun url=redis://u:***@host/0 attempt_of=1")
    assert second.level == "error"
    assert second.text.startswith("failed step=2\nTraceback")
    assert second.text.endswith("ValueError: inside")


async def test_a_job_that_logs_nothing_pays_nothing_and_off_keeps_nothing(ground, raw, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(RedisBroker, "emit", lambda *args: calls.append(args))
    for job_log, how in (("all", "nothing"), ("off", "say")):
        async with scene(ground, raw, job_log) as it:
            await it.app.enqueue(Work(how=how))
            async with working(it.app) as (worker,):
                await eventually(worker.ready.is_set)
                await eventually(lambda worker=worker: worker._in_flight.counts.done == 1)
    assert calls == []
    assert not raw.keys("*:log:*")


def lines_of(claim: Any, *texts: str) -> Any:
    run = RunLog(claim, read_document(claim.body), 10)
    for text in texts:
        run.add(msgspec.msgpack.encode(LogLine(1.0, "info", text, run.hop, run.deliveries)))
    return run.batch()


async def test_a_zombie_adds_no_line_to_the_log_of_its_successor(broker_factory, ground):
    async with broker_factory("zombie") as zombie, broker_factory("rescuer") as rescuer:
        await zombie.publish([job("a")])
        claim = await one(zombie)
        assert await zombie.emit([lines_of(claim, "old")]) == [Settled.SETTLED]
        ground.ripen(claim)
        (taken,) = await recover(rescuer, ground)
        assert await zombie.emit([lines_of(claim, "old", "late")]) == [Settled.LOST]
        assert await rescuer.emit([lines_of(taken, "new")]) == [Settled.SETTLED]
        async with rescuer.output(["q"], "a", log=True) as reader:
            entries = await reader.read(0)
        assert len(entries) == 2
        assert b"late" not in b"".join(entry.chunks for entry in entries)
        async with rescuer.output(["q"], "a") as reader:
            assert await reader.read(0) == []  # the output is another one


async def test_a_frozen_run_whose_claim_was_lost_logs_on_without_an_error(ground, raw):
    async with scene(ground, raw) as it:
        made = await it.app.enqueue(Work(how="wait"))
        async with working(it.app) as (worker,):
            with anyio.fail_after(20):
                await it.begun.wait()
            (run,) = worker._in_flight._runs.values()
            await eventually(lambda: raw.keys("*:log:*"))
            worker._shared.logs.runs[run.claim.place, run.claim.entry].close("lost")
            it.go.set()
            await eventually(lambda: worker._in_flight.counts.done == 1)
        assert [line.text for line in await it.lines(made.id, follow=False)] == ["first"]
