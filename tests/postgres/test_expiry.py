"""Expiry with a ledger: one status, by the database's clock until a job is sent; no relay and no retry starts it late."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import anyio
import asyncpg
import pytest

from streamworker import App, Backoff, Context, Payload
from streamworker.errors import JobExpired
from streamworker.postgres.migrate import Migrator, shipped
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working

PAST = "now() - interval '1 second'"


@pytest.fixture
async def scene(redis_url, database_url):
    app = App(settings=settings_for(redis_url, database_url, relay="on"))
    app.ran = []

    @app.handler(backoff=Backoff(base=30, jitter=0))
    async def handler(payload: Job, ctx: Context) -> None:
        app.ran.append(ctx.job.id)
        if payload.n < 0:
            raise ValueError("no luck")

    async with app:
        yield app


async def commit(app, pg, *jobs, **options):
    async with pg.transaction():
        return [made.id for made in await app.enqueue_many([app.job(job, **options) for job in jobs], connection=pg)]


async def status(pg, job_id):
    return await pg.fetchval("select status from streamworker.jobs where id = $1", job_id)


def until(pg, job_id, wanted):
    async def reached():
        return await status(pg, job_id) == wanted

    return eventually(reached)


@pytest.mark.parametrize("count", [1, 30], ids=["insert", "copy"])
async def test_seconds_are_counted_by_the_databases_clock(scene, pg, raw, count):
    ids = await commit(scene, pg, *(Job(n=n) for n in range(count)), expires_in=600)
    left = await pg.fetch("select id, extract(epoch from expires_at - now())::float8 as left from streamworker.jobs")
    assert {row["id"] for row in left} == set(ids) and all(590 < row["left"] <= 600 for row in left)
    async with scene.relaying() as relaying, anyio.create_task_group() as group:
        stopping = anyio.Event()
        group.start_soon(relaying.run, stopping)
        await eventually(lambda: raw.xlen("stream:{q}") == count)
        stopping.set()
    expires = await pg.fetchval("select expires_at from streamworker.jobs where id = $1", ids[0])
    bodies = [json.loads(fields[b"job"]) for _, fields in raw.xrange("stream:{q}")]
    (body,) = [each for each in bodies if each["id"] == ids[0]]
    assert datetime.fromisoformat(body["expires_at"]) == expires


async def test_the_relay_sends_nothing_that_has_expired(scene, pg, raw):
    (late,) = await commit(scene, pg, Job(), expires_in=600)
    await pg.execute(f"update streamworker.jobs set expires_at = {PAST}")
    (odd,) = await commit(scene, pg, Job(), headers={"odd": "\x00"}, expires_at=datetime(2020, 1, 1, tzinfo=UTC))
    (fresh,) = await commit(scene, pg, Job(), expires_in=600)
    async with working(scene):
        await until(pg, fresh, "completed")
        await until(pg, late, "expired")
        await until(pg, odd, "expired")
        with pytest.raises(JobExpired):
            await scene.result(late, timeout=30)
    record = await scene.find(late)
    assert record.finished_at is not None and record.expires_at is not None
    assert scene.ran == [fresh] and raw.xlen("stream:{q}") == 0


class Step(Payload, kind="step", queue="steps", order_by="of"):
    of: str
    n: int


async def test_an_expired_head_passes_its_order_key_on(redis_url, database_url, pg):
    """Whoever ends it: the relay, or the worker that has it from Redis."""
    app = App(settings=settings_for(redis_url, database_url, relay="on"))
    ran: list[int] = []

    @app.handler
    async def step(payload: Step) -> None:
        ran.append(payload.n)

    async with app:
        (late,) = await commit(app, pg, Step(of="a", n=1), expires_in=600)
        (second,) = await commit(app, pg, Step(of="a", n=2))
        await pg.execute(f"update streamworker.jobs set expires_at = {PAST} where id = $1", late)
        await app.enqueue(Step(of="b", n=3), expires_at=datetime(2020, 1, 1, tzinfo=UTC))
        last = await app.enqueue(Step(of="b", n=4))
        async with working(app):
            await until(pg, late, "expired")
            await until(pg, second, "completed")
            await until(pg, last.id, "completed")
    assert sorted(ran) == [2, 4]


async def test_any_driver_says_it(pg):
    made = await pg.fetchval("select streamworker.enqueue('job', '{}', 'q', expires_at => '2030-01-01 00:00:00+00')")
    assert (await pg.fetchval("select expires_at from streamworker.jobs where id = $1", made)).year == 2030
    with pytest.raises(asyncpg.InvalidParameterValueError, match="no run would ever start"):
        await pg.fetchval("select streamworker.enqueue('job', '{}', 'q', run_at => now(), expires_at => now())")
    far = await pg.fetchval("select streamworker.enqueue('job', '{}', 'q', expires_at => 'infinity')")
    assert (await pg.fetchval("select expires_at from streamworker.jobs where id = $1", far)).year == 9999


async def test_a_worker_records_it_and_it_is_final(scene, pg, raw):
    body = {"id": "a", "kind": "job", "payload": {}, "expires_at": "2020-01-01T00:00:00Z"}
    raw.xadd("stream:{q}", {"job": json.dumps(body)})
    async with working(scene) as worker:
        await until(pg, "a", "expired")
        await eventually(lambda: worker._in_flight.counts.expired == 1)
        assert await pg.fetchval("select outcome from streamworker.job_logs") == "expired"
        raw.xadd("stream:{q}", {"job": json.dumps({**body, "expires_at": None, "hop": 5})})  # a copy that came later
        await eventually(lambda: worker._in_flight.counts.skipped == 1)
    assert scene.ran == []


async def test_a_failed_run_whose_retry_would_be_late_is_recorded_with_its_error(scene, pg):
    made = await scene.enqueue(Job(n=-1), expires_in=20)
    async with working(scene):
        await until(pg, made.id, "expired")
    record = await scene.find(made.id)
    assert record.attempts == 1 and "no luck" in record.error
    assert await pg.fetchval("select outcome from streamworker.job_logs") == "raised"


async def test_a_job_that_redis_lost_keeps_its_moment(scene, pg, raw):
    moment = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    made = await scene.enqueue(Job(n=-1), expires_at=moment)
    async with working(scene):
        await until(pg, made.id, "retrying")
    raw.flushall()
    await pg.execute("update streamworker.jobs set status = 'queued', run_at = null, hop = hop + 1")  # as `lost` does
    async with scene.relaying() as relaying, anyio.create_task_group() as group:
        stopping = anyio.Event()
        group.start_soon(relaying.run, stopping)
        await eventually(lambda: raw.xlen("stream:{q}") == 1)
        stopping.set()
    ((_, fields),) = raw.xrange("stream:{q}")
    assert datetime.fromisoformat(json.loads(fields[b"job"])["expires_at"]) == moment


async def test_an_expired_job_is_not_queued_anew_and_is_forgotten_in_time(scene, pg):
    (late,) = await commit(scene, pg, Job(), expires_in=600)
    await pg.execute(f"update streamworker.jobs set expires_at = {PAST}")
    async with working(scene):
        await until(pg, late, "expired")
    archive = await scene._connection.required_archive()
    assert not await archive.retry("q", late)
    await pg.execute("update streamworker.jobs set finished_at = now() - interval '31 days'")
    assert await archive.prunable("q") == 1
    assert await archive.prune("q") == 1
    assert await status(pg, late) is None


async def test_a_dead_job_is_queued_anew_while_it_has_time(scene, pg):
    await pg.execute("""insert into streamworker.jobs (id, queue_name, kind, payload, status, expires_at) values
        ('late', 'q', 'job', '{}', 'dead', now()), ('fresh', 'q', 'job', '{}', 'dead', now() + interval '1 hour')""")
    archive = await scene._connection.required_archive()
    assert (await archive.retry("q", "late"), await archive.retry("q", "fresh")) == (False, True)


async def test_who_may_enqueue_stays_who_may(empty_database):
    before = [each for each in shipped() if each.version < 9]
    await Migrator(empty_database, before).up()
    pg = await asyncpg.connect(empty_database)
    try:
        await pg.execute("revoke execute on function streamworker.enqueue from public")
        rights = await pg.fetchval("select proacl::text from pg_proc where proname = 'enqueue'")
        await Migrator(empty_database, [each for each in shipped() if each.version <= 13]).up()
        await pg.execute("revoke execute on function streamworker.enqueue_unique from public")
        await Migrator(empty_database).up()
        for name in ("enqueue", "enqueue_unique"):
            assert await pg.fetchval("select proacl::text from pg_proc where proname = $1", name) == rights
    finally:
        await pg.close()
