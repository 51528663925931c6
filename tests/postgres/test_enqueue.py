"""enqueue(connection=): a job commits or vanishes with the caller's rows; keys, delays, and payloads jsonb cannot hold."""

import asyncio
import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest

from streamworker import App, Payload, Settings
from streamworker.codec import read
from streamworker.embedded.binaries import find_binaries
from streamworker.errors import ConfigurationError, InvalidJob, JobTooLarge, UsageError
from streamworker.postgres.enqueue import COPY_FROM, fits_jsonb
from tests.conftest import eventually


class Bill(Payload, kind="bill", queue="billing"):
    number: int = 0
    text: str = ""
    ratio: float = 0.5


class Anything(Payload, kind="anything", queue="odd"):
    value: Any = None


class AsItIs(Payload, kind="as-it-is", queue="odd"):
    """JSON that only its handler looks into."""

    value: msgspec.Raw


@pytest.fixture
def app():
    return App(settings=Settings())


async def aborted(pg, work):
    """A transaction that is taken back after its work."""
    transaction = pg.transaction()
    await transaction.start()
    await work
    await transaction.rollback()


async def rows(pg, columns="*"):
    return await pg.fetch(f"select {columns} from streamworker.jobs order by created_at, id")


async def test_a_job_commits_or_vanishes_with_the_callers_rows(app, pg):
    await pg.execute("create table invoice (id int)")
    for commit in (False, True):
        transaction = pg.transaction()
        await transaction.start()
        await pg.execute("insert into invoice values (1)")
        done = await app.enqueue(Bill(number=7), connection=pg, headers={"traceparent": "00-1"})
        assert done.new
        await (transaction.commit() if commit else transaction.rollback())
        assert await pg.fetchval("select count(*) from invoice") == commit
        assert await pg.fetchval("select count(*) from streamworker.jobs") == commit
    (row,) = await rows(pg)
    assert row["id"] == done.id
    assert (row["queue_name"], row["kind"], row["level"], row["status"], row["hop"]) == (
        "billing",
        "bill",
        "normal",
        "queued",
        0,
    )
    assert json.loads(row["payload"]) == {"number": 7, "text": "", "ratio": 0.5}
    assert json.loads(row["headers"]) == {"traceparent": "00-1"}
    assert row["run_at"] is row["document"] is row["max_attempts"] is None
    # One that is taken back in part, too.
    async with pg.transaction():
        await aborted(pg, app.enqueue(Bill(), connection=pg))
        kept = await app.enqueue(Bill(), connection=pg)
    assert [row["id"] for row in await rows(pg)] == [done.id, kept.id]


async def test_it_must_be_an_asyncpg_connection_in_a_transaction(app, pg, empty_database):
    with pytest.raises(UsageError, match=r"async with connection.transaction\(\)"):
        await app.enqueue(Bill(), connection=pg)
    with pytest.raises(UsageError, match=r"select streamworker.enqueue"):
        await app.enqueue(Bill(), connection=object())
    bare = await asyncpg.connect(empty_database)
    for jobs in ([Bill()], [Bill()] * 50, [app.job(Bill(), key="k")]):
        with pytest.raises(ConfigurationError, match="streamworker migrate up"):
            async with bare.transaction():
                await app.enqueue_many(jobs, connection=bare)
    await bare.close()


async def test_connections_of_pools_and_by_hand_begun_transactions_will_do(app, database_url):
    async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        await connection.execute("begin")
        await app.enqueue(Bill(), connection=connection)
        await connection.execute("commit")
        assert await connection.fetchval("select count(*) from streamworker.jobs") == 1


@pytest.mark.parametrize("count", [3, COPY_FROM + 5])
async def test_many_keep_their_options_by_insert_and_by_copy(app, pg, count):
    at = datetime(2031, 5, 1, 12, tzinfo=UTC)
    started = await pg.fetchval("select clock_timestamp()")
    jobs = [
        app.job(Bill(number=0, text='tab\t back\\slash "quote" \n\r ü €'), priority="low", headers={"a": [1, None]})
    ]
    jobs += [app.job(Bill(number=1), delay=3600), app.job(Bill(number=2), run_at=at, priority=10, queue="other")]
    jobs += [Bill(number=n) for n in range(3, count)]
    async with pg.transaction():
        answers = await app.enqueue_many(jobs, connection=pg)
    assert [answer.new for answer in answers] == [True] * count
    by_id = {row["id"]: row for row in await rows(pg)}
    found = [by_id[answer.id] for answer in answers]
    assert [json.loads(row["payload"])["number"] for row in found] == list(range(count))
    assert json.loads(found[0]["payload"])["text"] == 'tab\t back\\slash "quote" \n\r ü €'
    assert json.loads(found[0]["headers"]) == {"a": [1, None]}
    assert [row["level"] for row in found[:3]] == ["low", "normal", "high"]
    assert [row["queue_name"] for row in found[:3]] == ["billing", "billing", "other"]
    assert found[0]["run_at"] is None
    assert timedelta(0) <= found[1]["run_at"] - started - timedelta(seconds=3600) < timedelta(seconds=30)
    assert found[2]["run_at"] == at


async def test_the_users_own_codecs_change_nothing(app, database_url):
    connection = await asyncpg.connect(database_url)
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    await connection.set_type_codec("timestamptz", schema="pg_catalog", encoder=str, decoder=lambda text: f"at {text}")
    at = datetime.now(UTC) + timedelta(days=90)
    async with connection.transaction():
        await app.enqueue(Bill(number=1), run_at=at, headers={"x": 1}, connection=connection)
        await app.enqueue_many(
            [app.job(Bill(number=2), delay=1, headers={"x": 1}) for _ in range(COPY_FROM)], connection=connection
        )
    types = "jsonb_typeof(payload) as payload, jsonb_typeof(headers) as headers, (payload->>'number')::int as number"
    found = await rows(connection, types)
    assert {(row["payload"], row["headers"]) for row in found} == {("object", "object")}
    assert sorted(row["number"] for row in found) == [1] + [2] * COPY_FROM
    await connection.close()


HARD = [
    {"nul": "a\x00b"},
    {"escaped": "\\u0000"},
    {"big": 10**30, "deep": [[[{}]]], "float": 1e300, "small": 5e-324, "whole": 1e22},
    {"deep": None},
    {"uuid": str(UUID(int=0x7E9E9E9E))},
    {"empty": ""},
]


@pytest.mark.parametrize("copy", [False, True])
async def test_payloads_that_jsonb_would_refuse_or_change_are_kept_as_they_are(app, pg, copy):
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    raws = [b'"\\ud83d\\ude00"', b"-0.0", b"1e400", b"1" * 5000, b'{"a": 1, "a": 2}', b" [ 1 ,\n\t2 ] "]
    values = [*(Anything(value) for value in (*HARD, deep)), *(AsItIs(msgspec.Raw(raw)) for raw in raws)]
    jobs = [app.job(value, headers={"h\x00": "\x00"} if n == 4 else None) for n, value in enumerate(values)]
    jobs += [Bill()] * (COPY_FROM if copy else 0)
    async with pg.transaction():
        answers = await app.enqueue_many(jobs, connection=pg)
    by_id = {row["id"]: row for row in await rows(pg)}
    for job, answer in zip(jobs[: len(values)], answers, strict=False):
        row = by_id[answer.id]
        if row["document"] is None:
            assert json.loads(row["payload"]) == json.loads(bytes(job.payload)), job.payload
        else:
            reading = read(row["document"])
            assert bytes(reading.payload) == bytes(job.payload)
            assert reading.id == answer.id
            assert reading.headers == job.headers
            assert row["payload"] is None
    documents = {n for n, answer in enumerate(answers[: len(values)]) if by_id[answer.id]["document"] is not None}
    assert documents == {0, 1, 2, 4, 7, 8, 9, 10}


def test_what_fits_jsonb():
    for text in (b"{}", b'{"a":true,"b":null,"c":-1.5,"d":"1e5 \\\\ \\" [[["}', b""):
        assert fits_jsonb(text)
    for text in (b'{"a":"\\u0000"}', b'{"a":1E5}', b'["\xff"]', b"[" * 2000):
        assert not fits_jsonb(text)


async def test_what_is_no_job_is_refused_before_it_can_break_the_transaction(app, pg):
    async with pg.transaction():
        with pytest.raises(InvalidJob):
            await app.enqueue(Anything(value=msgspec.Raw(b"{")), connection=pg)
        with pytest.raises(InvalidJob):  # half of a surrogate pair: no reader of ours takes it
            await app.enqueue(Anything(value=msgspec.Raw(b'"\\ud800"')), connection=pg)
        with pytest.raises(JobTooLarge):
            await app.enqueue(Anything(value="x" * 300_000), connection=pg)
        with pytest.raises(UsageError, match="NUL"):
            await app.enqueue(Bill(), key="a\x00", connection=pg)
        await app.enqueue(Bill(), connection=pg)
    assert len(await rows(pg)) == 1


# -- keys


async def test_a_key_gives_the_earlier_job_while_it_is_remembered(app, pg):
    async with pg.transaction():
        first = await app.enqueue(Bill(), key="k", key_ttl=3600, connection=pg)
    async with pg.transaction():
        again = await app.enqueue(Bill(), key="k", connection=pg)
        other = await app.enqueue(Bill(), key="k", queue="other", connection=pg)
    assert (again.id, again.new) == (first.id, False)
    assert other.new
    await pg.execute("update streamworker.job_keys set expires_at = now()")
    async with pg.transaction():
        fresh = await app.enqueue(Bill(), key="k", connection=pg)
    assert fresh.new and fresh.id != first.id
    assert len(await rows(pg)) == 3


@pytest.mark.parametrize("status", ["cancelled", "queued", "dispatched", "running", "completed", "dead"])
async def test_a_key_is_free_once_its_job_was_cancelled_and_not_before(app, pg, status):
    async with pg.transaction():
        first = await app.enqueue(Bill(), key="k", connection=pg)
        elsewhere = await app.enqueue(Bill(), key="k", queue="other", connection=pg)
    await pg.execute("update streamworker.jobs set status = $1 where queue_name = 'billing'", status)
    for fresh in (True, False):  # the second time it is the second job's
        async with pg.transaction():
            again = await app.enqueue(Bill(), key="k", connection=pg)
        assert again.new is (fresh and status == "cancelled")
    assert (again.id == first.id) is (status != "cancelled")
    async with pg.transaction():
        assert (await app.enqueue(Bill(), key="k", queue="other", connection=pg)).id == elsewhere.id


async def test_a_key_of_an_aborted_transaction_is_free(app, pg):
    await aborted(pg, app.enqueue(Bill(), key="k", connection=pg))
    async with pg.transaction():
        assert (await app.enqueue(Bill(), key="k", connection=pg)).new


async def test_keys_within_one_batch(app, pg):
    async with pg.transaction():
        jobs = [app.job(Bill(number=n), key=f"k{n % 3}") for n in range(30)] + [Bill(number=99)] * 2
        answers = await app.enqueue_many(jobs, connection=pg)
    assert [answer.new for answer in answers] == [True] * 3 + [False] * 27 + [True] * 2
    assert [answer.id for answer in answers[3:30]] == [answers[n % 3].id for n in range(27)]
    assert len(await rows(pg)) == 5


@pytest.mark.parametrize("commit", [True, False])
async def test_a_transaction_waits_for_the_one_that_is_taking_the_same_key(app, pg, database_url, commit):
    other = await asyncpg.connect(database_url)
    transaction = pg.transaction()
    await transaction.start()
    first = await app.enqueue(Bill(), key="k", connection=pg)

    async def second():
        async with other.transaction():
            return await app.enqueue(Bill(), key="k", connection=other)

    task = asyncio.create_task(second())
    watcher = await asyncpg.connect(database_url)
    waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    while not await watcher.fetchval(waits):
        assert not task.done()
        await asyncio.sleep(0.005)
    await (transaction.commit() if commit else transaction.rollback())
    answer = await task
    assert (answer.id == first.id, answer.new) == (commit, not commit)
    await other.close()
    await watcher.close()


async def test_batches_with_the_same_keys_in_any_order_never_deadlock(app, database_url):
    async with asyncpg.create_pool(database_url, min_size=4, max_size=4) as pool:

        async def batch(step):
            async with pool.acquire() as connection, connection.transaction():
                numbers = list(range(40))[::step]
                return await app.enqueue_many([app.job(Bill(), key=f"k{n}") for n in numbers], connection=connection)

        for _ in range(3):
            results = await asyncio.gather(*(batch(step) for step in (1, -1, 1, -1)))
            assert len({answer.id for answers in results for answer in answers}) == 40
        assert await pool.fetchval("select count(*) from streamworker.jobs") == 40


# -- other drivers


ENQUEUE = "select streamworker.enqueue('k', "
DEEP = "('{{\"a\":' || repeat('[', {0}) || repeat(']', {0}) || '}}')::jsonb"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("jsonb_build_object('x', repeat('x', 262200)), 'q')", "bytes and 262144 are allowed"),
        ("'{}', 'q', headers => jsonb_build_object('x', repeat('x', 262200)))", "bytes and 262144 are allowed"),
        (DEEP.format(1500) + ", 'q')", "more than 500 brackets deep"),
        (DEEP.format(501) + ", 'q')", "more than 500 brackets deep"),
        ("'{}', 'q', headers => " + DEEP.format(1500) + ")", "more than 500 brackets deep"),
        ("'{}', 'q', max_attempts => -1)", "max_attempts must be 0 or more"),
        ("'{}', 'q', id => '')", "the id must have 1 to 200 bytes"),
        ("'{}', 'q', id => repeat('\u00e9', 101))", "the id must have 1 to 200 bytes"),
    ],
)
async def test_the_function_refuses_what_no_worker_could_read(pg, call, sentence):
    with pytest.raises(asyncpg.InvalidParameterValueError, match=sentence):
        await pg.fetchval(ENQUEUE + call)
    assert await rows(pg) == []


async def test_what_is_just_within_the_limits_is_taken(pg):
    await pg.fetchval(ENQUEUE + DEEP.format(498) + ", 'q')")
    await pg.fetchval(ENQUEUE + "jsonb_build_object('x', repeat('x', 262000)), 'q', id => repeat('x', 200))")
    await pg.execute("set streamworker.max_job_bytes = 400000")
    await pg.fetchval(ENQUEUE + "jsonb_build_object('x', repeat('x', 390000)), 'q', max_attempts => 0)")
    assert len(await rows(pg)) == 3


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("0001-01-01 00:00:00+01", None),
        ("-infinity", None),
        ("0044-03-15 BC", None),
        ("infinity", datetime(9999, 12, 30, tzinfo=UTC)),
        ("20000-01-01", datetime(9999, 12, 30, tzinfo=UTC)),
        ("2031-01-01 00:00:00+00", datetime(2031, 1, 1, tzinfo=UTC)),
    ],
)
async def test_a_time_that_others_cannot_hold_is_moved(pg, given, stored):
    """Go's zero time, which says that none was given, among them: such a job is due."""
    await pg.fetchval(f"{ENQUEUE} '{{}}', 'q', run_at => '{given}')")
    (row,) = await rows(pg)
    assert row["run_at"] == stored


async def test_the_limit_of_depth_is_the_same_in_python(app, pg):
    def nested(depth):
        return msgspec.Raw(b"[" * depth + b"]" * depth)

    class Deep(Payload, kind="deep", queue="q"):
        x: msgspec.Raw

    async with pg.transaction():
        await app.enqueue(Deep(x=nested(498)), connection=pg)
        with pytest.raises(InvalidJob, match="more than 500 brackets deep"):
            await app.enqueue(Deep(x=nested(501)), connection=pg)
        # Wide is not deep, and brackets in texts are none.
        await app.enqueue(Deep(x=msgspec.Raw(b"[" + b"[],{}," * 600 + b"[]]")), connection=pg)
        await app.enqueue(Deep(x=msgspec.Raw(b'"' + b"[" * 2000 + b'\\""')), connection=pg)


async def test_the_function_for_every_other_driver(pg):
    call = "select streamworker.enqueue('bill', '{\"number\": 1}', 'billing', $1, $2, $3)"
    at = datetime(2031, 1, 1, tzinfo=UTC)
    first = await pg.fetchval(call, 10, at, "key")
    assert await pg.fetchval(call, None, None, "key") == first
    second = await pg.fetchval(call, None, None, None)
    await pg.execute("insert into streamworker.job_queues (name, default_priority) values ('billing', 200)")
    third = await pg.fetchval(call, None, None, None)
    by_id = {row["id"]: row for row in await rows(pg)}
    assert [by_id[each]["level"] for each in (first, second, third)] == ["high", "normal", "low"]
    assert by_id[first]["run_at"] == at
    assert all(UUID(each).version == 7 and UUID(each).variant == "specified in RFC 4122" for each in by_id)
    # An id of the caller's own makes the call repeatable.
    assert await pg.fetchval("select streamworker.enqueue('k', '{}', 'q', id => 'order-7')") == "order-7"
    assert (
        await pg.fetchval("select streamworker.enqueue('k', '{}', 'q', id => 'order-7', headers => '{\"a\": 1}')")
        == "order-7"
    )
    assert len(await rows(pg)) == 4
    for wrong in (
        "'k', '[]', 'q'",
        "'k', null, 'q'",
        "'k', '{}', 'q:low'",
        "'k', '{}', null",
        "'k', '{}', 'q', headers => '1'",
    ):
        with pytest.raises(asyncpg.InvalidParameterValueError):
            await pg.execute(f"select streamworker.enqueue({wrong})")


async def test_psql_enqueues(pg, postgres):
    psql = find_binaries().postgres.with_name("psql")
    statements = "begin; select streamworker.enqueue('bill', '{\"number\": 5}', 'billing', 50); commit; begin; select streamworker.enqueue('bill', '{}', 'billing'); rollback;"
    database = await pg.fetchval("select current_database()")
    command = [
        psql,
        "-X",
        "-q",
        "-t",
        "-v",
        "ON_ERROR_STOP=1",
        "-h",
        postgres.socket_dir,
        "-U",
        "postgres",
        "-d",
        database,
        "-c",
        statements,
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, env={**os.environ, "PGPORT": "5432"})
    assert said.returncode == 0, said.stderr
    (row,) = await rows(pg)
    assert row["id"] in said.stdout
    assert (row["level"], json.loads(row["payload"])) == ("high", {"number": 5})


async def test_one_notification_per_transaction_and_none_for_an_aborted_one(app, pg, database_url):
    heard: list[str] = []
    listener = await asyncpg.connect(database_url)
    await listener.add_listener("streamworker", lambda *said: heard.append(said[3]))
    await aborted(pg, app.enqueue(Bill(), connection=pg))
    async with pg.transaction():
        await app.enqueue(Bill(), connection=pg)
        await app.enqueue_many([Bill()] * 50, connection=pg)
        await pg.execute("select streamworker.enqueue('k', '{}', 'q')")
    await pg.execute("insert into streamworker.job_queues (name) values ('q')")
    await pg.execute("select pg_notify('streamworker', 'the end')")
    await eventually(lambda: "the end" in heard)
    assert heard == ["", "queues", "the end"]
    await listener.close()


async def test_errors_of_the_users_own_transaction_stay_asyncpgs(app, pg, database_url):
    """Callers retry serialization failures by their class."""
    other = await asyncpg.connect(database_url)
    async with pg.transaction(isolation="repeatable_read"):
        await pg.fetchval("select count(*) from streamworker.jobs")
        async with other.transaction():
            await app.enqueue(Bill(), key="k", connection=other)
        with pytest.raises(asyncpg.SerializationError):
            async with pg.transaction():
                await app.enqueue(Bill(), key="k", connection=pg)
    await other.close()


async def test_the_rights_that_enqueueing_needs_are_those_that_the_docs_name(app, pg, database_url):
    role = f"shop_{database_url.partition('/test_')[2].partition('?')[0]}"
    await pg.execute(f"create role {role} login")
    theirs = await asyncpg.connect(database_url.replace("postgres@", f"{role}@"))
    try:
        with pytest.raises(ConfigurationError, match="may not enqueue"):
            async with theirs.transaction():
                await app.enqueue(Bill(), connection=theirs)
        await pg.execute(f"""
            grant usage on schema streamworker to {role}; grant select, insert on streamworker.jobs to {role};
            grant select, insert, update on streamworker.job_keys to {role};
            grant select on streamworker.job_queues to {role}""")
        async with theirs.transaction():
            await app.enqueue(Bill(), key="k", connection=theirs)
            await app.enqueue_many([Bill()] * COPY_FROM, connection=theirs)
            await theirs.execute("select streamworker.enqueue('k', '{}', 'q', key => 'k')")
    finally:
        await theirs.close()
        await pg.execute(f"drop owned by {role}; drop role {role}")
