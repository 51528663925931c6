"""Batches with a ledger: one call, and a row for each job with its own outcome, attempts and result."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import anyio
import asyncpg
import pytest

from streamworker import App, Backoff, Context, Discard, Snooze
from streamworker.errors import RunEnded
from tests.conftest import eventually, nothing_left
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
            run = next(run for run in worker._in_flight.snapshot() if run.job_id == ids[1])
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


@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.parametrize("same", [1, 2, 3])
async def test_an_ending_belongs_to_its_job(redis_url, database_url, pg, raw, mode, same):
    """What docs/batches.md shows, with entries of one id among innocents, and no attempt to spare."""
    app = App(settings=settings_for(redis_url, database_url, mode=mode))
    await pg.execute("create table effect (n int)")
    calls: list[int] = []

    @app.handler(batch=10, linger=0.3, max_attempts=1)
    async def handler(payloads: list[Job], contexts: list[Context]) -> None:
        calls.append(len(payloads))
        async with contexts[0].database.acquire() as connection, connection.transaction():
            for payload, context in zip(payloads, contexts, strict=True):
                await context.complete(connection)
                await connection.execute("insert into effect values ($1)", payload.n)

    bodies = [("same", 0)] * same + [(f"own-{n}", n) for n in (1, 2, 3)]
    documents = [json.dumps({"id": job, "kind": "job", "payload": {"n": n}}) for job, n in bodies]
    async with app, working(app):
        for body in documents:
            raw.xadd("stream:{q}", {"job": body}) if mode == "stream" else raw.lpush("queue:q", body)

        async def completed() -> bool:
            return await pg.fetchval("select count(*) from streamworker.jobs where finished_at is not null") == 4

        await eventually(completed, 20)
        await eventually(lambda: not raw.exists("queue:q", "stream:{q}:leases") and nothing_left(raw, "stream:{q}"))
    assert [row["n"] for row in await pg.fetch("select n from effect order by n")] == [0, 1, 2, 3]
    rows = await pg.fetch("select id, status, attempt_count from streamworker.jobs order by id")
    assert [tuple(row) for row in rows] == [(job, "completed", 0) for job in ("own-1", "own-2", "own-3", "same")]
    assert not raw.exists("stream:{q}:dead")


async def test_a_job_that_another_run_holds_ends_its_run_alone(app, pg, raw, database_url):
    """The others are done meanwhile, and it when the other run has gone."""
    await pg.execute("create table effect (n int)")

    @app.handler(batch=10, linger=0.3, max_attempts=1)
    async def handler(payloads: list[Job], contexts: list[Context]) -> None:
        for payload, context in zip(payloads, contexts, strict=True):
            async with context.transaction() as connection:
                await connection.execute("insert into effect values ($1)", payload.n)

    async def done() -> list[int]:
        return [row["n"] for row in await pg.fetch("select n from effect order by n")]

    await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('held', 'q', 'dispatched')")
    async with app, working(app):
        async with pg.transaction():
            await pg.execute("select 1 from streamworker.jobs where id = 'held' for update")
            for n, job in enumerate(("a", "held", "b", "c")):
                raw.xadd("stream:{q}", {"job": json.dumps({"id": job, "kind": "job", "payload": {"n": n}})})
            other = await asyncpg.connect(database_url)

            async def without_it() -> bool:
                return [row["n"] for row in await other.fetch("select n from effect order by n")] == [0, 2, 3]

            await eventually(without_it, 20)
            await other.close()
        await eventually(lambda: nothing_left(raw, "stream:{q}"), 20)
    assert await done() == [0, 1, 2, 3]
    assert await pg.fetchval("select sum(attempt_count) from streamworker.jobs") == 0


async def test_an_error_of_the_handlers_own_still_charges_every_job(app, pg, raw):
    """Though a run ended before it, and the handler went on."""

    @app.handler(batch=10, linger=0.3, max_attempts=1)
    async def handler(payloads: list[Job], contexts: list[Context]) -> None:
        async with contexts[0].database.acquire() as connection, connection.transaction():
            for context in contexts:
                with suppress(RunEnded):
                    await context.complete(connection)
            raise ValueError("broken")

    async with app, working(app):
        for job in ("same", "same", "own"):
            raw.xadd("stream:{q}", {"job": json.dumps({"id": job, "kind": "job", "payload": {}})})
        await eventually(lambda: raw.exists("stream:{q}:dead") and nothing_left(raw, "stream:{q}"), 20)
    rows = await pg.fetch("select id, status from streamworker.jobs order by id")
    assert [tuple(row) for row in rows] == [("own", "dead"), ("same", "dead")]
