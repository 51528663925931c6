"""What people ask the ledger, and do to its jobs: app.find, and `streamworker jobs` as people run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from streamworker import App, Context
from streamworker.errors import ConfigurationError, UsageError
from streamworker.postgres import Wanted
from streamworker.postgres.archive import PAGE, PostgresArchive
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.pool import Database, open_database
from tests import inprocess
from tests.cli.test_about import HEAVY, imported
from tests.conftest import eventually
from tests.postgres.databases import beside
from tests.postgres.test_ledger import run_of
from tests.postgres.working import Job, settings_for, working

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await open_database(database_url)
    yield database
    database.close()


@pytest.fixture
def archive(database: Database) -> PostgresArchive:
    return PostgresArchive(database)


async def ids(archive: PostgresArchive, **wanted: Any) -> list[str]:
    return [job.id async for job in archive.jobs(Wanted(**wanted))]


INSERT = "insert into streamworker.jobs (id, queue_name, kind, status, created_at) values ($1, $2, $3, $4, $5)"


async def test_listing(archive, pg):
    now = datetime.now(UTC)
    for n, (queue, kind, status) in enumerate(
        [("a", "k", "completed"), ("a", "l", "dead"), ("b", "k", "dead"), ("b", "k", "queued")]
    ):
        await pg.execute(INSERT, f"job-{n}", queue, kind, status, now - timedelta(minutes=n))
    assert await ids(archive) == ["job-0", "job-1", "job-2", "job-3"]
    assert await ids(archive, queue="b") == ["job-2", "job-3"]
    assert await ids(archive, kind="k", statuses=("dead", "queued")) == ["job-2", "job-3"]
    assert await ids(archive, since=now - timedelta(seconds=90)) == ["job-0", "job-1"]
    assert await ids(archive, ids=frozenset(["job-3", "job-0", "nobody"])) == ["job-0", "job-3"]
    assert await ids(archive, queue="a", kind="k", statuses=("dead",)) == []


async def test_pages(archive, pg):
    """Many jobs of the same moment: the key decides where a page goes on."""
    count = 2 * PAGE + 3
    moments = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n // 400) for n in range(count)]
    await pg.executemany(INSERT, [(f"job-{n}", "q", "k", "completed", moments[n]) for n in range(count)])
    found = await ids(archive, queue="q")
    assert len(found) == len(set(found)) == count
    assert found[0] == max(f"job-{n}" for n in range(count) if n // 400 == (count - 1) // 400)


async def test_rows_that_python_cannot_hold_are_told_one_by_one(archive, pg):
    """By the page and alone; also where a page ends between them."""
    for n in range(600):
        await pg.execute(
            "insert into streamworker.jobs (id, queue_name, created_at, run_at) "
            "values ($1, 'q', '0044-03-15 12:00:00+00 BC', 'infinity')", f"odd-{n:03}"
        )  # fmt: skip
    deep = "repeat('[', 1500) || repeat(']', 1500)"
    await pg.execute(
        "insert into streamworker.jobs (id, queue_name, headers, result, payload) values "
        f"('new', 'q', ('{{\"a\": 1e5000, \"b\": 1}}')::jsonb, ({deep})::jsonb, '{{\"n\": 1e5000}}')"
    )
    found = [job async for job in archive.jobs(Wanted(), payload=True)]
    assert [job.id for job in found] == ["new", *(f"odd-{n:03}" for n in reversed(range(600)))]
    assert (found[-1].created_at.year, found[-1].run_at.year) == (1, 9999)
    alone = await archive.find("new")
    assert alone is not None
    assert alone.headers == {"a": "1" + "0" * 5000, "b": 1}
    assert alone.result == "[" * 1500 + "]" * 1500


async def test_cancel_and_retry(archive, pg):
    now = datetime.now(UTC)
    words = ("queued", "dispatching", "dispatched", "running", "retrying", "completed", "dead", "cancelled")
    for status in words:
        await pg.execute(INSERT, status, "q", "k", status, now)
    assert [word for word in words if await archive.cancel("q", word)] == [
        "queued",
        "dispatching",
        "dispatched",
        "retrying",
    ]
    assert not await archive.cancel("q", "nobody")
    assert [word for word in words if await archive.retry("q", word)] == [
        "queued", "dispatching", "dispatched", "retrying", "completed", "dead", "cancelled",
    ]  # fmt: skip
    rows = await pg.fetch("select status, hop, attempt_count, finished_at from streamworker.jobs where id <> 'running'")
    assert {tuple(row) for row in rows} == {("queued", 1, 0, None)}


async def test_a_run_of_before_cannot_undo_a_retry(archive, database, pg):
    ledger = PostgresLedger(database, database.pool, "zombie")
    await ledger.record([run_of("a", hop=2, status="dead", error="no")])
    assert await archive.retry("q", "a")
    await ledger.record([run_of("a", hop=2, deliveries=9, status="dead", error="still no")])
    assert await pg.fetchval("select status from streamworker.jobs") == "queued"


async def test_pruning(archive, pg):
    await pg.execute("insert into streamworker.job_queues (name) values ('q')")
    for n in range(1200):
        await pg.execute(
            "insert into streamworker.jobs (id, queue_name, status, finished_at) values ($1, 'q', $2, $3)",
            f"job-{n}", "dead" if n % 100 == 0 else "completed", datetime.now(UTC) - timedelta(hours=n),
        )  # fmt: skip
    assert (await archive.prunable(), await archive.prunable(older=3600 * 1000.5)) == (476, 198)
    counts = [await archive.prune("q", older=3600.0 * 100.5) for _ in range(4)]
    assert sum(counts) == 1089 and counts[-1] == 0 and max(counts) == 500
    assert await archive.prune("elsewhere") == 0
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'dead'") == 12


async def test_find(redis_url, database_url, raw):
    app: App[None] = App(settings=settings_for(redis_url, database_url))

    @app.handler
    async def handler(payload: Job, ctx: Context) -> dict[str, int]:
        assert (await app.find(ctx.job.id)) is None
        return {"n": payload.n}

    with pytest.raises(UsageError, match="async with app"):
        await app.find("a")
    async with app, working(app):
        enqueued = await app.enqueue(Job(n=7), headers={"traceparent": "00-1"})

        async def completed() -> Any:
            job = await app.find(enqueued.id)
            return job if job is not None and job.status == "completed" else None

        job = await eventually(completed)
        assert await app.find("nobody") is None
    assert (job.id, job.queue, job.kind, job.result, job.attempts) == (enqueued.id, "q", "job", {"n": 7}, 0)
    assert json.loads(bytes(job.payload)) == {"n": 7} and job.headers == {"traceparent": "00-1"}
    async with App(settings=settings_for(redis_url, None)) as without:
        with pytest.raises(ConfigurationError, match="DATABASE_URL"):
            await without.find("a")


# -- the command

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def streamworker(database_url: str) -> Run:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "REDIS"))}
    env = {**clean, "PYTHONPATH": str(ROOT), "DATABASE_URL": database_url, "NO_COLOR": "1"}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return inprocess.run(["jobs", *words], env={**env, **more}, cwd=ROOT)

    return run


@pytest.fixture
def filled(database_url: str) -> None:
    async def fill() -> None:
        database = await open_database(database_url)
        ledger = PostgresLedger(database, database.pool, "worker-1")
        await ledger.open(["q"])
        await ledger.record([
            run_of("done", result=b'{"sum": 3}', headers={"h": 1}),
            run_of("poor", status="retrying", run_at=0.0, error="ValueError: once", outcome="raised", attempts=1),
            run_of("odd", status="dead", error="undecodable: no", payload=b'{"x": "\\u0000"}'),
        ])  # fmt: skip
        await ledger.record(
            [
                run_of(
                    "poor",
                    hop=1,
                    attempt=2,
                    attempts=2,
                    status="dead",
                    error="failed 2 of 2 attempts: ValueError: twice",
                    outcome="raised",
                )
            ]
        )
        database.close()

    beside(fill)


def test_the_listing_imports_what_it_uses(database_url, filled):
    """Its driver, and neither an app, a worker, tracebacks in colours nor OpenTelemetry."""
    found, out = imported({**os.environ, "DATABASE_URL": database_url}, "jobs --json", HEAVY)
    assert found == "['asyncpg']"
    assert {"done", "poor", "odd"} <= {json.loads(line)["job_id"] for line in out.splitlines()}


def test_list_and_show(streamworker, filled):
    done = streamworker("--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["job_id"]: row["status"] for row in rows} == {"done": "completed", "poor": "dead", "odd": "dead"}
    assert list(rows[0]) == [
        "job_id", "queue", "kind", "level", "status", "attempts", "max_attempts", "hop", "deliveries", "created_at", "run_at",
        "started_at", "finished_at", "took_s", "age_s", "worker_id", "error", "expires_at", "waits_for",
    ]  # fmt: skip
    table = streamworker("list", "q", "--status", "dead").stdout
    assert "twice" in table and "done" not in table
    shown = streamworker("show", "poor")
    assert "attempt 1" in shown.stdout and "ValueError: twice" in shown.stdout and "raised" in shown.stdout
    assert '"n"' not in shown.stdout
    (one,) = [json.loads(line) for line in streamworker("show", "done", "--payload", "--json").stdout.splitlines()]
    assert (one["document"], one["result"], one["headers"]) == ({"n": 1}, {"sum": 3}, {"h": 1})
    assert [each["outcome"] for each in one["log"]] == ["ok"]
    whole = streamworker("show", "odd", "--payload").stdout
    assert '{"id": "odd", "payload"' in whole
    missing = streamworker("show", "nobody")
    assert missing.returncode == 1 and "knows no job nobody" in missing.stderr


def test_retry_and_cancel(streamworker, filled):
    assert streamworker("retry").returncode == 2
    barred = streamworker("retry", "done", "--yes")
    assert barred.returncode == 1 and "--force" in barred.stderr
    assert "would be queued" in streamworker("retry", "--all", "--dry-run").stdout
    assert streamworker("retry", "--all", "--yes").returncode == 0
    forced = streamworker("retry", "done", "--force", "--yes", "--json")
    assert forced.returncode == 0, forced.stderr
    assert {json.loads(line)["status"] for line in streamworker("--json").stdout.splitlines()} == {"queued"}
    assert streamworker("cancel", "--kind", "k", "--yes").returncode == 0
    assert {json.loads(line)["status"] for line in streamworker("--json").stdout.splitlines()} == {"cancelled"}
    assert streamworker("cancel", "done", "--yes").returncode == 1


def test_prune(streamworker, filled):
    assert "2" not in streamworker("prune", "--older", "0", "--dry-run").stdout
    assert streamworker("prune", "--older", "0").returncode == 2  # nobody to ask
    assert streamworker("prune", "--older", "0", "--yes").stdout == "forgot 1 jobs\n"
    assert {json.loads(line)["job_id"] for line in streamworker("--json").stdout.splitlines()} == {"poor", "odd"}


def test_without_a_ledger(streamworker, empty_database):
    done = streamworker(DATABASE_URL=empty_database)
    assert done.returncode == 78 and "streamworker migrate up" in done.stderr
    assert streamworker(DATABASE_URL="").returncode == 78
    assert streamworker(DATABASE_URL="postgresql://u@127.0.0.1:1/x").returncode == 69


def test_a_signal_and_the_steps_of_a_job(streamworker, filled, database_url):
    async def wait() -> None:
        connection = await asyncpg.connect(database_url)
        await connection.execute(
            "insert into streamworker.jobs (id, queue_name, kind, status, waits_for, hop) values ('w', 'q', 'k', 'waiting', 'approved', 1)"
        )
        await connection.execute(
            "insert into streamworker.job_steps (job_id, queue_name, position, kind, name, value, made, hop, deliveries, started_at) values "
            "('w', 'q', 0, 'step', 'charge', '{\"receipt\": \"s3cret\"}', 0, 0, 1, now()), ('w', 'q', 1, 'wait', 'approved', null, 0, 0, 1, null)"
        )
        await connection.close()

    beside(wait)
    shown = streamworker("show", "w").stdout
    assert re.search(r"waits_for +approved", shown), shown
    assert re.search(r"step charge +\S+ done in", shown) and re.search(r"wait approved +\S+ waiting\n", shown), shown
    assert "s3cret" not in shown and "s3cret" in streamworker("show", "w", "--payload").stdout
    (one,) = [json.loads(line) for line in streamworker("show", "w", "--json", "--payload").stdout.splitlines()]
    assert [(each["kind"], each["state"], each["value"]) for each in one["steps"]] == [
        ("step", "done", {"receipt": "s3cret"}), ("wait", "waiting", None),
    ]  # fmt: skip
    odd = streamworker("signal", "w", "approved", "{by: ann}")
    assert odd.returncode == 2 and "the data must be JSON, such as" in odd.stderr
    sent = streamworker("signal", "w", "approved", '{"by": "ann"}')
    assert (sent.returncode, sent.stdout) == (0, "sent approved to w\n"), sent.stderr
    again = streamworker("signal", "w", "approved", '{"by": "bob"}')
    assert (
        again.returncode == 1
        and "nothing was sent: w has ended, or approved was sent before or has timed out" in again.stderr
    )
    unknown = streamworker("signal", "none", "approved")
    assert (
        unknown.returncode == 2 and "the ledger knows no job 'none': check the id, or say its queue" in unknown.stderr
    )
    assert re.search(r"wait approved +\S+ done: \{\"by\": \"ann\"\}", streamworker("show", "w", "--payload").stdout)
    assert streamworker("cancel", "w", "--yes").returncode == 0


def test_a_signal_without_a_ledger(streamworker, empty_database):
    done = streamworker("signal", "w", "approved", DATABASE_URL=empty_database)
    assert done.returncode == 78 and "streamworker migrate up" in done.stderr
