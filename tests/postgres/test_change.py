"""A job that is changed while it waits: with a ledger its row follows; before a relay took it, its row alone is changed."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

from streamworker import App
from streamworker.errors import InvalidJob, StreamworkerError, UsageError
from streamworker.operators import JobChange, waiting_jobs
from streamworker.views.listing import READY, Selection
from streamworker.web.bulk import BulkJob, BulkJobs
from tests import forkserver
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working

ROOT = Path(__file__).parents[2]
ROW = """select queue_name as queue, level, status, payload::text, convert_from(document, 'UTF8') as document,
  extract(epoch from run_at)::float8 as run_at from streamworker.jobs where id = $1"""


@pytest.mark.parametrize("moved", [False, True], ids=["stays", "moves"])
async def test_the_row_follows(redis_url, database_url, pg, raw, moved):
    app = App(settings=settings_for(redis_url, database_url, relay="on", concurrency=1))

    @app.handler
    async def handler(payload: Job) -> None: ...

    async with app:
        async with working(app):
            async with pg.transaction():
                made = await app.enqueue(Job(n=1), connection=pg)

            async def parked():
                return await pg.fetchval("select status from streamworker.jobs where id = $1", made.id) == "completed"

            await eventually(parked)
        await pg.execute("update streamworker.jobs set status = 'dispatched', hop = 1, finished_at = null")
        body = json.dumps({"id": made.id, "kind": Job.__kind__, "payload": {"n": 1}, "hop": 1})
        raw.zadd("stream:{q}:due", {f"normal/{made.id}/0": 4e12})
        raw.hset("stream:{q}:bodies", f"normal/{made.id}/0", body)
        assert await app.change(
            made.id, queue="q", fields={"n": 5}, level="high", **({"to_queue": "other"} if moved else {})
        )
        row = await pg.fetchrow("select queue_name, level, payload::text from streamworker.jobs where id = $1", made.id)
        assert (row["queue_name"], row["level"], json.loads(row["payload"])["n"]) == (
            "other" if moved else "q",
            "high",
            5,
        )
        assert await pg.fetchval("select queue_name from streamworker.job_logs") == row["queue_name"]
        await app.change(made.id, queue=row["queue_name"], run_at=2_000_000_000.0)
        at = await pg.fetchval(
            "select extract(epoch from run_at)::float8 from streamworker.jobs where id = $1", made.id
        )
        assert at == 2_000_000_000.0


def app_of(redis_url: str, database_url: str, ran: list[Any] | None = None) -> App[Any]:
    app: App[Any] = App(settings=settings_for(redis_url, database_url, relay="on"))

    @app.handler
    async def handler(payload: Job) -> None:
        if ran is not None:
            ran.append(payload)

    return app


async def queued(app: App[Any], pg: Any, n: int = 1, **options: Any) -> str:
    """A job that waits in the ledger."""
    async with pg.transaction():
        return str((await app.enqueue(Job(n=n), connection=pg, **options)).id)


async def test_a_job_that_no_relay_has_taken(redis_url, database_url, pg, raw):
    ran: list[Any] = []
    async with app_of(redis_url, database_url, ran) as app:
        made = await queued(app, pg, delay=3600, headers={"trace": "kept"})
        assert await app.change(made, queue="q", fields={"n": 2}, level="high")
        row = await pg.fetchrow(ROW, made)
        assert (row["level"], row["status"], json.loads(row["payload"])["n"]) == ("high", "queued", 2)
        assert abs(row["run_at"] - (datetime.now(UTC) + timedelta(hours=1)).timestamp()) < 60  # as before
        with pytest.raises(InvalidJob, match="the payload is no Job"):
            await app.change(made, queue="q", fields={"n": "text"})
        assert await app.change(made, queue="q", run_at=2_000_000_000.0, to_queue="other")
        row = await pg.fetchrow(ROW, made)
        assert (row["queue"], row["run_at"], json.loads(row["payload"])["n"]) == ("other", 2_000_000_000.0, 2)
        assert not [key for key in raw.keys("*") if b"due" in key or b"bodies" in key]
        assert await app.change(made, queue="other", to_queue="q")
        async with working(app):
            assert await app.change(made, queue="q", delay=0)  # and its relay hears of it
            await eventually(lambda: [payload.n for payload in ran] == [2])
        assert not await app.change(made, queue="q", level="low")
    audited = await pg.fetch("select action, job_id, result, details from streamworker.audit order by id")
    assert [(row["action"], row["job_id"], row["result"]) for row in audited] == [("change", made, "done")] * 4
    assert "level=high" in audited[0]["details"]


async def test_a_job_that_only_its_document_holds(redis_url, database_url, pg):
    """A payload that jsonb cannot hold is in a document, which is changed then."""
    ran: list[Any] = []
    async with app_of(redis_url, database_url, ran) as app:
        made = await queued(app, pg, delay=3600, headers={"nul": "\x00"})
        row = await pg.fetchrow(ROW, made)
        assert (row["payload"], "nul" in row["document"]) == (None, True)
        assert await app.change(made, queue="q", fields={"n": 7}, level="low")
        row = await pg.fetchrow(ROW, made)
        assert (row["payload"], json.loads(row["document"])["payload"]["n"], row["level"]) == (None, 7, "low")
        assert json.loads(row["document"])["headers"] == {"nul": "\x00"}
        assert await app.change(made, queue="q", delay=0)
        async with working(app):
            await eventually(lambda: [payload.n for payload in ran] == [7])


async def test_what_has_to_stay(redis_url, database_url, pg):
    async with app_of(redis_url, database_url) as app:
        for options in ({"key": "k"}, {}):
            made = await queued(app, pg, delay=600, **options)
            if not options:
                await pg.execute("update streamworker.jobs set fair_key = 'tenant' where id = $1", made)
            with pytest.raises(UsageError, match="has to stay there"):
                await app.change(made, queue="q", to_queue="other")
            assert await app.change(made, queue="q", level="high")
        await pg.execute("update streamworker.jobs set status = 'blocked' where id = $1", made)
        with pytest.raises(UsageError, match="waits for other jobs of its flow"):
            await app.change(made, queue="q", level="low")


async def locked(pg: Any) -> bool:
    """Whether a statement waits for a row."""
    return bool(
        await pg.fetchval(
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
    )


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_a_row_that_a_relay_holds_is_waited_for(redis_url, database_url, pg, ends):
    """The relay has it: then it is as it was, and the sentence says so. The relay gave up: then it is changed."""
    relay = await asyncpg.connect(database_url)
    async with app_of(redis_url, database_url) as app:
        made = await queued(app, pg, delay=600)
        claim = relay.transaction()
        await claim.start()
        await relay.execute("update streamworker.jobs set status = 'dispatching', hop = 1 where id = $1", made)
        change = asyncio.create_task(app.change(made, queue="q", fields={"n": 5}))
        await eventually(lambda: locked(pg))
        await getattr(claim, ends)()
        if ends == "commit":
            with pytest.raises(StreamworkerError, match="a relay takes the job .* at this moment"):
                await change
        else:
            assert await change
        assert json.loads((await pg.fetchrow(ROW, made))["payload"])["n"] == (1 if ends == "commit" else 5)
    await relay.close()


async def test_two_changes_at_once_both_hold(redis_url, database_url, pg):
    async with app_of(redis_url, database_url) as app:
        made = await queued(app, pg, delay=600)
        async with anyio.create_task_group() as group:
            for change in ({"level": "high"}, {"fields": {"n": 9}}, {"run_at": 2_000_000_000.0}):
                group.start_soon(lambda wanted: app.change(made, queue="q", **wanted), change)
        row = await pg.fetchrow(ROW, made)
        assert (row["level"], row["run_at"], json.loads(row["payload"])["n"]) == ("high", 2_000_000_000.0, 9)


async def test_jobs_that_a_relay_takes_meanwhile_run_once_as_they_were_or_as_they_are(redis_url, database_url, pg):
    """Every answer is true: changed jobs run changed, the others as they were; none is lost, none runs twice."""
    ran: list[Any] = []
    changed: set[int] = set()
    async with app_of(redis_url, database_url, ran) as app, working(app), app.operator() as operator:
        changer = app.changer(operator)

        async def one(n: int) -> None:
            made = await queued(app, pg, n)
            try:
                if await changer.change_by_id("q", made, JobChange(fields={"n": n + 1000})):
                    changed.add(n)
            except StreamworkerError as error:
                assert "at this moment" in str(error)  # noqa: PT017

        for n in range(60):
            await one(n)
        await eventually(lambda: len(ran) >= 60)
    assert sorted(payload.n for payload in ran) == sorted(n + 1000 if n in changed else n for n in range(60))


async def test_the_command_line_and_the_dashboard_change_both(redis_url, database_url, pg, tmp_path):
    """By conditions and by ids: jobs that wait in Redis, and those that wait in the ledger."""
    (tmp_path / "noting.py").write_text(
        "from streamworker import App\nfrom tests.postgres.working import Job\n\napp = App()\n\n\n"
        "@app.handler\nasync def handler(payload: Job) -> None: ...\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))}
    env |= {"PYTHONPATH": f"{ROOT}:{tmp_path}", "REDIS_URL": redis_url, "DATABASE_URL": database_url}

    def call(*words: str) -> Any:
        return forkserver.run(["delayed", "change", *words], env=env, cwd=ROOT, timeout=50)

    async with app_of(redis_url, database_url) as app, app.operator() as operator:
        waits, due = await queued(app, pg, delay=600), await queued(app, pg)
        sent = str((await app.enqueue(Job(n=1), delay=600)).id)
        found = [job.job_id async for job in waiting_jobs(operator, Selection(queue="q"))]
        assert found == [waits, sent]
        assert [job.job_id async for job in waiting_jobs(operator, Selection(), READY)] == [due]

        done = await asyncio.to_thread(
            call, "--kind", Job.__kind__, "--set", '{"n": 4}', "--app", "noting:app", "--yes"
        )
        assert (done.returncode, "changed 2 delayed jobs" in done.stdout) == (0, True), done.stderr
        done = await asyncio.to_thread(call, "--ready", due, "--level", "high", "--json", "--yes")
        assert (done.returncode, json.loads(done.stdout)["job_id"]) == (0, due), done.stderr
        assert json.loads((await pg.fetchrow(ROW, waits))["payload"])["n"] == 4
        assert (await pg.fetchrow(ROW, due))["level"] == "high"
        (job,) = (await operator.delayed("q")).rows
        assert json.loads(job.body)["payload"]["n"] == 4

        changer = app.changer(operator)
        bulk_job = BulkJob(
            "change",
            Selection(queue="q"),
            None,
            "ann",
            0,
            change=lambda job: changer.change(job, JobChange(level="low")),
        )
        bulk_jobs = BulkJobs(lambda: None)
        bulk_jobs.begin(operator, bulk_job)
        await eventually(lambda: bulk_job.state == "done")
        assert bulk_job.tally["done"] == 2
        assert (await pg.fetchrow(ROW, waits))["level"] == "low"
