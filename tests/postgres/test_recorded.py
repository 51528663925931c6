"""Workers with a ledger: what a job's row says in the end, and what becomes of claims the ledger knows."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest

from streamworker import App, Backoff, Context, Discard, Snooze, codec
from streamworker.postgres import run_record
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.pool import open_database
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working

Q = "stream:{q}"


async def status(pg: asyncpg.Connection, job_id: str) -> str | None:
    return await pg.fetchval("select status from streamworker.jobs where id = $1", job_id)


async def ended(raw: Any) -> bool:
    return not any(raw.xlen(Q + level) for level in (":high", "", ":low")) and not raw.exists(f"{Q}:due")


def put(raw: Any, job_id: str, **fields: Any) -> None:
    raw.xadd(Q, {"job": json.dumps({"id": job_id, "kind": "job", "payload": {}, **fields})})


@pytest.fixture
def app(redis_url: str, database_url: str) -> App[None]:
    return App(settings=settings_for(redis_url, database_url))


async def test_every_ending_is_recorded(app, raw, pg):
    @app.handler(max_attempts=2, backoff=Backoff(base=0.01, jitter=0))
    async def handler(payload: Job, ctx: Context) -> Any:
        match payload.n:
            case 0:
                return {"answer": 42}
            case 1:
                raise ValueError("no")
            case 2:
                raise Discard("never")
            case 3 if ctx.job.hop == 0:
                raise Snooze(0.05)
            case 4:
                return object()
            case 5:
                return "\x00"

    async with app, working(app):
        ids = [(await app.enqueue(Job(n=n))).id for n in range(6)]
        raw.xadd(Q, {"job": "no document"})
        raw.xadd(Q, {"job": '{"id": "odd", "kind": "job", "payload": {"n": "seven"}}'})
        await eventually(lambda: ended(raw))
        rows = {each["id"]: each for each in await pg.fetch("select * from streamworker.jobs")}
        logs = await pg.fetch("select job_id, outcome from streamworker.job_logs order by job_id, hop, deliveries")

    def words(job_id: str) -> list[str]:
        return [each["outcome"] for each in logs if each["job_id"] == job_id]

    assert [rows[each]["status"] for each in ids] == [
        "completed",
        "dead",
        "dead",
        "completed",
        "completed",
        "completed",
    ]
    assert json.loads(rows[ids[0]]["result"]) == {"answer": 42}
    assert rows[ids[1]]["last_error"] == "failed 2 of 2 attempts: ValueError: no"
    assert (rows[ids[1]]["attempt_count"], words(ids[1])) == (2, ["raised", "raised"])
    assert (rows[ids[2]]["last_error"], words(ids[2])) == ("discarded: never", ["discarded"])
    assert (rows[ids[3]]["attempt_count"], words(ids[3])) == (0, ["snoozed", "ok"])
    assert "cannot be written as JSON" in rows[ids[4]]["last_error"]
    assert "could not be stored" in rows[ids[5]]["last_error"]
    assert rows["odd"]["status"] == "dead" and rows["odd"]["kind"] == "job"
    unread = next(each for each in rows.values() if each["document"] == b"no document")
    assert unread["status"] == "dead" and unread["last_error"].startswith("undecodable")
    assert len(rows) == 8


async def test_same_id_same_job(app, raw, pg):
    ran = []

    @app.handler
    async def handler(_: Job, ctx: Context) -> None:
        ran.append(ctx.job.id)

    async with working(app) as worker:
        put(raw, "a")
        await eventually(lambda: ended(raw))
        put(raw, "a")
        put(raw, "b")
        await eventually(lambda: ended(raw))
        assert worker._in_flight.counts.skipped == 1
    assert ran == ["a", "b"]


async def test_a_cancelled_job_never_starts(app, raw, pg):
    ran = []

    @app.handler
    async def handler(_: Job, ctx: Context) -> None:
        ran.append(ctx.job.id)

    await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('a', 'q', 'cancelled')")
    put(raw, "a")
    put(raw, "b")
    async with working(app):
        await eventually(lambda: ended(raw))
    assert ran == ["b"]
    assert await status(pg, "a") == "cancelled"


async def test_a_superseded_twin_is_let_go(app, raw, pg):
    ran = []

    @app.handler
    async def handler(_: Job, ctx: Context) -> None:
        ran.append(ctx.job.hop)

    await pg.execute("insert into streamworker.jobs (id, queue_name, status, hop) values ('a', 'q', 'dispatched', 2)")
    put(raw, "a", hop=1)
    put(raw, "a", hop=2)
    async with working(app):
        await eventually(lambda: ended(raw))
    assert ran == [2]
    assert await status(pg, "a") == "completed"


@pytest.mark.parametrize("kind", ["retrying", "dead"])
async def test_a_recorded_verdict_is_applied_again(redis_url, database_url, raw, pg, kind):
    """The worker died between PostgreSQL and Redis."""
    app: App[None] = App(settings=settings_for(redis_url, database_url, lease=0.5))
    ran = []

    @app.handler
    async def handler(_: Job, ctx: Context) -> None:
        ran.append((ctx.job.hop, ctx.attempt))

    await pg.execute(
        "insert into streamworker.jobs (id, queue_name, status, deliveries, attempt_count, run_at, last_error) values "
        "('a', 'q', $1, 1, 1, now() + interval '1 hour', 'failed 1 of 1 attempts: ValueError: no')",
        kind,
    )
    # A delivery whose worker is gone: the group hands the entry out a second time.
    raw.xgroup_create(Q, "workers", "0", mkstream=True)
    put(raw, "a")
    put(raw, "b")
    raw.xreadgroup("workers", "gone", {Q: ">"})
    async with working(app):
        await eventually(lambda: not raw.xlen(Q), 20)
    assert ran == [(0, 1)]  # "b" alone
    if kind == "retrying":
        (body,) = raw.hvals(f"{Q}:bodies")
        assert json.loads(body)["attempt_count"] == 1 and json.loads(body)["hop"] == 1
        due = raw.zrange(f"{Q}:due", 0, -1, withscores=True)[0][1]
        assert due / 1000 == pytest.approx(
            (await pg.fetchval("select run_at from streamworker.jobs where id = 'a'")).timestamp(), abs=1
        )
    else:
        ((_, letter),) = raw.xrange(f"{Q}:dead")
        assert (letter[b"reason"], letter[b"error"], letter[b"attempts"]) == (
            b"failed 1 of 1 attempts",
            b"ValueError: no",
            b"1",
        )


async def test_long_runs_are_running(app, raw, pg):
    go = asyncio.Event()

    @app.handler
    async def handler(_: Job) -> None:
        await go.wait()

    async with working(app) as worker:
        put(raw, "a")
        await eventually(lambda: status(pg, "a"))
        assert await status(pg, "a") == "running"
        assert await pg.fetchval("select worker_id from streamworker.jobs") == worker.worker_id
        go.set()
        await eventually(lambda: ended(raw))
    assert await status(pg, "a") == "completed"


async def test_what_is_handed_back_waits_again(redis_url, database_url, raw, pg):
    app: App[None] = App(settings=settings_for(redis_url, database_url, grace=0))
    started = asyncio.Event()

    @app.handler
    async def handler(_: Job) -> None:
        started.set()
        await asyncio.sleep(60)

    put(raw, "a")
    async with working(app):
        await started.wait()
    assert await status(pg, "a") == "dispatched"
    assert [tuple(each) for each in await pg.fetch("select outcome, error from streamworker.job_logs")] == [
        ("interrupted", "the worker shut down")
    ]
    ((_, entry),) = raw.xrange(Q)
    assert json.loads(entry[b"job"])["hop"] == 1


@pytest.mark.all
async def test_ten_thousand_jobs(redis_url, database_url, pg, raw):
    app: App[None] = App(settings=settings_for(redis_url, database_url, concurrency=100))

    @app.handler
    async def handler(_: Job) -> None:
        pass

    async with app:
        await app.enqueue_many([Job(n=n) for n in range(10_000)])
        async with working(app):
            await eventually(lambda: ended(raw), 50)
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 10_000
    assert await pg.fetchval("select count(*) from streamworker.job_logs where outcome = 'ok'") == 10_000


async def test_only_jobs_without_a_row_are_taken_for_new(app, raw, pg, database_url, caplog):
    """A wrong guess is put right, but it costs the whole batch a second statement, and a line in the server's log."""
    caplog.set_level("DEBUG", "streamworker")

    @app.handler(max_attempts=2, backoff=Backoff(base=0.01, jitter=0))
    async def handler(payload: Job, ctx: Context) -> None:
        match payload.n:
            case 1 if ctx.attempt == 1:
                raise ValueError("once")
            case 2 if ctx.job.hop == 0:
                raise Snooze(0.05)
            case 3:
                async with ctx.transaction():
                    pass
            case 4:
                connection = await asyncpg.connect(database_url)
                async with connection.transaction():
                    await ctx.complete(connection)
                await connection.close()
            case 5:  # until it is noted as running

                async def noted() -> bool:
                    return await status(pg, ctx.job.id) == "running"

                await eventually(noted)

    async with app, working(app):
        for n in range(6):
            await app.enqueue(Job(n=n))
        await eventually(lambda: ended(raw))
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 6
    assert "jobs_not_new" not in caplog.text


async def test_a_job_that_others_record_meanwhile_is_no_longer_new(app, raw, pg, caplog):
    caplog.set_level("DEBUG", "streamworker")
    began, gate = [], asyncio.Event()

    @app.handler
    async def handler(payload: Job) -> None:
        began.append(payload.n)
        if payload.n == 0:
            await gate.wait()

    async with app, working(app):
        put(raw, "twice")
        put(raw, "beside it", payload={"n": 1})
        await eventually(lambda: len(began) == 2)
        await pg.execute(
            "insert into streamworker.jobs (id, queue_name, status, hop) values ('twice', 'q', 'dispatched', 1)"
        )
        gate.set()
        await eventually(lambda: ended(raw))
    assert "jobs_not_new" in caplog.text
    assert await status(pg, "beside it") == "completed"
    assert await status(pg, "twice") == "dispatched"  # the later hop goes on


@pytest.mark.parametrize(
    ("told", "payload", "stored"),
    [
        ('"2026-01-02T03:04:05.5Z"', "{}", "2026-01-02T03:04:05.500000+00:00"),
        ('"2026-01-02T04:04:05+01:00"', "{}", "2026-01-02T03:04:05+00:00"),
        ('"2026-01-02T03:04:05"', "{}", "2026-01-02T03:04:05+00:00"),
        ('"2026-01-02T03:04:05Z"', '{"n": "seven"}', "2026-01-02T03:04:05+00:00"),
        ('"2026-01-02T03:04:05Z", "headers": 7', "{}", "2026-01-02T03:04:05+00:00"),  # no document of a job
        ('"some time"', "{}", None),
        ("null", "{}", None),
        ("[7]", "{}", None),
    ],
)
async def test_when_a_job_was_made_is_what_its_producer_said_if_it_makes_sense(app, raw, pg, told, payload, stored):
    @app.handler
    async def handler(payload: Job) -> None: ...

    before = await pg.fetchval("select clock_timestamp()")
    async with app, working(app):
        raw.xadd(Q, {"job": f'{{"id": "a", "kind": "job", "payload": {payload}, "created_at": {told}}}'})
        await eventually(lambda: ended(raw))
    created = await pg.fetchval("select created_at from streamworker.jobs")
    assert created.isoformat() == stored if stored else created > before


def nothing(raw: Any) -> None:
    pass


def group(raw: Any) -> None:
    if raw.exists(Q):
        raw.xgroup_destroy(Q, "workers")


def meta(raw: Any) -> None:
    raw.delete(f"{Q}:meta")


def an_empty_level(raw: Any) -> None:
    raw.delete(f"{Q}:low", "queue:q:low")


@pytest.mark.parametrize("deleted", [nothing, group, meta, an_empty_level])
async def test_jobs_without_ids_that_are_done_stay_done_whatever_is_deleted(
    broker_factory, ground, redis_url, database_url, raw, pg, deleted
):
    """Their worker dies after its transactions, before Redis was told; then an operator tidies up."""
    database = await open_database(database_url)
    ledger = PostgresLedger(database, database.pool, "dead")
    await pg.execute("create table effect (n int)")
    for n in range(6):
        ground.push(f'{{"payload": {{"n": {n}}}}}')
    async with broker_factory("dead", lease=0.5) as broker:
        claims = await broker.claim(6, 0, ())
        for claim in claims:
            record = run_record(claim, codec.read(claim.body), kind="job", started=0.0)
            async with ledger.transaction(record, None) as connection:
                await connection.execute("insert into effect values (1)")
        raw.delete("streamworker:worker:dead")
        deleted(raw)
    app: App[None] = App(settings=settings_for(redis_url, database_url, mode=ground.mode, lease=0.5))

    @app.handler
    async def handler(payload: Job, ctx: Context) -> None:
        async with ctx.transaction() as connection:
            await connection.execute("insert into effect values (2)")

    async with working(app) as worker:
        await eventually(lambda: hasattr(worker, "_in_flight") and worker._in_flight.counts.skipped == 6)
    assert await pg.fetchval("select count(*) from effect") == 6
    assert await pg.fetch("select status, count(*) from streamworker.jobs group by 1") == [("completed", 6)]
    database.close()
