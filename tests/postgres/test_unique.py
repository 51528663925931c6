"""Keys that the ledger holds until their jobs have started or ended: the job's status says whether, in the caller's transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import asyncpg
import pytest

from streamworker import App, Context, Payload
from streamworker.postgres.outbox import PostgresOutbox
from streamworker.postgres.pool import open_database
from streamworker.relay.relay import Relay
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working


class InOrder(Payload, kind="in.order", queue="q", order_by="of"):
    of: str
    n: int


class Scene:
    """An app, its rows, and what its handler did."""

    def __init__(self, app: App[Any], pg: asyncpg.Connection) -> None:
        self.app, self.pg = app, pg
        self.ran: list[int] = []
        self.go = asyncio.Event()
        app.handler(max_attempts=1)(self.job)

    async def job(self, payload: Job, ctx: Context) -> None:
        self.ran.append(payload.n)
        if payload.n < 0:
            await self.go.wait()
        if payload.n > 90:
            raise ValueError("no luck")

    async def put(self, n: int = 0, **options: Any) -> Any:
        async with self.pg.transaction():
            return await self.app.enqueue(Job(n=n), connection=self.pg, **{"key": "k", **options})

    async def status(self, job_id: str) -> str | None:
        found: str | None = await self.pg.fetchval("select status from streamworker.jobs where id = $1", job_id)
        return found

    async def until(self, job_id: str, *wanted: str) -> None:
        async def reached() -> bool:
            return await self.status(job_id) in wanted

        await eventually(reached)


@pytest.fixture
async def scene(redis_url, database_url, pg):
    app = App(settings=settings_for(redis_url, database_url, relay="on"))
    async with app:
        yield Scene(app, pg)


@pytest.mark.parametrize("n", [1, 91], ids=["completed", "dead"])
async def test_a_key_is_free_when_its_job_has_ended(scene, n):
    first = await scene.put(n, unique="done")
    assert (await scene.put(2, unique="done")).id == first.id
    assert (await scene.put(3)).id == first.id  # one key, however it is asked for
    async with working(scene.app):
        await scene.until(first.id, "completed", "dead")
        again = await scene.put(4, unique="done")
        assert again.new and again.id != first.id
        await scene.until(again.id, "completed")
    assert scene.ran == [n, 4]


@pytest.mark.parametrize("status", ["queued", "dispatching", "dispatched", "running", "retrying"])
@pytest.mark.parametrize("unique", ["done", "started"])
async def test_it_is_held_as_long_as_the_status_says(scene, status, unique):
    first = await scene.put(1, unique=unique)
    await scene.pg.execute("update streamworker.jobs set status = $1", status)
    free = unique == "started" and status in ("running", "retrying")
    assert (await scene.put(2, unique=unique)).new is free
    assert free or (await scene.put(3, unique=unique)).id == first.id


async def test_two_in_one_call_are_one(scene):
    async with scene.pg.transaction():
        jobs = [scene.app.job(Job(n=n), key="k", unique="done") for n in range(3)]
        answers = await scene.app.enqueue_many([*jobs, Job(n=9)], connection=scene.pg)
    assert [answer.new for answer in answers] == [True, False, False, True]
    assert len({answer.id for answer in answers}) == 2


async def test_who_waits_for_the_other_transaction_gets_its_job(scene, database_url):
    other = await asyncpg.connect(database_url)
    try:
        async with other.transaction():
            first = await scene.app.enqueue(Job(), connection=other, key="k", unique="done")
            waiting = asyncio.create_task(scene.put(2, unique="done"))

            async def waits() -> bool:
                return bool(await other.fetchval("select count(*) from pg_locks where not granted"))

            await eventually(waits)
        assert (await waiting).id == first.id
        transaction = other.transaction()
        await transaction.start()
        await other.execute("delete from streamworker.jobs")
        await transaction.rollback()  # as if nothing had happened
        assert not (await scene.put(3, unique="done")).new
    finally:
        await other.close()


async def test_what_waits_in_the_ledger_is_rewritten(scene):
    first = await scene.put(1, unique="done", delay=600)
    again = await scene.put(2, unique="done", delay=60, replace=True, priority="high")
    assert (again.id, again.new, again.replaced) == (first.id, False, first.id)
    row = await scene.pg.fetchrow("select *, extract(epoch from run_at - now())::float8 as left from streamworker.jobs")
    assert row["payload"] == '{"n": 2}' and row["level"] == "high" and 50 < row["left"] < 61
    await scene.put(3, unique="done", replace=True)
    async with working(scene.app):
        await scene.until(first.id, "completed")
    assert scene.ran == [3]


async def test_what_has_left_the_ledger_is_not(scene):
    first = await scene.put(1, unique="done")
    second = await scene.put(1, key="other", unique="started")
    await scene.pg.execute("update streamworker.jobs set status = 'dispatched', hop = 1")
    kept = await scene.put(2, unique="done", replace=True)
    assert (kept.id, kept.new, kept.replaced) == (first.id, False, None)
    added = await scene.put(2, key="other", replace=True)
    assert added.new and added.id != second.id  # nothing of what was said is lost: both run


async def test_debounced_up_to_the_most(scene):
    async def left() -> float:
        found = await scene.pg.fetchval(
            "select extract(epoch from run_at - created_at)::float8 from streamworker.jobs where status = 'queued'"
        )
        return float(found)

    first = await scene.put(1, debounce=30, debounce_max=40)
    assert 29 < await left() < 31
    assert (await scene.put(2, debounce=35, debounce_max=40)).replaced == first.id
    assert 34 < await left() < 37
    await scene.put(3, debounce=40, debounce_max=40)
    assert await left() == pytest.approx(40)


async def test_any_driver_says_it(scene):
    call = "select streamworker.enqueue_unique('job', $1::jsonb, 'q', 'k'"
    first = await scene.pg.fetchval(f"{call})", '{"n": 1}')
    assert await scene.pg.fetchval(f"{call})", '{"n": 2}') == first
    pushed = await scene.pg.fetchval(
        f"{call}, debounce => '5 minutes', debounce_max => '1 hour', \"unique\" => 'done')", '{"n": 3}'
    )
    assert pushed == first
    row = await scene.pg.fetchrow("select payload, run_at > now() + '4 minutes' as later from streamworker.jobs")
    assert tuple(row) == ('{"n": 3}', True)
    assert not (await scene.put(4, unique="done")).new  # the same key for Python
    with pytest.raises(asyncpg.InvalidParameterValueError, match="done or started"):
        await scene.pg.fetchval(f"{call}, \"unique\" => 'ended')", "{}")


async def test_a_job_with_a_held_key_is_in_lines_too(scene):
    """By SQL and from Python; a job that is rewritten keeps its place in its order, or joins another one at the end."""
    async with scene.pg.transaction():
        first = await scene.app.enqueue(InOrder(of="a", n=1), connection=scene.pg, key="k", unique="done", delay=600)
        second = await scene.app.enqueue(InOrder(of="a", n=2), connection=scene.pg)
        third = await scene.app.enqueue(InOrder(of="b", n=3), connection=scene.pg)

    async def lines() -> dict[str, list[str]]:
        rows = await scene.pg.fetch("select id, order_key from streamworker.jobs order by place")
        found: dict[str, list[str]] = {}
        for job_id, key in rows:
            found.setdefault(key, []).append(job_id)
        return found

    assert await lines() == {"a": [first.id, second.id], "b": [third.id]}
    call = "select streamworker.enqueue_unique('in.order', $1::jsonb, 'q', 'k', replace => true, order_key => $2, fair_key => 't')"
    assert await scene.pg.fetchval(call, '{"of": "a", "n": 4}', "a") == first.id
    assert await lines() == {"a": [first.id, second.id], "b": [third.id]}
    async with scene.pg.transaction():
        moved = await scene.app.enqueue(InOrder(of="b", n=5), connection=scene.pg, key="k", unique="done", replace=True)
    assert moved.replaced == first.id
    assert await lines() == {"a": [second.id], "b": [third.id, first.id]}
    await scene.pg.execute("delete from streamworker.jobs")
    await scene.pg.execute("delete from streamworker.job_keys")
    await scene.pg.fetchval(call, '{"of": "c", "n": 6}', "c")
    assert tuple(await scene.pg.fetchrow("select order_key, fair_key from streamworker.jobs")) == ("c", "t")
    with pytest.raises(asyncpg.InvalidParameterValueError, match="200 bytes"):
        await scene.pg.fetchval(call, "{}", "x" * 201)


async def test_a_key_whose_job_was_forgotten_is_free_and_old_keys_are_looked_at(scene, database_url):
    first = await scene.put(1, unique="done")
    await scene.put(1, key="open", unique="done")
    await scene.pg.execute("delete from streamworker.jobs where id = $1", first.id)
    assert not (await scene.put(2, unique="done")).new  # just now: its row may be on its way
    await scene.pg.execute(
        "update streamworker.job_keys set taken_at = now() - interval '2 minutes', expires_at = now() - interval '1 second'"
    )
    database = await open_database(database_url, name="test")
    try:
        await PostgresOutbox(database).prune_keys()
    finally:
        database.close()
    keys = await scene.pg.fetch("select key, expires_at > now() as later from streamworker.job_keys")
    assert [tuple(row) for row in keys] == [("open", True)]
    assert (await scene.put(3, unique="done")).new


async def test_a_cancelled_job_frees_its_key(scene):
    first = await scene.put(1, unique="done")
    assert await scene.app.cancel(first.id) == "cancelled"
    assert (await scene.put(2, unique="done")).new


# -- one key, whichever way its jobs come


@pytest.fixture(params=["stream", "list"])
async def both(request, redis_url, database_url, pg):
    """An app with the ledger and a relay, and one of a producer that knows no ledger."""
    settings = settings_for(redis_url, database_url, relay="on", mode=request.param)
    async with (
        App(settings=settings) as app,
        App(settings=settings_for(redis_url, None, mode=request.param, ledger="off")) as outside,
    ):
        yield Scene(app, pg), outside


@asynccontextmanager
async def relay_of(scene: Scene) -> AsyncIterator[Relay]:
    """A relay without a loss detector, to be stepped by hand."""
    async with scene.app.relaying() as process:
        yield Relay(process.outbox, process._dispatcher, anyio.Event())


async def _sent(scene: Scene, job_id: str) -> None:
    async with relay_of(scene) as relay:
        await relay.step()
    assert await scene.status(job_id) == "dispatched"


async def test_redis_knows_the_key_of_a_job_that_waits_in_the_ledger(both):
    scene, _ = both
    first = await scene.put(1, unique="done", delay=600)
    told = await scene.app.enqueue(Job(n=2), key="k", unique="done")
    assert (told.id, told.new) == (first.id, False)
    assert (await scene.app.enqueue(Job(n=2), key="k")).id == first.id, "one key, however it is held"
    newer = await scene.app.enqueue(Job(n=3), key="k", unique="done", replace=True)
    assert (newer.id, newer.new, newer.replaced) == (first.id, False, first.id)
    others = await scene.app.enqueue_many([scene.app.job(Job(n=n), key=key) for n, key in ((4, "k"), (5, "x"))])
    assert [other.new for other in others] == [False, True]
    async with working(scene.app):
        await scene.until(first.id, "completed")
        await eventually(lambda: sorted(scene.ran) == [3, 5])


@pytest.mark.parametrize("unique", ["done", "started", None])
async def test_redis_knows_the_key_of_a_job_that_the_relay_has_sent(both, unique):
    scene, outside = both
    first = await scene.put(1, unique=unique)
    await _sent(scene, first.id)
    told = await outside.enqueue(Job(n=2), key="k", unique="done")
    assert (told.id, told.new) == (first.id, False), "a producer without a ledger is told, too"
    async with working(scene.app):
        await scene.until(first.id, "completed")
        if unique is not None:

            async def free() -> bool:  # the ledger knows a moment earlier
                return (await outside.enqueue(Job(n=3), key="k", unique=unique)).new

            await eventually(free)
            await eventually(lambda: scene.ran == [1, 3])


async def test_a_job_of_the_ledger_waits_while_one_of_redis_holds_its_key(both):
    """None is lost, and none runs beside the other."""
    scene, outside = both
    async with working(scene.app):
        first = await outside.enqueue(Job(n=-1), key="k", unique="done")
        await eventually(lambda: scene.ran == [-1])
        second = await scene.put(2, unique="done")
        assert second.new
        assert (await scene.put(3, unique="done")).id == second.id, "the next one meets the one that waits"
        await asyncio.sleep(0.2)  # a look of the relay
        assert scene.ran == [-1]
        assert await scene.status(second.id) in ("queued", "dispatching")
        scene.go.set()
        await scene.until(second.id, "completed")
        assert scene.ran == [-1, 2]
        assert await scene.status(first.id) == "completed"


async def test_a_successor_does_not_start_before_redis_knows_that_the_one_before_has_ended(both):
    """The ledger knows it first: a successor that is enqueued in between waits for a moment, and is not lost."""
    scene, _ = both
    async with working(scene.app):
        first = await scene.put(-1, unique="done")
        await eventually(lambda: scene.ran == [-1])
        await scene.pg.execute("update streamworker.jobs set status = 'completed', finished_at = now()")
        second = await scene.put(2, unique="done")
        assert second.new and second.id != first.id
        await asyncio.sleep(0.2)  # a look of the relay
        assert scene.ran == [-1]
        scene.go.set()
        await scene.until(second.id, "completed")
    assert scene.ran == [-1, 2]


async def test_a_relay_that_dies_over_a_held_key_loses_nothing(both):
    scene, outside = both
    await outside.enqueue(Job(n=1), key="k", unique="done", delay=600)
    second = await scene.put(2, unique="done")
    async with relay_of(scene) as relay:  # claims it, is told that the key is held, and dies
        (taken,) = await relay._outbox.claim()
        assert taken.key is not None and taken.key.name == "k"
    assert await scene.status(second.id) == "dispatching"
    await scene.pg.execute("update streamworker.jobs set updated_at = updated_at - interval '1 minute'")
    async with relay_of(scene) as relay:
        await relay.step()
        assert await scene.status(second.id) == "queued"
        assert await outside.cancel((await outside.enqueue(Job(n=1), key="k", unique="done")).id, queue="q")
        await scene.pg.execute("update streamworker.jobs set run_at = now()")
        await relay.step()
    assert await scene.status(second.id) == "dispatched"


async def test_a_job_that_waits_for_its_key_keeps_its_place_in_its_order(both):
    scene, outside = both
    await outside.enqueue(Job(n=1), key="k", unique="done", delay=600)
    async with scene.pg.transaction():
        jobs = [
            scene.app.job(InOrder(of="a", n=n), **({"key": "k", "unique": "done"} if n == 1 else {})) for n in (1, 2)
        ]
        first, second = await scene.app.enqueue_many(jobs, connection=scene.pg)
    async with relay_of(scene) as relay:
        for _ in range(3):
            await relay.step()
        assert [await scene.status(each.id) for each in (first, second)] == ["dispatching", "queued"]
