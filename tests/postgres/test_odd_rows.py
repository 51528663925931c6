"""Rows that nothing of ours can read, whatever wrote them: each is dead with its reason, and its neighbours go on."""

from __future__ import annotations

import json

import anyio
import asyncpg
import pytest

from streamworker import App, Payload, Settings
from streamworker.broker.dispatcher import RedisDispatcher
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.redis.client import RedisAddress
from streamworker.postgres import outbox as sql
from streamworker.postgres.migrate import Migrator, shipped
from streamworker.postgres.outbox import PostgresOutbox
from streamworker.postgres.pool import open_database
from streamworker.relay.relay import Relay
from tests.conftest import eventually
from tests.postgres.working import settings_for, working


class Row(Payload, kind="row", queue="rows"):
    n: int = 0


app = App(settings=Settings())

COLUMNS = "(id, queue_name, kind, payload, created_at, run_at, max_attempts, attempt_count, hop, headers, document)"
PLAIN = {
    "payload": "'{}'", "created_at": "now()", "run_at": "null", "max_attempts": "null", "attempt_count": "0", "hop": "0",
    "headers": "null", "document": "null",
}  # fmt: skip
DEEP = """('{"a":' || repeat('[', 1500) || repeat(']', 1500) || '}')::jsonb"""
UNREADABLE = {
    "a number too large for Python": {"headers": """'{"a": 1e5000}'"""},
    "headers too deep": {"headers": DEEP},
    "payload too deep": {"payload": DEEP},
    "headers that are none": {"headers": "'[1]'"},
    "no payload": {"payload": "'7'", "document": """'{"payload'::bytea"""},
    "bytes that are no text": {"document": "'\\xff00'::bytea"},
    "attempts below zero": {"attempt_count": "-1"},
    "allowed attempts below zero": {"max_attempts": "-5"},
    "a hop below zero": {"hop": "-7"},
}
ODD_TIMES = {
    "Go's zero time, east of UTC": "'0001-01-01 00:00:00+01'",
    "before our era": "'4713-01-01 00:00:00+00 BC'",
    "minus infinity": "'-infinity'",
}


async def insert(pg, name, **odd):
    values = ", ".join({**PLAIN, **odd}.values())
    await pg.execute(f"insert into streamworker.jobs {COLUMNS} values ($1, 'rows', 'row', {values})", name)


async def commit(pg, count):
    async with pg.transaction():
        await app.enqueue_many([Row(n=n) for n in range(count)], connection=pg)


@pytest.fixture
async def outbox(database_url):
    database = await open_database(database_url, name="test")
    yield PostgresOutbox(database)
    database.close()


@pytest.fixture(params=[pytest.param(QueueKeys, id="stream"), pytest.param(ListKeys, id="list")])
async def dispatcher(request, redis_url):
    made = RedisDispatcher(RedisAddress(redis_url), request.param, group="workers", namespace="")
    yield made
    await made.close()


def ready(raw):
    bodies = [fields[b"job"] for _, fields in raw.xrange("stream:{rows}")] if raw.exists("stream:{rows}") else []
    return [json.loads(body) for body in [*bodies, *raw.lrange("queue:rows", 0, -1)]]


async def emptied(outbox, dispatcher):
    relay = Relay(outbox, dispatcher, anyio.Event())
    while await relay.step() == 0:
        pass


@pytest.mark.parametrize("odd", UNREADABLE.values(), ids=UNREADABLE.keys())
async def test_a_row_that_no_worker_could_read_is_dead_and_its_neighbours_go_on(outbox, dispatcher, pg, raw, odd):
    await commit(pg, 20)
    await insert(pg, "odd", **odd)
    await commit(pg, 20)
    await emptied(outbox, dispatcher)
    assert len(ready(raw)) == 40
    rows = await pg.fetch("select id, status, last_error, finished_at is null as open from streamworker.jobs")
    (dead,) = [row for row in rows if row["status"] != "dispatched"]
    assert (dead["id"], dead["status"], dead["open"]) == ("odd", "dead", False)
    assert dead["last_error"].startswith("no worker can read it: ")


async def test_a_hop_beyond_what_documents_hold_is_counted_anew(outbox, dispatcher, pg, raw):
    await insert(pg, "odd", hop=str(2**63 - 1))
    await emptied(outbox, dispatcher)
    (job,) = ready(raw)
    assert (job["id"], job["hop"]) == ("odd", 1)


@pytest.mark.parametrize("moment", ODD_TIMES.values(), ids=ODD_TIMES.keys())
@pytest.mark.parametrize("column", ["created_at", "run_at"])
async def test_a_time_that_python_does_not_have_is_moved_and_the_job_goes_on(
    outbox, dispatcher, pg, raw, column, moment
):
    await commit(pg, 5)
    await insert(pg, "odd", **{column: moment})
    await commit(pg, 5)
    await emptied(outbox, dispatcher)
    assert len(ready(raw)) == 11
    assert {row["status"] for row in await pg.fetch("select status from streamworker.jobs")} == {"dispatched"}


async def test_what_a_relay_left_half_dispatched_is_taken_over_row_by_row(outbox, dispatcher, pg, raw):
    await commit(pg, 10)
    await insert(pg, "odd", **UNREADABLE["a number too large for Python"])
    await pg.execute("update streamworker.jobs set status = 'dispatching', hop = 1, updated_at = now() - interval '1h'")
    await emptied(outbox, dispatcher)
    assert len(ready(raw)) == 10
    assert await pg.fetchval("select status from streamworker.jobs where id = 'odd'") == "dead"


async def test_a_migration_moves_times_that_earlier_releases_stored(empty_database):
    (number,) = [each.version for each in shipped() if each.name.endswith("what_enters")]
    await Migrator(empty_database, [each for each in shipped() if each.version < number]).up()
    connection = await asyncpg.connect(empty_database)
    insert = "insert into streamworker.jobs (id, queue_name, created_at) values ($1, 'q', '{}')"
    for job, moment in (("bc", "0044-03-15 BC"), ("late", "20000-01-01"), ("plain", "2031-01-01 00:00:00+00")):
        await connection.execute(insert.format(moment), job)
    await Migrator(empty_database).up()
    found = await connection.fetch("select created_at from streamworker.jobs order by id")
    assert [row[0].year for row in found] == [1, 9999, 2031]
    await connection.close()


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_job_that_workers_cannot_read_ends_as_itself(redis_url, database_url, pg, raw, mode):
    """What is too large for workers, or odd in a field, has its row and its dead letter under the id that it names."""
    mine = App(settings=settings_for(redis_url, database_url, relay="on", mode=mode, max_job_bytes=20_000))
    ran = []

    @mine.handler
    async def row(payload: Row) -> None:
        ran.append(payload.n)

    async def dead() -> bool:
        return await pg.fetchval("select count(*) from streamworker.jobs where status = 'dead'") == 3

    async with mine, working(mine):
        large = "jsonb_build_object('n', 1, 'x', repeat('x', 30000))"
        await pg.execute(f"select streamworker.enqueue('row', {large}, 'rows', id => 'large')")
        for body in ('{"id": "odd", "hop": -1, "payload": {}}', '{"id": "bare", "payload": 7, "max_attempts": "x"}'):
            raw.xadd("stream:{rows}", {"job": body}) if mode == "stream" else raw.lpush("queue:rows", body)
        await eventually(dead, 20)
        await mine.enqueue(Row(n=7))
        await eventually(lambda: ran == [7] and raw.xlen("stream:{rows}:dead") == 3, 20)
    rows = await pg.fetch("select id, hop, last_error from streamworker.jobs where status = 'dead' order by id")
    assert [(each["id"], each["hop"]) for each in rows] == [("bare", 0), ("large", 1), ("odd", 0)]
    assert "30" in rows[1]["last_error"] and "20000 are allowed" in rows[1]["last_error"]
    letters = {fields[b"id"] for _, fields in raw.xrange("stream:{rows}:dead")}
    assert letters == {b"large", b"odd", b"bare"}
    assert await pg.fetchval("select count(*) from streamworker.jobs where status <> 'dead'") == 1


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00Z"])
async def test_a_producer_whose_clock_is_odd_has_its_job_recorded(redis_url, database_url, pg, raw, moment):
    mine = App(settings=settings_for(redis_url, database_url))

    @mine.handler
    async def row(payload: Row) -> None:
        pass

    async def done() -> bool:
        return await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == 1

    async with mine, working(mine):
        raw.xadd("stream:{rows}", {"job": json.dumps({"id": "odd", "payload": {}, "created_at": moment})})
        await eventually(done)
    assert await pg.fetchval("select now() - created_at < interval '1 minute' from streamworker.jobs")


@pytest.mark.parametrize("status", ["queued", "dispatching"])
async def test_a_row_that_cannot_even_be_taken_is_dead_and_its_neighbours_go_on(
    outbox, dispatcher, pg, raw, monkeypatch, status
):
    """Whatever asyncpg may stumble over one day: here a statement that returns one row as no asyncpg can decode it."""
    for name in ("CLAIM", "RETAKE"):
        odd = "case when id = 'odd' then '0044-03-15 BC'::timestamptz else created_at end as created_at"
        whole = getattr(sql, name)
        head, found, tail = whole.rpartition("headers, document, created_at,")
        assert found
        monkeypatch.setattr(sql, name, f"{head}headers, document, {odd},{tail}")
    await commit(pg, 3)
    await insert(pg, "odd")
    await commit(pg, 3)
    if status == "dispatching":
        await pg.execute("update streamworker.jobs set status = $1, hop = 1", status)
    for _ in range(2):
        await emptied(outbox, dispatcher)
        await pg.execute("update streamworker.jobs set updated_at = now() - interval '1h'")
    assert len(ready(raw)) == 6
    assert await pg.fetchval("select status || ': ' || last_error from streamworker.jobs where id = 'odd'") == (
        "dead: no worker can read it: date value out of range"
    )
