"""Batches with a ledger: one call, and a row for each job with its own outcome, attempts and result."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Context, Discard, Snooze
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working


@pytest.fixture
def app(redis_url: str, database_url: str) -> App[None]:
    return App(settings=settings_for(redis_url, database_url))


async def test_each_job_is_recorded_by_its_own_outcome(app, pg, raw):
    calls: list[list[int]] = []

    @app.handler(batch=6, linger=1.0, max_attempts=2, backoff=Backoff(base=0.01, jitter=0))
    async def handler(payloads: list[Job], contexts: list[Context]) -> list[Any]:
        calls.append(sorted(payload.n for payload in payloads))
        outcomes: list[Any] = []
        for payload, context in zip(payloads, contexts, strict=True):
            match payload.n:
                case 0:
                    outcomes.append({"answer": 42})
                case 1:
                    outcomes.append(ValueError("never works"))
                case 2:
                    outcomes.append(Discard("not wanted"))
                case 3:
                    outcomes.append(Snooze(0.01) if context.job.hop == 0 else "snoozed once")
                case 4:
                    outcomes.append(OSError("once") if context.attempt == 1 else "second time")
                case _:
                    outcomes.append(None)
        return outcomes

    async with app:
        ids = [each.id for each in await app.enqueue_many([Job(n=n) for n in range(6)])]
        async with working(app):

            async def ended() -> bool:
                return await pg.fetchval("select count(*) from streamworker.jobs where finished_at is not null") == 6

            await eventually(ended)
            assert [await app.result(ids[n], timeout=30) for n in (0, 3, 4, 5)] == [
                {"answer": 42}, "snoozed once", "second time", None,
            ]  # fmt: skip
            await eventually(lambda: raw.xlen("stream:{q}") == 0)
    assert calls[0] == [0, 1, 2, 3, 4, 5]  # one call, six ends
    rows = {each["id"]: each for each in await pg.fetch("select * from streamworker.jobs")}
    told = {
        n: (row["status"], row["attempt_count"], None if row["result"] is None else json.loads(row["result"]))
        for n, row in ((n, rows[job_id]) for n, job_id in enumerate(ids))
    }
    assert told == {
        0: ("completed", 0, {"answer": 42}),
        1: ("dead", 2, None),
        2: ("dead", 0, None),
        3: ("completed", 0, "snoozed once"),
        4: ("completed", 1, "second time"),
        5: ("completed", 0, None),
    }
    assert rows[ids[1]]["last_error"] == "failed 2 of 2 attempts: ValueError: never works"
    assert rows[ids[2]]["last_error"] == "discarded: not wanted"
    logs = await pg.fetch("select job_id, outcome from streamworker.job_logs order by job_id, hop, deliveries")
    words = {n: [each["outcome"] for each in logs if each["job_id"] == job_id] for n, job_id in enumerate(ids)}
    assert words == {
        0: ["ok"], 1: ["raised", "raised"], 2: ["discarded"], 3: ["snoozed", "ok"], 4: ["raised", "ok"], 5: ["ok"],
    }  # fmt: skip


async def test_one_that_is_cancelled_is_recorded_as_such_and_the_others_are_not(app, pg, raw):
    began, gate = anyio.Event(), anyio.Event()

    @app.handler(batch=3, linger=60, max_attempts=1)
    async def handler(payloads: list[Job], contexts: list[Context]) -> list[Any]:
        began.set()
        await gate.wait()
        return [
            ValueError("stopped") if context.cancelled else payload.n
            for payload, context in zip(payloads, contexts, strict=True)
        ]

    async with app:
        ids = [each.id for each in await app.enqueue_many([Job(n=n) for n in range(3)])]
        async with working(app) as worker:
            await began.wait()
            assert await app.cancel(ids[1]) == "asked"
            run = next(run for run in worker._holdings.snapshot() if run.job_id == ids[1])
            await eventually(lambda: run.cause is not None)
            gate.set()

            async def ended() -> bool:
                return await pg.fetchval("select count(*) from streamworker.jobs where finished_at is not null") == 3

            await eventually(ended)
            await eventually(lambda: raw.xlen("stream:{q}") == 0)
        records = [await app.find(each) for each in ids]
    assert [(each.status, each.attempts, each.error) for each in records] == [
        ("completed", 0, None), ("cancelled", 0, None), ("completed", 0, None),
    ]  # fmt: skip
    assert [records[0].result, records[2].result] == [0, 2]
    assert not raw.exists("stream:{q}:cancelled", "stream:{q}:dead")
