"""Cancelling with a ledger: what it says is final, what runs ends as cancelled, and nothing brings the job back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import anyio
import pytest

from streamworker import App, Context
from streamworker.relay import Lost
from tests import inprocess
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def scene(redis_url, database_url):
    app = App(settings=settings_for(redis_url, database_url, relay="on", concurrency=1))
    app.ran = []

    @app.handler
    async def handler(payload: Job, ctx: Context) -> None:
        app.ran.append(ctx.job.id)
        if payload.n < 0:
            await anyio.sleep_forever()

    async with app:
        yield app


async def status(pg, job_id):
    return await pg.fetchval("select status from streamworker.jobs where id = $1", job_id)


@pytest.mark.parametrize("noted", [True, False], ids=["known to run", "young"])
async def test_a_running_job_is_recorded_as_cancelled(scene, pg, raw, noted):
    async with working(scene) as worker:
        made = await scene.enqueue(Job(n=-1))
        await eventually(lambda: scene.ran)
        if noted:

            async def running():
                return await status(pg, made.id) == "running"

            await eventually(running)
        assert await scene.cancel(made.id) == "asked"
        await eventually(lambda: worker._in_flight.counts.cancelled == 1)
        record = await scene.find(made.id)
        assert (record.status, record.error, record.attempts) == ("cancelled", None, 0)
        assert record.finished_at is not None
        assert await pg.fetchval("select outcome from streamworker.job_logs") == "cancelled"
        assert await scene.cancel(made.id) == "ended"
    assert not raw.exists("stream:{q}", "stream:{q}:dead", "stream:{q}:cancelled") or raw.xlen("stream:{q}") == 0


async def test_what_waits_is_cancelled_for_good(scene, pg, raw):
    async with pg.transaction():
        queued = await scene.enqueue(Job(), connection=pg)
    assert await scene.cancel(queued.id) == "cancelled"
    assert not raw.exists("stream:{q}:cancelled")  # it never left the ledger
    async with working(scene) as worker:
        blocker = await scene.enqueue(Job(n=-1))
        await eventually(lambda: scene.ran == [blocker.id])
        async with pg.transaction():
            sent = await scene.enqueue(Job(), connection=pg)

        async def dispatched():
            return await status(pg, sent.id) == "dispatched"

        await eventually(dispatched)
        straight = await scene.enqueue(Job())
        assert await scene.cancel(sent.id) == "cancelled"
        assert await scene.cancel(straight.id) == "asked"
        await scene.cancel(blocker.id)
        await eventually(lambda: worker._in_flight.counts.cancelled == 3)
        assert scene.ran == [blocker.id]
        assert {await status(pg, each.id) for each in (queued, sent, straight, blocker)} == {"cancelled"}
        await eventually(lambda: not raw.exists("stream:{q}:cancelled"))


@pytest.mark.parametrize("end", ["cancel", "drop delayed", "drop dead", "drop pending", "purge", "purge dead"])
async def test_a_key_that_the_ledger_remembers_is_free_once_its_job_was_ended_by_hand(scene, pg, raw, end):
    async def enqueued(number):
        async with pg.transaction():
            return await scene.enqueue(Job(n=number), key="k", connection=pg)

    async def page(listing):
        rows, after = [], ""
        while after is not None:
            found = await getattr(operator, listing)("q", after)
            rows, after = rows + found.rows, found.after
        return rows

    first = await enqueued(-1 if end == "drop pending" else 0)
    assert (await scene.enqueue(Job(), key="k")).id == first.id, "one key, whichever way its jobs come"
    assert (await enqueued(0)).id == first.id
    async with scene.operator() as operator, scene.relaying() as relaying, anyio.create_task_group() as group:
        stopping = anyio.Event()
        group.start_soon(relaying.run, stopping)
        await eventually(lambda: raw.xlen("stream:{q}") == 1)
        stopping.set()
        (body,) = [fields[b"job"] for _, fields in raw.xrange("stream:{q}") if first.id.encode() in fields[b"job"]]
        if end == "cancel":
            assert await scene.cancel(first.id) == "cancelled"
        elif end == "drop delayed":
            raw.zadd("stream:{q}:due", {f"normal/{first.id}/00000000": 9e15})
            raw.hset("stream:{q}:bodies", f"normal/{first.id}/00000000", body)
            (row,) = await page("delayed")
            assert await operator.forget(row)
        elif end in ("drop dead", "purge dead"):
            raw.xadd("stream:{q}:dead", {"job": body, "id": first.id})
            (letter,) = await page("dead")
            assert await (operator.purge("q", "dead", 10) if end == "purge dead" else operator.erase(letter))
        elif end == "purge":
            assert await operator.purge("q", "ready", 10) == 1
        else:
            async with working(scene):
                await eventually(lambda: first.id in scene.ran)
                (row,) = [each for each in await page("pending") if each.job_id == first.id]
                assert await operator.drop(row)
    again = await enqueued(0)
    assert again.new and again.id != first.id
    assert (await scene.enqueue(Job(), key="k")).id == again.id


async def test_a_lost_redis_does_not_bring_it_back(scene, pg, raw):
    async with pg.transaction():
        made = await scene.enqueue(Job(), connection=pg)
    async with scene.relaying() as relaying:
        await pg.execute("update streamworker.jobs set status = 'dispatched', updated_at = now() - interval '1 hour'")
        await scene.cancel(made.id)
        raw.flushall()
        ids, before = await relaying.missing("q")
        assert ids == []
        assert await relaying.outbox.lost("q", [made.id], before) == Lost([], [])
    assert await status(pg, made.id) == "cancelled"


async def test_one_that_is_queued_again_runs(scene, pg, raw):
    """Also if its mark was never taken."""
    raw.zadd("stream:{q}:cancelled", {"again": 9e15})
    raw.hset("stream:{q}:meta", "cancelled", "1")
    await pg.execute(
        "insert into streamworker.jobs (id, queue_name, kind, status, payload) values ('again', 'q', 'job', 'cancelled', '{}')"
    )
    async with scene.operator() as operator, scene.archive() as archive:
        await operator.uncancel("q", "again")
        assert await archive.retry("q", "again")
    async with working(scene):
        await eventually(lambda: scene.ran == ["again"])


@pytest.fixture
def streamworker(redis_url, database_url):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "REDIS"))}
    env = {**clean, "PYTHONPATH": str(ROOT), "DATABASE_URL": database_url, "REDIS_URL": redis_url, "NO_COLOR": "1"}

    def run(*words, **more):
        return inprocess.run(words, env={**env, **more}, cwd=ROOT)

    return run


def test_on_the_command_line(streamworker, raw, database_url):
    raw.xadd("stream:{q}", {"job": json.dumps({"id": "a", "kind": "job", "payload": {}})})
    unknown = streamworker("jobs", "cancel", "a", "--yes")
    assert unknown.returncode == 1
    done = streamworker("jobs", "cancel", "a", "--queue", "q", "--yes")
    assert (done.returncode, done.stdout) == (0, "cancelled 1 job\n"), done.stderr
    assert raw.zscore("stream:{q}:cancelled", "a")
    done = streamworker("jobs", "cancel", "b", "--queue", "q", "--yes", DATABASE_URL="")
    assert (done.returncode, done.stdout) == (0, "cancelled 1 job\n"), done.stderr
    assert raw.zcard("stream:{q}:cancelled") == 2
    refused = streamworker("jobs", "cancel", "b", "--yes", DATABASE_URL="")
    assert refused.returncode == 2
    assert "--queue" in refused.stderr
