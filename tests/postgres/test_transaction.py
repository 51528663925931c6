"""ctx.transaction() and ctx.complete(): the handler's writes and "this job is done", together and once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec
import pytest

from streamworker import codec
from streamworker.errors import RunEnded, Unreachable, UsageError
from streamworker.postgres import FINAL, Effect, RunRecord
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.pool import open_database
from streamworker.postgres.transaction import take
from tests.conftest import eventually
from tests.postgres.proxy import CuttingProxy


@pytest.fixture
async def ledger(database_url: str, pg: asyncpg.Connection) -> AsyncIterator[PostgresLedger]:
    await pg.execute("create table effect (n integer)")
    async with opened(database_url, database_url) as ledger:
        yield ledger


@asynccontextmanager
async def opened(database_url: str, handlers_url: str, **options: Any) -> AsyncIterator[PostgresLedger]:
    database = await open_database(database_url)
    async with asyncpg.create_pool(handlers_url, min_size=0, max_size=5, **options) as pool:
        yield PostgresLedger(database, pool, "worker-1")
        database.close()
        pool.terminate()


def run(job_id: str = "a", *, hop: int = 0, deliveries: int = 1, payload: bytes = b'{"n": 1}') -> RunRecord:
    body = b'{"id": "%s", "payload": %s, "created_at": "2026-01-02T03:04:05Z"}' % (job_id.encode(), payload)
    return RunRecord(
        job_id,
        "q",
        "k",
        "normal",
        hop,
        deliveries,
        1,
        0,
        20,
        b"e",
        body,
        msgspec.Raw(payload),
        {"h": 1},
        time.time(),
        codec.made_at(body),
    )


async def effects(pg: asyncpg.Connection) -> list[int]:
    return [each["n"] for each in await pg.fetch("select n from effect order by n")]


async def job(pg: asyncpg.Connection, job_id: str = "a") -> dict[str, Any]:
    found = await pg.fetchrow("select * from streamworker.jobs where id = $1", job_id)
    return dict(found) if found is not None else {"status": None}


async def test_the_writes_and_the_end_of_the_job_commit_together(ledger, pg):
    transaction = ledger.transaction(run(), None)
    async with transaction as connection:
        await connection.execute("insert into effect values (1)")
        assert await effects(pg) == [] and (await job(pg))["status"] is None
    assert transaction.effect is Effect.COMMITTED
    assert await effects(pg) == [1]
    stored = await job(pg)
    assert (stored["status"], stored["worker_id"], json.loads(stored["payload"])) == ("completed", "worker-1", {"n": 1})
    assert stored["created_at"].isoformat() == "2026-01-02T03:04:05+00:00"
    assert stored["started_at"] <= stored["finished_at"]


async def test_an_error_undoes_all_of_it(ledger, pg):
    await pg.execute("insert into streamworker.jobs (id, queue_name, status) values ('a', 'q', 'dispatched')")
    transaction = ledger.transaction(run(), None)
    with pytest.raises(ValueError, match="no"):
        async with transaction as connection:
            await connection.execute("insert into effect values (1)")
            raise ValueError("no")
    assert transaction.effect is Effect.UNDONE
    assert await effects(pg) == [] and (await job(pg))["status"] == "dispatched"


@pytest.mark.parametrize(
    ("status", "hop", "deliveries"),
    [("completed", 0, 1), ("cancelled", 0, 1), ("running", 0, 2), ("dispatched", 1, 0)],
)
async def test_nothing_is_written_for_a_job_that_ended_or_goes_on_elsewhere(ledger, pg, status, hop, deliveries):
    await pg.execute(
        "insert into streamworker.jobs (id, queue_name, status, hop, deliveries) values ('a', 'q', $1, $2, $3)",
        status, hop, deliveries,
    )  # fmt: skip
    before = await job(pg)
    transaction = ledger.transaction(run(), None)
    with pytest.raises(RunEnded):
        async with transaction as connection:
            await connection.execute("insert into effect values (1)")
    assert transaction.effect is (Effect.ENDED if status in FINAL else Effect.SUPERSEDED)
    assert await effects(pg) == [] and await job(pg) == before


async def test_two_runs_of_a_job_write_once(ledger, pg):
    """The second waits for the first, and finds the job completed."""
    entered, go = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with ledger.transaction(run(), None) as connection:
            await connection.execute("insert into effect values (1)")
            entered.set()
            await go.wait()

    async def second() -> Effect:
        transaction = ledger.transaction(run(deliveries=2), None)
        try:
            async with transaction as connection:
                await connection.execute("insert into effect values (2)")
        except RunEnded:
            pass
        return transaction.effect

    one = asyncio.create_task(first())
    await entered.wait()
    two = asyncio.create_task(second())
    await eventually(lambda: pg.fetchval("select count(*) from pg_locks where not granted"))
    go.set()
    await one
    assert await two is Effect.ENDED
    assert await effects(pg) == [1]


async def test_who_waits_too_long_comes_back_later(ledger, pg):
    async with pg.transaction():
        await pg.execute("insert into streamworker.jobs (id, queue_name) values ('a', 'q')")
        transaction = ledger.transaction(run(), None)
        with pytest.raises(RunEnded):
            async with transaction:
                pytest.fail("it must not begin")
    assert transaction.effect is Effect.BUSY


async def test_a_zombie_finds_its_job_taken_over(ledger, pg):
    """It was frozen between its claim and its first statement; its successor is at work, or done."""
    successor = ledger.transaction(run(deliveries=2), None)
    async with successor as connection:
        await connection.execute("insert into effect values (2)")
    zombie = ledger.transaction(run(deliveries=1), None)
    with pytest.raises(RunEnded):
        async with zombie:
            pytest.fail("it must not begin")
    assert (zombie.effect, await effects(pg), (await job(pg))["deliveries"]) == (Effect.ENDED, [2], 2)


async def test_a_frozen_transaction_is_ended_by_the_server_at_its_deadline(ledger, pg):
    zombie = ledger.transaction(run(), time.monotonic() + 0.5)
    connection = await zombie.__aenter__()
    await connection.execute("insert into effect values (1)")
    # Its client does nothing any more; the successor needs the row.
    successor = ledger.transaction(run(deliveries=2), None)
    await eventually(
        lambda: pg.fetchval("select count(*) = 0 from pg_stat_activity where state = 'idle in transaction'")
    )
    async with successor as connection:
        await connection.execute("insert into effect values (2)")
    with pytest.raises(Unreachable):
        await zombie.__aexit__(None, None, None)
    assert zombie.effect is Effect.LOST
    assert (await effects(pg), (await job(pg))["deliveries"]) == ([2], 2)


async def test_timeouts_are_bounded_by_the_deadline_and_no_longer_than_the_sessions_own(database_url, pg):
    options = {"server_settings": {"statement_timeout": "2s", "lock_timeout": "7s"}}
    show = "select current_setting('statement_timeout'), current_setting('idle_in_transaction_session_timeout'), current_setting('lock_timeout')"
    async with opened(database_url, database_url, **options) as ledger:
        async with ledger.transaction(run("a"), time.monotonic() + 60) as connection:
            statement, idle, lock = await connection.fetchrow(show)
            assert (statement, lock) == ("2s", "7s")
            assert 55_000 < int(idle.removesuffix("ms")) <= 60_000
        async with ledger.transaction(run("b"), time.monotonic() + 1) as connection:
            statement, idle, lock = await connection.fetchrow(show)
            assert lock == "7s"
            assert 0 < int(statement.removesuffix("ms")) <= 1000
        async with ledger.transaction(run("c"), None) as connection:
            assert tuple(await connection.fetchrow(show)) == ("2s", "0", "7s")
        async with ledger._pool.acquire() as connection:
            assert tuple(await connection.fetchrow(show)) == ("2s", "0", "7s")


async def test_a_failure_that_the_handler_swallows_commits_nothing(ledger, pg):
    transaction = ledger.transaction(run(), None)
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        async with transaction as connection:
            await connection.execute("insert into effect values (1)")
            with pytest.raises(asyncpg.UndefinedTableError):
                await connection.execute("insert into nowhere values (1)")
    assert transaction.effect is Effect.UNDONE
    assert await effects(pg) == [] and (await job(pg))["status"] is None


async def test_a_constraint_that_is_checked_at_commit_undoes_all_of_it(ledger, pg):
    await pg.execute("create table strict (n integer unique deferrable initially deferred)")
    transaction = ledger.transaction(run(), None)
    with pytest.raises(asyncpg.UniqueViolationError):
        async with transaction as connection:
            await connection.execute("insert into effect values (1)")
            await connection.execute("insert into strict values (1), (1)")
    assert transaction.effect is Effect.UNDONE
    assert await effects(pg) == [] and (await job(pg))["status"] is None


async def test_ending_it_by_hand_is_a_mistake(ledger, pg):
    transaction = ledger.transaction(run(), None)
    with pytest.raises(UsageError, match="inside the block"):
        async with transaction as connection:
            await connection.execute("insert into effect values (1); commit")
    assert transaction.effect is Effect.UNDONE


async def test_savepoints_work_inside(ledger, pg):
    async with ledger.transaction(run(), None) as connection:
        await connection.execute("insert into effect values (1)")
        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():
                await connection.execute("insert into effect values (2)")
                raise ZeroDivisionError
    assert await effects(pg) == [1] and (await job(pg))["status"] == "completed"


async def test_a_cancellation_that_comes_during_the_commit_waits_for_it(ledger, pg, monkeypatch):
    transaction = ledger.transaction(run(), None)
    commit = transaction._commit

    async def slow() -> None:
        task.cancel()
        await asyncio.sleep(0.05)
        task.cancel()
        await commit()

    monkeypatch.setattr(transaction, "_commit", slow)

    async def handler() -> None:
        async with transaction as connection:
            await connection.execute("insert into effect values (1)")

    task = asyncio.create_task(handler())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transaction.effect is Effect.COMMITTED
    assert await effects(pg) == [1] and (await job(pg))["status"] == "completed"


async def test_a_cancelled_handler_leaves_nothing_behind(ledger, pg):
    inside = asyncio.Event()
    transaction = ledger.transaction(run(), None)

    async def handler() -> None:
        async with transaction as connection:
            await connection.execute("insert into effect values (1)")
            inside.set()
            await connection.execute("select pg_sleep(60)")

    task = asyncio.create_task(handler())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transaction.effect is Effect.UNDONE
    assert await effects(pg) == []
    await eventually(
        lambda: pg.fetchval("select count(*) = 0 from pg_stat_activity where state = 'idle in transaction'")
    )


@pytest.mark.parametrize("cut", ["reply", "request"])
async def test_a_commit_whose_answer_is_lost_is_looked_up(database_url, ledger, pg, cut):
    async with CuttingProxy(database_url) as proxy, opened(database_url, proxy.url) as through:
        proxy.cut(b"COMMIT", after=cut == "reply")
        transaction = through.transaction(run(), None)

        async def work() -> None:
            async with transaction as connection:
                await connection.execute("insert into effect values (1)")

        if cut == "reply":
            await work()
            assert transaction.effect is Effect.COMMITTED
            assert await effects(pg) == [1] and (await job(pg))["status"] == "completed"
        else:
            with pytest.raises(Unreachable):
                await work()
            assert transaction.effect is Effect.LOST
            assert await effects(pg) == [] and (await job(pg))["status"] is None
        assert proxy.cuts == 1


async def test_payloads_that_jsonb_cannot_hold_are_kept_as_the_document(ledger, pg):
    for name, payload in {"nul": b'{"x": "a\\u0000"}', "number": b'{"x": 1e999999}'}.items():
        async with ledger.transaction(run(name, payload=payload), None) as connection:
            await connection.execute("insert into effect values (1)")
        stored = await job(pg, name)
        assert (stored["status"], stored["payload"]) == ("completed", None)
        assert stored["document"] == run(name, payload=payload).body
    assert await effects(pg) == [1, 1]


async def test_users_type_codecs_do_not_matter(database_url, pg):
    async def init(connection: asyncpg.Connection) -> None:
        for name in ("int4", "int8", "float8", "bool", "jsonb", "bytea"):
            await connection.set_type_codec(
                name, schema="pg_catalog", encoder=lambda value: f"<{value}>", decoder=lambda value: f"<{value}>"
            )

    async with (
        opened(database_url, database_url, init=init) as ledger,
        ledger.transaction(run(), time.monotonic() + 60) as connection,
    ):
        assert await connection.fetchval("select 1") == "<1>"
    assert (await job(pg))["status"] == "completed"


# -- ctx.complete()


async def test_complete_in_the_users_own_transaction(ledger, pg, database_url):
    connection = await asyncpg.connect(database_url)
    async with connection.transaction():
        await connection.execute("insert into effect values (1)")
        await ledger.complete(run(), connection)
        assert (await job(pg))["status"] is None
    stored = await job(pg)
    assert (stored["status"], await effects(pg)) == ("completed", [1])
    assert stored["finished_at"] is not None
    with pytest.raises(RunEnded):
        async with connection.transaction():
            await connection.execute("insert into effect values (2)")
            await ledger.complete(run(), connection)
    assert await effects(pg) == [1]
    await connection.close()


async def test_complete_comes_to_nothing_with_the_users_transaction(ledger, pg, database_url):
    connection = await asyncpg.connect(database_url)
    transaction = connection.transaction()
    await transaction.start()
    await ledger.complete(run(), connection)
    await transaction.rollback()
    assert (await job(pg))["status"] is None
    await connection.close()


async def test_complete_needs_a_transaction(ledger, pg):
    with pytest.raises(UsageError, match="transaction"):
        await ledger.complete(run(), pg)
    with pytest.raises(UsageError, match="asyncpg"):
        await ledger.complete(run(), object())


async def test_a_row_is_not_held_for_long_by_a_machine_that_is_gone(own_postgres):
    """The server probes the connection of a run while it has the row, and as it was told to before and after it."""
    own_postgres.stop()
    address = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
    own_postgres.listen(address)
    own_postgres.start()
    names = ("idle", "interval", "count")
    show = "select " + ", ".join(f"current_setting('tcp_keepalives_{name}')::int" for name in names)
    connection = await asyncpg.connect(own_postgres.url(), host=address)
    try:
        before = tuple(await connection.fetchrow(show))
        run = RunRecord("a", "q", "k", "normal", 0, 1, 1, 0, None, b"", None, msgspec.Raw(b"{}"), None, None)
        async with connection.transaction():
            await take(connection, run, "w", becomes="running", within=None)
            idle, interval, count = await connection.fetchrow(show)
            assert idle + interval * count <= 15
        assert tuple(await connection.fetchrow(show)) == before != (idle, interval, count)
    finally:
        await connection.close()
