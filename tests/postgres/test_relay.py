"""The relay: committed jobs reach Redis once and soon, whatever dies, freezes or is away in between."""

import asyncio
import json
import os
import random
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import asyncpg
import pytest

from streamworker import App, Payload, Settings
from streamworker.broker.dispatcher import RedisDispatcher
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.redis.client import RedisAddress
from streamworker.codec import read
from streamworker.postgres import outbox as sql
from streamworker.postgres.outbox import PostgresOutbox
from streamworker.postgres.pool import open_database
from streamworker.relay import Dispatch
from streamworker.relay.relay import Relay
from streamworker.wiring import listener_for
from streamworker.worker.relay_process import RelayProcess, Scheduler
from tests import forkserver
from tests.conftest import eventually
from tests.postgres.working import settings_for, working

ROOT = Path(__file__).parents[2]


class Bill(Payload, kind="bill", queue="billing"):
    number: int = 0


class Note(Payload, kind="note", queue="notes"):
    text: str = ""


app = App(settings=Settings())


@asynccontextmanager
async def outbox_of(database_url):
    database = await open_database(database_url, name="test")
    try:
        yield PostgresOutbox(database)
    finally:
        database.close()


@pytest.fixture
async def outbox(database_url):
    async with outbox_of(database_url) as made:
        yield made


@pytest.fixture(params=[QueueKeys, ListKeys], ids=["stream", "list"])
async def dispatcher(request, redis_url):
    made = RedisDispatcher(RedisAddress(redis_url), request.param, group="workers", namespace="")
    made.shape = request.param.shape
    yield made
    await made.close()


@pytest.fixture
async def streams(redis_url):
    made = RedisDispatcher(RedisAddress(redis_url), QueueKeys, group="workers", namespace="")
    yield made
    await made.close()


@asynccontextmanager
async def running(outbox, dispatcher, database_url=None, *, lease=15.0, **options):
    listener = listener_for(database_url, None, pooled=False) if database_url else None
    relaying = RelayProcess(outbox, dispatcher, listener=listener, lease=lease, **options)
    stopping = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(relaying.run, stopping)
        if database_url:
            await eventually(lambda: relaying.relay.listening)
        yield relaying
        stopping.set()


async def commit(pg, *jobs, **options):
    async with pg.transaction():
        return [
            answer.id for answer in await app.enqueue_many([app.job(job, **options) for job in jobs], connection=pg)
        ]


def lying(raw, shape="stream", queue="billing", level=""):
    """Documents of the ready jobs, in the order they will be taken."""
    if shape == "list":
        return [json.loads(body) for body in reversed(raw.lrange(f"queue:{queue}{level}", 0, -1))]
    return [json.loads(fields[b"job"]) for _, fields in raw.xrange(f"stream:{{{queue}}}{level}")]


async def statuses(pg):
    return dict(await pg.fetch("select status, count(*) from streamworker.jobs group by status"))


# -- from row to document


async def test_what_arrives(outbox, dispatcher, pg, raw):
    (first,) = await commit(pg, Bill(number=7), headers={"traceparent": "00-1", "n": 10**20})
    (second,) = await commit(pg, Note(text="nul \x00"), headers={"a": 1})
    (low,) = await commit(pg, Bill(number=8), priority="low")
    async with running(outbox, dispatcher):
        await eventually(lambda: raw.exists("queue:billing:low", "stream:{billing}:low"))
        await eventually(lambda: lying(raw, dispatcher.shape, "notes"))
    (bill,), (note,), (other,) = (
        lying(raw, dispatcher.shape, "billing"), lying(raw, dispatcher.shape, "notes"), lying(raw, dispatcher.shape, "billing", ":low"),
    )  # fmt: skip
    created = datetime.fromisoformat(bill.pop("created_at"))
    assert abs(datetime.now(UTC) - created) < timedelta(seconds=60)
    assert bill == {
        "id": first,
        "queue_name": "billing",
        "kind": "bill",
        "priority": 100,
        "payload": {"number": 7},
        "hop": 1,
        "headers": {"traceparent": "00-1", "n": 10**20},
    }
    assert (note["id"], note["payload"], note["hop"], note["headers"]) == (second, {"text": "nul \x00"}, 1, {"a": 1})
    assert (other["id"], other["priority"]) == (low, 200)
    rows = await pg.fetch("select status, hop, deliveries, epoch from streamworker.jobs")
    epochs = {raw.hget(f"stream:{{{queue}}}:meta", "epoch").decode() for queue in ("billing", "notes")}
    assert {tuple(row)[:3] for row in rows} == {("dispatched", 1, 0)}
    assert (
        {row["epoch"] for row in rows}
        == epochs
        == set(await pg.fetchval("select array_agg(epoch) from streamworker.job_queues"))
    )
    # Nothing is remembered that is noted.
    assert not raw.exists("stream:{billing}:relayed", "stream:{notes}:relayed")


async def test_a_group_is_there_before_the_first_job(outbox, streams, pg, raw):
    """A worker that comes later must neither miss it nor change the epoch it was dispatched under."""
    await commit(pg, Bill())
    async with running(outbox, streams):
        await eventually(lambda: raw.xlen("stream:{billing}"))
    assert [group["last-delivered-id"] for group in raw.xinfo_groups("stream:{billing}")] == [b"0-0"]
    assert raw.exists("stream:{billing}:high", "stream:{billing}:low") == 2


async def test_what_other_drivers_wrote_arrives_and_what_is_taken_back_does_not(outbox, streams, pg, raw):
    transaction = pg.transaction()
    await transaction.start()
    await app.enqueue(Bill(), connection=pg)
    await transaction.rollback()
    await pg.execute("select streamworker.enqueue('bill', '{\"number\": 5}', 'billing', 10)")
    async with running(outbox, streams):
        await eventually(lambda: raw.xlen("stream:{billing}:high"))
        await commit(pg, Bill(number=6))
        await eventually(lambda: raw.xlen("stream:{billing}"))
    assert [job["payload"]["number"] for job in lying(raw, level=":high") + lying(raw)] == [5, 6]


async def test_order_and_levels_within_a_batch(outbox, streams, pg, raw, monkeypatch):
    monkeypatch.setattr(sql, "LIMIT", 7)
    for n in range(30):
        await commit(pg, Bill(number=n), priority=("high", "normal", "low")[n % 3])
    async with running(outbox, streams):
        await eventually(lambda: statuses_blocking(raw) == 30)
    for level, rest in ((":high", 0), ("", 1), (":low", 2)):
        assert [job["payload"]["number"] for job in lying(raw, level=level)] == list(range(rest, 30, 3))


def statuses_blocking(raw):
    return sum(raw.xlen(f"stream:{{billing}}{level}") for level in (":high", "", ":low"))


async def test_large_jobs_come_in_small_batches(outbox, streams, pg, raw, monkeypatch):
    monkeypatch.setattr(sql, "BYTES", 50_000)
    text = random.Random(7).randbytes(30_000).hex()
    await commit(pg, *(Note(text=text[n:]) for n in range(6)))
    sizes = []
    original = outbox.claim

    async def claim():
        taken = await original()
        sizes.append(len(taken))
        return taken

    outbox.claim = claim
    async with running(outbox, streams):
        await eventually(lambda: raw.xlen("stream:{notes}") == 6)
    assert max(sizes) < 4
    assert sum(sizes) == 6


# -- when


async def test_jobs_wait_for_their_time_in_the_ledger_and_the_relay_sleeps_until_then(
    outbox, streams, pg, raw, database_url
):
    soon = datetime.now(UTC) + timedelta(seconds=1)
    await commit(pg, Bill(number=1), run_at=soon)
    await commit(pg, Bill(number=2), delay=90 * 86400)
    async with running(outbox, streams, database_url):
        await eventually(lambda: raw.xlen("stream:{billing}"))
        assert datetime.now(UTC) >= soon
        (job,) = lying(raw)
        assert job["payload"] == {"number": 1}
        assert "run_at" not in job  # two clocks would have to agree
        # One that is due sooner than what it sleeps for is heard of.
        await commit(pg, Bill(number=3), delay=0.3)
        await eventually(lambda: raw.xlen("stream:{billing}") == 2)
    assert await statuses(pg) == {"dispatched": 2, "queued": 1}


async def test_committed_jobs_are_there_at_once(outbox, streams, pg, raw, database_url):
    """No wall clock is judged here: had it to look by itself, the listening relay would look every five seconds."""
    looks = 0
    original = outbox.claim

    async def claim():
        nonlocal looks
        looks += 1
        return await original()

    outbox.claim = claim
    async with running(outbox, streams, database_url):
        await eventually(lambda: looks > 1)
        for n in range(10):
            await commit(pg, Bill(number=n))
            await eventually(lambda n=n: raw.xlen("stream:{billing}") == n + 1, 3)
        quiet = looks
        await anyio.sleep(1)
        assert looks - quiet <= 2


async def test_without_listening_it_polls(outbox, streams, pg, raw):
    async with running(outbox, streams) as relaying:
        assert not relaying.relay.listening
        await commit(pg, Bill())
        await eventually(lambda: raw.xlen("stream:{billing}"))


async def test_it_listens_again_when_the_connection_breaks(outbox, streams, pg, raw, database_url):
    async with running(outbox, streams, database_url) as relaying:
        kill = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'streamworker relay, listening' and datname = current_database()"
        assert await pg.fetchval(kill)
        await eventually(lambda: not relaying.relay.listening)
        await commit(pg, Bill())
        await eventually(lambda: raw.xlen("stream:{billing}") == 1)
        await eventually(lambda: relaying.relay.listening)
        await commit(pg, Bill())
        await eventually(lambda: raw.xlen("stream:{billing}") == 2)


# -- once


async def test_many_relays_share_the_work_and_add_nothing_twice(database_url, redis_url, pg, raw):
    async with anyio.create_task_group() as group:
        stopping = anyio.Event()
        for _ in range(5):
            group.start_soon(a_relay, database_url, redis_url, stopping)
        ids = []
        for n in range(40):
            ids += await commit(pg, *(Bill(number=i) for i in range(n)))
        await eventually(lambda: raw.xlen("stream:{billing}") >= len(ids))
        stopping.set()
    assert sorted(job["id"] for job in lying(raw)) == sorted(ids)
    assert await statuses(pg) == {"dispatched": len(ids)}


async def a_relay(database_url, redis_url, stopping):
    dispatcher = RedisDispatcher(RedisAddress(redis_url), QueueKeys, group="workers", namespace="")
    async with outbox_of(database_url) as outbox:
        listener = listener_for(database_url, None, pooled=False)
        await RelayProcess(outbox, dispatcher, listener=listener, lease=15).run(stopping)
    await dispatcher.close()


class Died(BaseException):
    """A relay that was killed; nothing after it happens."""


STEPS = ("claim", "dispatch", "note", "forget")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_relay_that_dies_anywhere_forgets_nothing_and_adds_nothing_twice(
    outbox, dispatcher, pg, raw, monkeypatch, step, when
):
    ids = await commit(pg, *(Bill(number=n) for n in range(5)))
    side = outbox if step in ("claim", "note") else dispatcher
    original = getattr(side, step)

    async def dies(*args):
        if when == "after":
            await original(*args)
        raise Died

    setattr(side, step, dies)
    with pytest.raises(Died):
        await Relay(outbox, dispatcher, anyio.Event()).step()
    setattr(side, step, original)
    # A worker may have finished the first one meanwhile, wherever it got it from.
    await pg.execute(
        "update streamworker.jobs set status = 'completed' where id = $1 and status = 'dispatching'", ids[0]
    )
    await pg.execute("update streamworker.jobs set updated_at = updated_at - interval '1 minute'")
    heir = Relay(outbox, dispatcher, anyio.Event())
    await heir.step()
    await heir.step()
    there = sorted(job["id"] for job in lying(raw, dispatcher.shape))
    late = (step, when) in {("claim", "after"), ("dispatch", "before")}  # finished, and never on Redis
    assert there == sorted(ids[1:] if late else ids)
    found = await statuses(pg)
    assert found.pop("completed", 0) <= 1
    assert set(found) == {"dispatched"}
    assert {row["hop"] for row in await pg.fetch("select hop from streamworker.jobs")} == {1}
    assert sum(json_hop(job) for job in lying(raw, dispatcher.shape)) == len(there)


def json_hop(job):
    return job["hop"]


async def test_a_relay_that_was_frozen_adds_nothing_when_it_comes_back(outbox, streams, pg, raw):
    """It holds a batch, another relay takes that over, workers finish the jobs, everything about them is forgotten."""
    ids = await commit(pg, *(Bill(number=n) for n in range(3)))
    frozen = Relay(outbox, streams, anyio.Event())
    await frozen._take()
    await pg.execute("update streamworker.jobs set updated_at = updated_at - interval '1 minute'")
    await Relay(outbox, streams, anyio.Event()).step()
    assert sorted(job["id"] for job in lying(raw)) == sorted(ids)
    assert not raw.exists("stream:{billing}:relayed")
    raw.xtrim("stream:{billing}", maxlen=0)
    # It does not know that time passed: its own check comes first, and it is frozen right behind it.
    until = time.monotonic() - 0.01  # deadlines are whole milliseconds
    assert await streams.dispatch("billing", [Dispatch(each, 1, "normal", b"{}") for each in ids], until) is None
    frozen._until = time.monotonic() - 1
    await frozen._dispatch()
    assert raw.xlen("stream:{billing}") == 0
    assert await statuses(pg) == {"dispatched": 3}


async def test_the_deadline_is_judged_by_the_server_when_the_command_gets_there(streams, raw, own_server):
    there = RedisDispatcher(RedisAddress(own_server.url), QueueKeys, group="workers", namespace="")
    job = [Dispatch("a", 1, "normal", b"{}")]
    assert (await there.dispatch("q", job, time.monotonic() + 5)).there == [True]
    own_server.pause()
    task = asyncio.create_task(there.dispatch("q", [Dispatch("b", 1, "normal", b"{}")], time.monotonic() + 0.3))
    await anyio.sleep(0.5)
    own_server.resume()
    assert await task is None
    with own_server.client() as client:
        assert client.xlen("stream:{q}") == 1
    await there.close()


async def test_repeats_add_nothing_until_they_are_noted(dispatcher, raw):
    jobs = [Dispatch(f"job/{n}", 3, "high", b'{"payload": {}}') for n in range(3)]
    until = time.monotonic() + 60
    first = await dispatcher.dispatch("q", jobs[:2], until)
    again = await dispatcher.dispatch("q", jobs, until)
    assert first.epoch == again.epoch != ""
    assert first.there == [True] * 2 and again.there == [True] * 3
    assert len(lying(raw, dispatcher.shape, "q", ":high")) == 3
    assert raw.zcard("stream:{q}:relayed") == 3
    await dispatcher.forget("q", jobs)
    assert raw.zcard("stream:{q}:relayed") == 0
    assert (await dispatcher.dispatch("q", [Dispatch("job/0", 4, "high", b"{}")], until)).there == [True]
    assert int(raw.hget("stream:{q}:meta", "relayed")) == 4


# -- servers that are away


async def test_redis_away(outbox, pg, own_server, database_url):
    dispatcher = RedisDispatcher(RedisAddress(own_server.url), QueueKeys, group="workers", namespace="")
    async with running(outbox, dispatcher, database_url):
        await commit(pg, Bill(number=0))
        with own_server.client() as client:
            await eventually(lambda: client.xlen("stream:{billing}") == 1)
        own_server.kill()
        ids = await commit(pg, *(Bill(number=n) for n in range(1, 800)))
        await eventually(lambda: taken(pg))
        await anyio.sleep(0.8)
        assert (await statuses(pg))["queued"] > 0  # no more than a batch is taken for a Redis that is away
        own_server.start()
        # What it holds is too late by now and has to be taken over: the clock of the test does not wait for that.
        await pg.execute(
            "update streamworker.jobs set updated_at = updated_at - interval '1 minute' where status = 'dispatching'"
        )
        with own_server.client() as client:
            await eventually(lambda: client.xlen("stream:{billing}") >= 800, 40)
            found = [read(fields[b"job"]).id for _, fields in client.xrange("stream:{billing}")]
    assert len(found) == len(set(found)) == 800
    assert set(ids) < set(found)
    await dispatcher.close()


async def dispatched(pg):
    return (await statuses(pg)).get("dispatched")


async def dispatched_are(pg, count):
    return await statuses(pg) == {"dispatched": count}


async def taken(pg):
    return (await statuses(pg)).get("dispatching")


async def test_postgres_restarts(own_postgres, redis_url, raw):
    url = own_postgres.url()
    dispatcher = RedisDispatcher(RedisAddress(redis_url), QueueKeys, group="workers", namespace="")
    async with outbox_of(url) as outbox, running(outbox, dispatcher, url) as relaying:
        pg = await asyncpg.connect(url)
        await commit(pg, Bill(number=0))
        await eventually(lambda: dispatched(pg))
        own_postgres.kill()
        own_postgres.start()
        pg = await asyncpg.connect(url)
        await commit(pg, Bill(number=1))
        await eventually(lambda: raw.xlen("stream:{billing}") == 2, 20)
        await eventually(lambda: relaying.relay.listening, 20)
        await eventually(lambda: dispatched_are(pg, 2))
        await pg.close()
    await dispatcher.close()


async def test_one_queue_that_redis_refuses_does_not_hold_up_the_others(outbox, streams, pg, raw):
    raw.set("stream:{notes}", "not a stream")
    await commit(pg, Note(), Bill(number=1), Note(), Bill(number=2))
    async with running(outbox, streams):
        await eventually(lambda: raw.xlen("stream:{billing}") == 2)
        await commit(pg, Bill(number=3))
        await eventually(lambda: raw.xlen("stream:{billing}") == 3)
    assert await statuses(pg) == {"dispatched": 3, "dispatching": 2}
    raw.delete("stream:{notes}")
    await pg.execute("update streamworker.jobs set updated_at = updated_at - interval '1 minute'")
    async with running(outbox, streams):
        await eventually(lambda: raw.xlen("stream:{notes}") == 2)


async def test_a_full_redis_adds_nothing_and_forgets_nothing(outbox, streams, pg, raw):
    await commit(pg, *(Note(text="x" * 1000) for _ in range(50)))
    async with running(outbox, streams):
        await eventually(lambda: raw.xlen("stream:{notes}") == 50)
        raw.config_set("maxmemory", 1)
        await commit(pg, *(Bill(number=n) for n in range(5)))
        await eventually(lambda: taken(pg))
        assert raw.zcard("stream:{billing}:relayed") == 0
    raw.config_set("maxmemory", 0)
    await pg.execute("update streamworker.jobs set updated_at = updated_at - interval '1 minute'")
    async with running(outbox, streams):
        await eventually(lambda: raw.xlen("stream:{billing}") == 5)
    assert len({job["id"] for job in lying(raw)}) == 5


async def test_due_jobs_of_all_queues_are_promoted_by_a_relay_on_its_own(outbox, streams, raw, redis_url):
    async with App(settings=Settings(redis_url=redis_url)) as producer:
        await producer.enqueue(Note(text="x"), delay=0.2)
        await producer.enqueue(Bill(), delay=0.2, queue="elsewhere")
    async with running(outbox, streams, scheduler=Scheduler(streams, [], Settings())):
        await eventually(lambda: raw.xlen("stream:{notes}") == raw.xlen("stream:{elsewhere}") == 1)


# -- in workers, and alone


async def test_a_worker_relays_what_it_then_runs(pg, redis_url, database_url):
    seen = []
    mine = App(settings=settings_for(redis_url, database_url, relay="on"))

    @mine.handler
    async def bill(payload: Bill) -> None:
        seen.append(payload.number)

    async with working(mine):
        for n in range(5):
            await commit(pg, Bill(number=n))
            await eventually(lambda n=n: seen == list(range(n + 1)))
        await eventually(lambda: completed(pg, 5))
    assert {row["hop"] for row in await pg.fetch("select hop from streamworker.jobs")} == {1}


async def completed(pg, count):
    return await statuses(pg) == {"completed": count}


@pytest.mark.parametrize("settings", [{"relay": "off"}, {"relay": "on", "ledger": "off"}])
async def test_a_worker_told_not_to_leaves_jobs_where_they_are(pg, raw, redis_url, database_url, settings):
    mine = App(settings=settings_for(redis_url, database_url, **settings))

    @mine.handler
    async def bill(payload: Bill) -> None:
        raise AssertionError

    await commit(pg, Bill())
    async with working(mine):
        await eventually(lambda: raw.exists("stream:{billing}"))
        await anyio.sleep(0.7)  # longer than a blind relay waits between looks
    assert await statuses(pg) == {"queued": 1}


async def test_the_relay_as_a_process_of_its_own(pg, raw, redis_url, database_url):
    env = {k: v for k, v in os.environ.items() if not k.startswith("STREAMWORKER_")}
    env |= {"PYTHONPATH": str(ROOT), "REDIS_URL": redis_url, "DATABASE_URL": database_url, "PYTHONWARNINGS": "error"}
    looks = {"streamworker.worker.relay_process.NEW_QUEUES": 0.3}
    process = forkserver.forked(["relay"], env=env, cwd=ROOT, constants=looks)
    try:
        await commit(pg, Bill())
        await eventually(lambda: raw.xlen("stream:{billing}") == 1, 20)
        async with App(settings=Settings(redis_url=redis_url)) as producer:
            await producer.enqueue(Note(), delay=0.2)
        await eventually(lambda: raw.xlen("stream:{notes}") == 1, 20)
    finally:
        process.terminate()
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 0, said
    assert "relay_stopped" in said


def test_the_relay_without_the_database_or_the_schema_that_it_was_told_of_says_what_to_do(redis_url, empty_database):
    for env, code, words in (
        ({"STREAMWORKER_LEDGER": "on"}, 78, "set DATABASE_URL"),
        ({"STREAMWORKER_APP": "not_there:app"}, 78, "There is no module"),
        ({"DATABASE_URL": empty_database}, 78, "streamworker migrate up"),
    ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("STREAMWORKER_") and k != "DATABASE_URL"}
        clean |= {"PYTHONPATH": str(ROOT), "REDIS_URL": redis_url, **env}
        said = forkserver.run(["relay"], env=clean, cwd=ROOT, timeout=20)
        assert said.returncode == code, said.stderr
        assert words in said.stderr
        assert len([line for line in said.stderr.splitlines() if not line.startswith("{")]) == 1
