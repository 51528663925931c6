"""A Redis that lost jobs is noticed, and what is not finished runs again; a queue is paused from PostgreSQL."""

import json
import os
from pathlib import Path

import anyio
import anyio.to_thread
import asyncpg
import pytest

from streamworker import App, Payload, Settings
from streamworker.broker.dispatcher import RedisDispatcher
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.redis.client import RedisAddress
from streamworker.postgres.outbox import PostgresOutbox
from streamworker.postgres.pool import open_database
from streamworker.relay.loss_detector import LossDetector
from streamworker.relay.relay import Relay
from tests import forkserver
from tests.conftest import eventually
from tests.postgres.working import settings_for, working

ROOT = Path(__file__).parents[2]


class Bill(Payload, kind="bill", queue="billing"):
    number: int = 0


app = App(settings=Settings())


async def commit(pg, *jobs, **options):
    async with pg.transaction():
        made = [app.job(job, **options) for job in jobs]
        return [answer.id for answer in await app.enqueue_many(made, connection=pg)]


async def statuses(pg):
    return dict(await pg.fetch("select status, count(*) from streamworker.jobs group by status"))


async def completed(pg, count):
    return await statuses(pg) == {"completed": count}


@pytest.fixture
async def outbox(database_url):
    database = await open_database(database_url, name="test")
    yield PostgresOutbox(database)
    database.close()


@pytest.fixture(params=[QueueKeys, ListKeys], ids=["stream", "list"])
async def dispatcher(request, redis_url):
    made = RedisDispatcher(RedisAddress(redis_url), request.param, group="workers", namespace="")
    yield made
    await made.close()


def vigil_of(outbox, dispatcher, lease=0.2):
    return LossDetector(outbox, dispatcher, anyio.Event(), lease=lease, listening=True)


async def compare(outbox, dispatcher, pg):
    """What a vigil does about a sign, without the waits between its looks."""
    vigil = vigil_of(outbox, dispatcher)
    await vigil.look()
    await pg.execute("update streamworker.job_queues set recheck_at = now() where recheck_at is not null")
    await vigil.look()


def place(dispatcher, raw):
    if isinstance(dispatcher._keys("q"), ListKeys):
        return [json.loads(body) for body in raw.lrange("queue:billing", 0, -1)]
    return [json.loads(fields[b"job"]) for _, fields in raw.xrange("stream:{billing}")]


# -- signs


async def test_no_sign_no_comparison(outbox, dispatcher, pg, raw):
    await commit(pg, Bill())
    await Relay(outbox, dispatcher, anyio.Event()).step()
    await vigil_of(outbox, dispatcher).look()
    await commit(pg, Bill())
    await Relay(outbox, dispatcher, anyio.Event()).step()
    await vigil_of(outbox, dispatcher).look()
    (row,) = await pg.fetch("select * from streamworker.job_queues")
    assert (row["recheck_at"], row["relayed"], len(row["server"])) == (None, 2, 40)
    assert row["epoch"] == raw.hget("stream:{billing}:meta", "epoch").decode()


async def flush(raw, pg):
    raw.flushall()


async def fewer(raw, pg):
    """A replica that lags: the epoch is the same, the last jobs are not there."""
    raw.delete("stream:{billing}", "queue:billing")
    raw.hset("stream:{billing}:meta", "relayed", 1)


async def moved(raw, pg):
    """Another server answers: an old backup, a failover."""
    raw.delete("stream:{billing}", "queue:billing")
    await pg.execute("update streamworker.job_queues set server = repeat('0', 40)")


async def grouped_anew(raw, pg):
    """Somebody made the streams and their epoch anew, and what was delayed stayed."""
    raw.delete("stream:{billing}", "queue:billing")
    raw.hset("stream:{billing}:meta", "epoch", "fresh")


@pytest.mark.parametrize("loss", [flush, fewer, moved, grouped_anew])
async def test_lost_jobs_are_dispatched_again_and_finished_ones_are_not(outbox, dispatcher, pg, raw, loss):
    ids = await commit(pg, *(Bill(number=n) for n in range(6)))
    await Relay(outbox, dispatcher, anyio.Event()).step()
    await vigil_of(outbox, dispatcher).look()
    # One has finished, one runs, one retries at noon, one was cancelled; the rest waits.
    states = ("completed", "running", "retrying", "cancelled")
    for job_id, status in zip(ids, states, strict=False):
        await pg.execute(
            "update streamworker.jobs set status = $2::text, deliveries = 1, attempt_count = 3, run_at = case when $2 = 'retrying' then '2040-01-01'::timestamptz end where id = $1",
            job_id, status,
        )  # fmt: skip
    await loss(raw, pg)
    await compare(outbox, dispatcher, pg)
    rows = {row["id"]: row for row in await pg.fetch("select * from streamworker.jobs")}
    assert [rows[job_id]["status"] for job_id in ids] == [
        "completed",
        "queued",
        "queued",
        "cancelled",
        "queued",
        "queued",
    ]
    assert [rows[job_id]["hop"] for job_id in ids] == [1, 2, 2, 1, 2, 2]
    await Relay(outbox, dispatcher, anyio.Event()).step()
    again = {job["id"]: job for job in place(dispatcher, raw)}
    assert set(again) == {ids[1], ids[4], ids[5]}
    assert {job["hop"] for job in again.values()} == {3}
    assert again[ids[1]]["attempt_count"] == 3  # what was charged stays charged
    assert rows[ids[2]]["run_at"].year == 2040
    # A sign is told once, and there is nothing to do the next time.
    await compare(outbox, dispatcher, pg)
    assert await statuses(pg) == {"completed": 1, "cancelled": 1, "queued": 1, "dispatched": 3}


@pytest.mark.parametrize("loss", [fewer, moved, grouped_anew])
async def test_what_is_there_is_left_alone_whatever_the_signs_say(redis_url, database_url, outbox, pg, raw, loss):
    """Ready, held, delayed and retrying jobs, in both modes."""
    for mode, keys in (("stream", QueueKeys), ("list", ListKeys)):
        dispatcher = RedisDispatcher(RedisAddress(redis_url), keys, group="workers", namespace="")
        mine = App(settings=settings_for(redis_url, database_url, mode=mode, concurrency=1, lease=30.0))
        gate = anyio.Event()

        mine.handler(handler_of(gate))
        await commit(pg, *(Bill(number=n) for n in range(4)))
        async with working(mine):
            await Relay(outbox, dispatcher, anyio.Event()).step()
            await eventually(lambda: running(pg, 1))
            await vigil_of(outbox, dispatcher).look()
            before = await statuses(pg)
            kept = {name: raw.dump(name) for name in ("stream:{billing}", "queue:billing")}
            await loss(raw, pg)
            for name, value in kept.items():
                if value is not None:
                    raw.restore(name, 0, value, replace=True)
            await compare(outbox, dispatcher, pg)
            assert await statuses(pg) == before
            assert before["running"] == before["retrying"] == 1
            assert before["dispatched"] == 2
            gate.set()
            await eventually(lambda: nothing_is_held(pg))
        await pg.execute("truncate streamworker.jobs, streamworker.job_queues")
        raw.flushall()
        await dispatcher.close()


def handler_of(gate):
    async def bill(payload: Bill) -> None:
        if payload.number == 0:
            raise ZeroDivisionError
        await gate.wait()

    return bill


async def running(pg, count):
    found = await statuses(pg)
    return found.get("running") == count and found.get("retrying") == 1


async def nothing_is_held(pg):
    return set(await statuses(pg)) == {"completed", "retrying"}


async def test_a_comparison_is_made_by_one_relay_and_taken_over_if_that_dies(outbox, dispatcher, pg):
    await outbox.meet({"billing": "e"})
    await pg.execute("update streamworker.job_queues set recheck_at = now(), rechecks = 2")
    first = await outbox.recheck("billing", 60)
    assert first is not None
    assert await outbox.recheck("billing", 60) is None
    await pg.execute("update streamworker.job_queues set recheck_at = now()")  # it never told that it was done
    assert await outbox.recheck("billing", 60) is not None
    for left in (1, 0):
        await outbox.rechecked("billing", 5)
        (row,) = await pg.fetch("select * from streamworker.job_queues")
        assert row["rechecks"] == left
        assert (row["recheck_at"] is None) == (left == 0)


async def test_many_open_jobs_are_compared_in_pages(outbox, redis_url, pg, raw, monkeypatch):
    monkeypatch.setattr("streamworker.postgres.outbox.PAGE", 700)
    dispatcher = RedisDispatcher(RedisAddress(redis_url), QueueKeys, group="workers", namespace="")
    ids = await commit(pg, *(Bill(number=n) for n in range(2000)))
    relay = Relay(outbox, dispatcher, anyio.Event())
    while "queued" in await statuses(pg):
        await relay.step()
    await vigil_of(outbox, dispatcher).look()
    gone = [entry for entry, _ in raw.xrange("stream:{billing}")][::7]
    raw.xdel("stream:{billing}", *gone)
    await pg.execute("update streamworker.job_queues set server = 'another'")
    await compare(outbox, dispatcher, pg)
    assert await statuses(pg) == {"queued": len(gone), "dispatched": len(ids) - len(gone)}
    await dispatcher.close()


async def test_two_redis_on_one_ledger_do_not_take_jobs_for_lost_by_turns(outbox, dispatcher, pg, raw):
    """The one whose server is still the same, and is not the ledger's any more, leaves the ledger alone."""
    await commit(pg, Bill())
    vigil = vigil_of(outbox, dispatcher)
    relay = Relay(outbox, dispatcher, anyio.Event(), loss_detector=vigil)
    await relay.step()
    await vigil.look()
    ours = await pg.fetchval("select server from streamworker.job_queues")
    await commit(pg, Bill())
    # The relay of the other one noted its server, and wants to compare; it has put this job where we do not see it.
    await pg.execute("update streamworker.job_queues set server = 'theirs', recheck_at = now(), rechecks = 3")
    raw.delete("stream:{billing}", "queue:billing")
    await vigil.look()
    await relay.step()
    assert vigil.barred
    assert await statuses(pg) == {"queued": 1, "dispatched": 1}
    (row,) = await pg.fetch("select * from streamworker.job_queues")
    assert (row["server"], row["rechecks"]) == ("theirs", 3)
    # The others are gone, and the ledger is ours again.
    await pg.execute("update streamworker.job_queues set server = $1", ours)
    await vigil.look()
    assert not vigil.barred and await statuses(pg) == {"queued": 2}
    await relay.step()
    assert await statuses(pg) == {"dispatched": 2}


# -- with workers


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_flushed_while_jobs_run_and_wait(redis_url, database_url, pg, raw, mode):
    """What runs finishes, what waits runs; nothing runs twice, since nothing was lost that had finished."""
    seen = []
    gate = anyio.Event()
    mine = App(settings=settings_for(redis_url, database_url, relay="on", concurrency=3, lease=1.0, mode=mode))

    @mine.handler
    async def bill(payload: Bill) -> None:
        seen.append(payload.number)
        if payload.number < 0:
            await gate.wait()

    async with working(mine):
        await commit(pg, *(Bill(number=n) for n in range(-3, 30)))
        await eventually(lambda: len(seen) == 3)
        await eventually(lambda: settled_epoch(pg))
        raw.flushall()
        gate.set()
        await eventually(lambda: completed(pg, 33), 30)
    assert sorted(set(seen)) == list(range(-3, 30))
    assert len([n for n in seen if n >= 0]) == 30


async def settled_epoch(pg):
    return await pg.fetchval("select count(*) from streamworker.job_queues where epoch <> '' and server <> ''")


async def test_restarted_without_persistence_while_nothing_runs(own_server, database_url, pg):
    own_server._aof = False
    own_server.kill()
    own_server.start()
    mine = App(settings=settings_for(own_server.url, database_url, relay="on", lease=0.5))
    seen = []

    @mine.handler
    async def bill(payload: Bill) -> None:
        seen.append(payload.number)

    mine_relay = RedisDispatcher(RedisAddress(own_server.url), QueueKeys, group="workers", namespace="")
    database = await open_database(database_url, name="test")
    outbox = PostgresOutbox(database)
    await commit(pg, *(Bill(number=n) for n in range(5)))
    await Relay(outbox, mine_relay, anyio.Event()).step()
    await vigil_of(outbox, mine_relay).look()
    assert await statuses(pg) == {"dispatched": 5}
    await mine_relay.close()
    own_server.kill()
    own_server.start()
    async with working(mine):
        await eventually(lambda: completed(pg, 5), 30)
    assert sorted(seen) == list(range(5))
    database.close()


# -- by hand


def cli(redis_url, database_url, *words):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STREAMWORKER_")}
    env = {
        **clean,
        "PYTHONPATH": str(ROOT),
        "REDIS_URL": redis_url,
        "DATABASE_URL": database_url,
        "PYTHONWARNINGS": "error",
    }
    return forkserver.run(words, env=env, cwd=ROOT, timeout=30)


async def test_reconcile_by_hand(redis_url, database_url, outbox, pg, raw):
    dispatcher = RedisDispatcher(RedisAddress(redis_url), QueueKeys, group="workers", namespace="")
    ids = await commit(pg, *(Bill(number=n) for n in range(4)))
    await Relay(outbox, dispatcher, anyio.Event()).step()
    await dispatcher.close()
    gone = [json.loads(fields[b"job"])["id"] for _, fields in raw.xrange("stream:{billing}")][:2]
    raw.xdel("stream:{billing}", *[entry for entry, _ in raw.xrange("stream:{billing}")][:2])
    dry = cli(redis_url, database_url, "jobs", "reconcile", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert sorted(json.loads(line)["job_id"] for line in dry.stdout.splitlines()) == sorted(gone)
    assert await statuses(pg) == {"dispatched": 4}
    done = cli(redis_url, database_url, "jobs", "reconcile", "billing", "--yes")
    assert (done.returncode, done.stdout) == (0, "queued again 2 lost jobs\n")
    assert await statuses(pg) == {"dispatched": 2, "queued": 2}
    assert {row["id"] for row in await pg.fetch("select id from streamworker.jobs where status = 'queued'")} == set(
        gone
    )
    assert set(gone) < set(ids)
    assert "no lost job fits" in cli(redis_url, database_url, "jobs", "reconcile", "--yes").stderr


# -- pausing


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_is_active_pauses_and_resumes_a_queue_for_everybody(redis_url, database_url, pg, raw, mode):
    seen = []
    apps = [App(settings=settings_for(redis_url, database_url, relay="on", lease=1.0, mode=mode)) for _ in range(2)]
    for mine in apps:

        @mine.handler
        async def bill(payload: Bill) -> None:
            seen.append(payload.number)

    async with working(apps[0]), working(apps[1]):
        await commit(pg, Bill(number=1))
        await eventually(lambda: seen == [1])
        await pg.execute("update streamworker.job_queues set is_active = false where name = 'billing'")
        await eventually(lambda: raw.hexists("stream:{billing}:meta", "inactive"), 1)
        await anyio.sleep(0.3)  # those that wait for a job have to hear of it
        await commit(pg, Bill(number=2))
        await eventually(lambda: dispatched(pg))
        await anyio.sleep(0.5)
        assert seen == [1]
        # Everything gone, that too: it is paused again before the first job comes.
        raw.flushall()
        await eventually(lambda: raw.hexists("stream:{billing}:meta", "inactive"), 10)
        # An operator's pause is something else.
        raw.hset("stream:{billing}:meta", "paused", "by hand")
        await pg.execute("update streamworker.job_queues set is_active = true where name = 'billing'")
        await eventually(lambda: not raw.hexists("stream:{billing}:meta", "inactive"), 1)
        assert raw.hget("stream:{billing}:meta", "paused") == b"by hand"
        raw.hdel("stream:{billing}:meta", "paused")
        await eventually(lambda: seen == [1, 2], 20)


async def dispatched(pg):
    return (await statuses(pg)).get("dispatched")


# -- while a run holds its row


@pytest.fixture
async def other(database_url):
    """The connection of a run that is frozen, or whose machine is gone, between two statements of its transaction."""
    connection = await asyncpg.connect(database_url)
    await connection.execute("begin")
    yield connection
    connection.terminate()


LOCK = "select 1 from streamworker.jobs where id = $1 for update"


async def test_a_run_that_is_frozen_in_its_transaction_keeps_no_other_lost_job(outbox, dispatcher, pg, raw, other):
    ids = await commit(pg, *(Bill(number=n) for n in range(50)))
    await Relay(outbox, dispatcher, anyio.Event()).step()
    await vigil_of(outbox, dispatcher).look()
    await other.execute(LOCK, ids[7])
    raw.flushall()
    await compare(outbox, dispatcher, pg)
    assert await statuses(pg) == {"queued": 49, "dispatched": 1}
    (queue,) = await pg.fetch("select rechecks, recheck_at - now() as again from streamworker.job_queues")
    assert queue["rechecks"] == 3, "a comparison that met a locked job does not count"
    assert queue["again"].total_seconds() <= 0.2, "it is made again within a lease"
    await other.execute("rollback")
    await pg.execute("update streamworker.job_queues set recheck_at = now()")
    await vigil_of(outbox, dispatcher).look()
    assert await statuses(pg) == {"queued": 50}


async def test_reconcile_by_hand_passes_over_a_job_that_is_locked_and_says_so(
    redis_url, database_url, outbox, pg, raw, other
):
    dispatcher = RedisDispatcher(RedisAddress(redis_url), QueueKeys, group="workers", namespace="")
    ids = await commit(pg, *(Bill(number=n) for n in range(4)))
    await Relay(outbox, dispatcher, anyio.Event()).step()
    await dispatcher.close()
    raw.delete("stream:{billing}")
    await other.execute(LOCK, ids[1])
    done = await anyio.to_thread.run_sync(cli, redis_url, database_url, "jobs", "reconcile", "billing", "--yes")
    assert (done.returncode, done.stdout) == (1, "queued again 3 lost jobs\n")
    assert f"refused: billing {ids[1]}: a run of it is in its transaction" in done.stderr
    assert await statuses(pg) == {"dispatched": 1, "queued": 3}


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_a_row_that_a_fast_run_has_locked_is_noted_later(outbox, dispatcher, pg, raw, other, ends):
    """The relay goes on, Redis remembers the job meanwhile, and forgets it once the run has ended or it is noted."""
    ids = await commit(pg, *(Bill(number=n) for n in range(3)))
    relay = Relay(outbox, dispatcher, anyio.Event())
    add = dispatcher.dispatch

    async def dispatch(*args):
        done = await add(*args)  # a worker may be faster than the note
        await other.execute("update streamworker.jobs set status = 'completed' where id = $1", ids[1])
        return done

    dispatcher.dispatch = dispatch
    assert await relay.step() == 0
    assert await statuses(pg) == {"dispatched": 2, "dispatching": 1}
    relayed = dispatcher._keys("billing").relayed
    assert raw.zrange(relayed, 0, -1) == [f"{ids[1]}/1".encode()]
    assert await relay.step() <= 1.0, "it is noted again soon"
    await other.execute(ends)
    relay._note_at = 0.0
    await relay.step()
    assert not raw.exists(relayed)
    left = {"commit": {"dispatched": 2, "completed": 1}, "rollback": {"dispatched": 3}}
    assert await statuses(pg) == left[ends]
