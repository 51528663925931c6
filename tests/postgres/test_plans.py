"""Every statement fits the migrated schema, and none of them reads a large table from end to end.

Statements are found by their form: a public constant of a module of ``streamworker.postgres`` that begins with a verb of
SQL. Each is prepared, and explained on many jobs, for any parameters (a generic plan). What may read a whole table
has to be named in MAY_SCAN with its reason.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator

import anyio
import asyncpg
import pytest

from streamworker import postgres as package
from streamworker.postgres.migrate import Migrator
from streamworker.postgres.pool import SETTINGS
from tests.postgres.databases import beside

LARGE = {"jobs", "job_logs", "job_keys"}
MAY_SCAN: dict[str, str] = {
    "archive.KEY_USES": "`keys check`: an operator asks before a key is thrown away, and no index of sealed rows is worth its writes",
    "payloads.REFERENCES": "the sweep of stored payloads, once a day where there are any, reads all documents in Redis as well",
}
"""module.NAME to the reason."""


def statements() -> Iterator[tuple[str, str]]:
    for module in pkgutil.iter_modules(package.__path__):
        found = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        for name, value in found.items():
            text = " ".join(value.split()).lower() if isinstance(value, str) and name.isupper() else ""
            if not name.startswith("_") and text.startswith(("select ", "insert ", "update ", "delete ", "with ")):
                yield f"{module.name}.{name}", value


ALL = dict(statements())

FILL = """
insert into streamworker.jobs (id, queue_name, kind, payload, level, status, hop, deliveries, run_at, created_at,
  finished_at, epoch, updated_at)
select 'job-' || n, 'queue-' || n %% 50, 'kind-' || n %% 20, '{"n": 1}',
  (array['high', 'normal', 'low'])[1 + n %% 3],
  case when n %% 1000 < 900 then 'completed' when n %% 1000 < 950 then 'dead' when n %% 1000 < 960 then 'cancelled'
    when n %% 1000 < 970 then 'queued' when n %% 1000 = 970 then 'dispatching' when n %% 1000 < 980 then 'dispatched'
    when n %% 1000 = 980 then 'running' else 'retrying' end,
  1, 1, now() + (n %% 100 - 50) * interval '1 minute', now() - n * interval '1 second',
  case when n %% 1000 < 960 then now() - n * interval '1 second' end, 'e', now() - n %% 100 * interval '1 second'
from generate_series(1, %(jobs)s) as n;
insert into streamworker.job_logs (job_id, hop, deliveries, attempt, outcome)
select 'job-' || n, 1, 1, 1, 'ok' from generate_series(1, %(jobs)s / 4) as n;
insert into streamworker.job_keys select 'queue-' || n %% 50, 'key-' || n, 'job-' || n, now() + n * interval '1 second'
from generate_series(1, %(jobs)s / 4) as n;
insert into streamworker.job_queues (name) select 'queue-' || n from generate_series(0, 49) as n
"""
INDEXES = """
select indexname, indexdef from pg_indexes where schemaname = 'streamworker' and indexname not in
  (select conname from pg_constraint where connamespace = 'streamworker'::regnamespace)
"""
# asyncpg wants values for parameters, a generic plan has none.
EXPLAIN = """
create function explained(statement text) returns json language plpgsql as $$
declare result json;
begin
  execute 'explain (generic_plan, format json) ' || statement into result;
  return result;
end $$
"""


JOBS = 100_000
"""With each index taken away, the same statements are found as at 1,000,000."""


@pytest.fixture(scope="module")
def full_database(postgres) -> Iterator[str]:
    """The URL of a database with many jobs in every state."""

    async def admin(*orders: str) -> None:
        connection = await asyncpg.connect(postgres.url("postgres"))
        for order in orders:
            await connection.execute(order)
        await connection.close()

    async def fill() -> None:
        await admin("create database plans")
        await Migrator(postgres.url("plans")).up()
        connection = await asyncpg.connect(postgres.url("plans"))
        indexes = await connection.fetch(INDEXES)  # made anew behind the rows: twice as fast
        for name, _ in indexes:
            await connection.execute(f"drop index streamworker.{name}")
        for order in (FILL % {"jobs": JOBS}, *(definition for _, definition in indexes), EXPLAIN):
            await connection.execute(order, timeout=120)
        await connection.execute("vacuum analyze", timeout=120)
        await connection.close()

    beside(fill)
    yield postgres.url("plans")
    beside(admin, "drop database plans with (force)")


@pytest.fixture
async def full(full_database):
    connection = await asyncpg.connect(full_database)
    yield connection
    await connection.close()


def nodes(plan):
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def test_statements_are_found():
    assert {
        "outbox.CLAIM",
        "outbox.NOTE",
        "enqueue.ENQUEUE",
        "recording.RECORD",
        "encoding.PACK",
        "ledger.LOOKUP",
    } <= set(ALL)


@pytest.mark.parametrize("name", ALL)
async def test_it_fits_the_migrated_schema(name, pg):
    await pg.prepare(ALL[name])


@pytest.mark.timeout(180)  # whoever comes first fills the database
@pytest.mark.parametrize(
    "ours",
    [pytest.param(True, id="our-connections"), pytest.param(False, id="users-connections", marks=pytest.mark.all)],
)
async def test_nothing_reads_a_large_table_from_end_to_end(full, ours):
    if ours:
        for setting, value in SETTINGS.items():
            await full.execute(f"select set_config('{setting}', '{value}', false)")
    scans = []
    for name, statement in ALL.items():
        if not ours and not name.startswith("enqueue."):
            continue
        plan = json.loads(await full.fetchval("select explained($1)", statement))
        for node in nodes(plan[0]["Plan"]):
            if node["Node Type"] == "Seq Scan" and node.get("Relation Name") in LARGE and name not in MAY_SCAN:
                scans.append(f"{name}: {node['Relation Name']}")
    assert not scans


@pytest.mark.timeout(180)
async def test_the_functions_read_no_large_table_from_end_to_end_either(full):
    """Their statements cannot be explained from outside; the server counts its scans."""
    count = "select coalesce(sum(seq_scan), 0) from pg_stat_user_tables where relname = any($1::text[])"

    async def scans():
        await full.execute("select pg_stat_force_next_flush()")
        await full.execute("select 1")
        await full.execute("select pg_stat_clear_snapshot()")
        return await full.fetchval(count, list(LARGE))

    before = await scans()
    for n in range(12):  # more often than plans are made for the parameters at hand
        for key in ("null", f"'key-{n}'", f"'fresh-{n}'"):
            await full.execute(f"select streamworker.enqueue('k', '{{}}', 'queue-1', key => {key})")
    with anyio.fail_after(30):
        assert await scans() == before
