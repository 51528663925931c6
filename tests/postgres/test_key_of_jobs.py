"""The key of a job is its queue and its id: what one queue does with an id is nothing to another."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from streamworker import App, Backoff, Context, Payload
from streamworker.errors import ConfigurationError, RunEnded, UsageError
from streamworker.postgres import Stored, Wanted
from streamworker.postgres.archive import PostgresArchive
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.migrate import Migrator, shipped
from streamworker.postgres.pool import open_database
from tests import inprocess
from tests.conftest import MODES, eventually
from tests.postgres.test_ledger import run_of
from tests.postgres.working import settings_for, working

ROOT = Path(__file__).parents[2]


class Ping(Payload, kind="ping", queue="public"):
    """What strangers may send."""

    n: int = 0


class Pay(Payload, kind="pay", queue="billing"):
    """What they may not."""

    n: int = 0


@pytest.fixture
async def database(database_url: str) -> Any:
    database = await open_database(database_url)
    yield database
    database.close()


@pytest.fixture
def ledger(database: Any) -> PostgresLedger:
    return PostgresLedger(database, database.pool, "worker-1")


@pytest.fixture
def archive(database: Any) -> PostgresArchive:
    return PostgresArchive(database)


async def rows(pg: asyncpg.Connection) -> dict[str, tuple[Any, ...]]:
    found = await pg.fetch("select queue_name, status, hop from streamworker.jobs order by queue_name")
    return {each["queue_name"]: (each["status"], each["hop"]) for each in found}


# -- the ledger


async def test_records_look_ups_and_transactions_of_one_queue_do_not_see_the_others(ledger, pg):
    assert await ledger.record([run_of("invoice-7", queue="public", hop=9)]) == [Stored.STORED]
    found = await ledger.lookup([("billing", "invoice-7"), ("public", "invoice-7")])
    assert found.get(("billing", "invoice-7")) is None and found["public", "invoice-7"].hop == 9
    async with ledger.transaction(run_of("invoice-7", queue="billing"), None) as connection:
        await connection.execute("create table paid (n int)")
    assert await rows(pg) == {"billing": ("completed", 0), "public": ("completed", 9)}
    with pytest.raises(RunEnded, match="completed"):
        async with ledger.transaction(run_of("invoice-7", queue="billing", hop=1), None):
            pass


@pytest.mark.parametrize("new", [False, True], ids=["may be known", "taken for new"])
@pytest.mark.parametrize("odd", [False, True], ids=["packed", "row by row"])
async def test_one_batch_may_hold_the_same_id_of_several_queues(ledger, pg, new, odd):
    payload = b'{"text": "\\u0000"}' if odd else b"{}"

    def batch(**more: Any) -> list[Any]:
        runs = [run_of(job_id, queue=queue, payload=payload, **more) for job_id in "ab" for queue in ("x", "y", "z")]
        for run in runs:
            run.new = new
        return runs

    assert await ledger.record(batch()) == [Stored.STORED] * 6
    assert (
        await ledger.record([run_of("a", queue="x", hop=1, status="dead"), *batch(hop=3, status="dead")][:3])
        == [Stored.ENDED] * 3
    )
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 6
    assert await pg.fetchval("select count(distinct (queue_name, job_id)) from streamworker.job_logs") == 6


async def test_what_is_asked_and_done_by_id_names_the_queue(ledger, archive, pg):
    await ledger.record([run_of("a", queue="x", status="dead"), run_of("a", queue="y"), run_of("b", queue="y")])
    with pytest.raises(UsageError, match=r"several queues have a job with the id a \(x, y\)"):
        await archive.find("a")
    assert (await archive.find("b")).queue == "y"
    assert [(await archive.find("a", queue)).status for queue in ("x", "y")] == ["dead", "completed"]
    assert await archive.find("a", "z") is None
    assert [len(await archive.attempts(queue, "a")) for queue in ("x", "y", "z")] == [1, 1, 0]
    assert not await archive.retry("z", "a") and await archive.retry("x", "a")
    assert await rows(pg) == {"x": ("queued", 1), "y": ("completed", 0)}
    assert await archive.cancel("x", "a") and not await archive.cancel("z", "a")


async def test_pages_go_on_behind_a_job_whose_id_another_queue_has_too(archive, pg):
    await pg.execute(
        "insert into streamworker.jobs (id, queue_name, created_at)"
        " select 'same', 'q-' || lpad(n::text, 4, '0'), '2026-01-01' from generate_series(1, 1234) as n"
    )
    found = [job.queue async for job in archive.jobs(Wanted())]
    assert len(found) == len(set(found)) == 1234
    behind = [job.queue async for job in archive.jobs(Wanted(after=((await archive.find("same", "q-0600")).created_at, "same", "q-0600")))]  # fmt: skip
    assert behind == [f"q-{n:04}" for n in range(599, 0, -1)]


async def test_pruning_one_queue_leaves_the_attempts_of_the_other(ledger, archive, pg):
    await ledger.open(["x", "y"])
    await ledger.record([run_of("a", queue="x"), run_of("a", queue="y")])
    assert await archive.prune("x", older=0) == 1
    assert [len(await archive.attempts(queue, "a")) for queue in "xy"] == [0, 1]
    await pg.execute("update streamworker.jobs set finished_at = '2020-01-01'")
    await ledger.tick()
    assert await pg.fetchval("select count(*) from streamworker.job_logs") == 0


async def test_the_function_takes_an_id_that_another_queue_uses(pg):
    for queue in ("x", "y", "x"):
        assert await pg.fetchval("select streamworker.enqueue('k', '{}', $1, id => 'a')", queue) == "a"
    assert await rows(pg) == {"x": ("queued", 0), "y": ("queued", 0)}


# -- workers


@pytest.mark.parametrize("mode", MODES)
async def test_whoever_may_write_to_one_queue_keeps_no_job_of_another_from_running(redis_url, database_url, raw, pg, mode):  # fmt: skip
    """The ids are guessed and used first: completed with a high hop, before the invoices are dispatched or sent."""
    app: App[None] = App(settings=settings_for(redis_url, database_url, mode=mode, relay="on"))
    paid = []

    @app.handler
    async def ping(_: Ping) -> None:
        pass

    @app.handler(max_attempts=3, backoff=Backoff(base=0.01, jitter=0))
    async def pay(payload: Pay, ctx: Context) -> None:
        async with ctx.transaction():
            paid.append(payload.n)

    def put(queue: str, job_id: str, **fields: Any) -> None:
        body = json.dumps({"id": job_id, "payload": {}, **fields})
        raw.xadd(f"stream:{{{queue}}}", {"job": body}) if mode == "stream" else raw.lpush(f"queue:{queue}", body)

    async def done(count: int) -> bool:
        return await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == count

    async with app, working(app):
        for n in (7, 8):
            put("public", f"invoice-{n}", hop=9)
        await eventually(lambda: done(2))
        put("billing", "invoice-7", payload={"n": 7})
        await pg.execute("""select streamworker.enqueue('pay', '{"n": 8}', 'billing', id => 'invoice-8')""")
        await eventually(lambda: done(4))
        with pytest.raises(UsageError, match="several queues"):
            await app.find("invoice-7")
        assert (await app.find("invoice-7", queue="billing")).kind == "pay"
        assert await app.cancel("invoice-8", queue="billing") == "ended"
        assert await app.result("invoice-8", queue="billing", timeout=5) is None
    assert sorted(paid) == [7, 8]


# -- the command


def test_the_command_asks_for_the_queue_where_an_id_is_not_enough(database_url, redis_url):
    async def fill() -> None:
        database = await open_database(database_url)
        ledger = PostgresLedger(database, database.pool, "worker-1")
        await ledger.record([run_of("a", queue=queue, status="dead", error="no") for queue in "xy"])
        database.close()

    asyncio.run(fill())
    env = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "REDIS"))}
    env |= {"PYTHONPATH": str(ROOT), "DATABASE_URL": database_url, "REDIS_URL": redis_url, "NO_COLOR": "1"}

    def jobs(*words: str) -> subprocess.CompletedProcess[str]:
        return inprocess.run(["jobs", *words], env=env, cwd=ROOT)

    for words in (("show", "a"), ("retry", "a", "--yes"), ("cancel", "a", "--yes")):
        asked = jobs(*words)
        assert (asked.returncode, "several queues" in asked.stderr) == (2, True), asked
    assert json.loads(jobs("show", "a", "--queue", "y", "--json").stdout)["queue"] == "y"
    assert jobs("retry", "a", "--queue", "y", "--yes").returncode == 0
    listed = {row["queue"]: row["status"] for row in map(json.loads, jobs("--json").stdout.splitlines())}
    assert listed == {"x": "dead", "y": "queued"}


# -- ledgers of before

FILL = """
insert into streamworker.jobs (id, queue_name, status, hop)
  select 'job-' || n, 'q-' || n % 7, 'completed', n % 3 from generate_series(1, 20000) as n;
insert into streamworker.job_logs (job_id, hop, deliveries, attempt, outcome)
  select 'job-' || n, hop, 1, hop + 1, 'ok' from generate_series(1, 20000) as n, generate_series(0, n % 3) as hop
"""
ADD = "insert into streamworker.jobs (id, queue_name) values ('new-' || $1::int, 'q')"


async def test_a_filled_ledger_is_migrated_while_it_is_written(empty_database):
    """What failed half way, as an index that was never finished, is done again from its start."""
    await Migrator(empty_database, shipped()[:2]).up()
    pg = await asyncpg.connect(empty_database)
    beside = await asyncpg.connect(empty_database)
    await pg.execute(FILL)
    with pytest.raises(ConfigurationError, match="of an older release: run `streamworker migrate up`"):
        async with App(settings=settings_for("redis://127.0.0.1:1", empty_database)).archive():
            pass
    await pg.execute("insert into streamworker.jobs (id, queue_name) values ('twin', 'x')")
    with pytest.raises(asyncpg.UniqueViolationError):  # an index of that name which is not valid
        await pg.execute("create unique index concurrently jobs_key on streamworker.jobs ((1))")

    migrating = asyncio.create_task(Migrator(empty_database).up())
    written = 0
    while not migrating.done():
        await beside.execute(ADD, written)
        written += 1
    assert (await migrating)[:2] == ["0003_key_of_jobs", "0004_key_of_jobs_exchanged"]
    count = "select count(*) from streamworker.jobs where id not like 'new-%'"
    assert (await pg.fetchval(count), await pg.fetchval("select count(*) from streamworker.job_logs")) == (
        20001,
        40001,
    )
    await pg.execute("insert into streamworker.jobs (id, queue_name) values ('twin', 'y')")
    with pytest.raises(asyncpg.UniqueViolationError):
        await pg.execute("insert into streamworker.jobs (id, queue_name) values ('twin', 'x')")

    database = await open_database(empty_database)
    archive, ledger = PostgresArchive(database), PostgresLedger(database, database.pool, "worker-1")
    await ledger.open(["q-5"])
    assert len(await archive.attempts("q-5", "job-5")) == 3  # recorded before
    assert await ledger.record([run_of("job-5", queue="q-5", hop=9)]) == [Stored.ENDED]
    assert await archive.retry("q-5", "job-5")
    assert await ledger.record([run_of("job-5", queue="q-5", hop=3)]) == [Stored.STORED]
    assert len(await archive.attempts("q-5", "job-5")) == 5
    while await archive.prune("q-5", older=0):
        pass
    assert await archive.attempts("q-5", "job-5") == []
    database.close()
    await pg.close()
    await beside.close()


async def test_a_worker_of_before_records_nothing_rather_than_something_wrong(database_url, pg):
    """Its statements name the id alone, and are refused: what it finished it hands back when it is stopped."""
    await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('a', 'x', 'dispatched')")
    with pytest.raises(asyncpg.InvalidColumnReferenceError):
        await pg.execute("insert into streamworker.jobs (id, queue_name) values ('a', 'x') on conflict (id) do nothing")
    with pytest.raises(asyncpg.UniqueViolationError):
        await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('a', 'x', 'completed')")
