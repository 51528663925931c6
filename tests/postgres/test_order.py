"""Order through the ledger: of the jobs with one order key the relay sends them in the order of their commits, also after a loss."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict

import asyncpg
import pytest

from streamworker import App, Payload, Settings
from tests.conftest import eventually
from tests.postgres.working import settings_for, working


class Step(Payload, kind="step", queue="steps", order_by="key", fair_by="tenant"):
    key: str
    number: int
    tenant: str = ""


app = App(settings=Settings())


async def commit(pg, *jobs, **options):
    async with pg.transaction():
        await app.enqueue_many([app.job(job, **options) for job in jobs], connection=pg)


def working_app(redis_url, database_url, ran, **options):
    mine = App(settings=settings_for(redis_url, database_url, relay="on", **options))

    @mine.handler
    async def step(payload: Step) -> None:
        await asyncio.sleep(0.002)
        ran[payload.key].append(payload.number)

    return mine


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_jobs_of_a_key_run_in_the_order_of_their_commits(pg, redis_url, database_url, mode):
    ran = defaultdict(list)
    levels = ["high", "normal", "low"]
    for number in range(9):
        for key in "ab":
            await commit(pg, Step(key, number, "t"), priority=levels[number % 3])
    async with working(working_app(redis_url, database_url, ran, mode=mode)):
        await eventually(lambda: len(ran["a"]) == len(ran["b"]) == 9, timeout=20)
    assert dict(ran) == {"a": list(range(9)), "b": list(range(9))}


async def test_a_transaction_that_began_earlier_and_commits_later_is_later(pg, database_url):
    other = await asyncpg.connect(database_url)
    try:
        slow, fast = pg.transaction(), other.transaction()
        await slow.start()
        await pg.fetch("select 1")  # its now() is earlier
        await fast.start()
        await app.enqueue(Step("k", 1), connection=other)
        waiting = asyncio.ensure_future(app.enqueue(Step("k", 2), connection=pg))
        await asyncio.sleep(0.1)
        assert not waiting.done(), "the key is locked until the other one commits"
        await fast.commit()
        await waiting
        await slow.commit()
    finally:
        await other.close()
    rows = await pg.fetch("select payload->>'number' as number from streamworker.jobs order by place")
    assert [row["number"] for row in rows] == ["1", "2"]


async def test_any_driver_names_the_keys(pg, redis_url, database_url):
    ran = defaultdict(list)
    for number in range(4):
        payload = json.dumps({"key": "s", "number": number})
        await pg.execute(
            "select streamworker.enqueue('step', $1::jsonb, 'steps', order_key => 's', fair_key => 't')", payload
        )
    rows = await pg.fetch("select order_key, fair_key from streamworker.jobs")
    assert {tuple(row) for row in rows} == {("s", "t")}
    with pytest.raises(asyncpg.PostgresError, match="200 bytes"):
        await pg.execute("select streamworker.enqueue('step', '{}', 'steps', order_key => $1)", "x" * 201)
    async with working(working_app(redis_url, database_url, ran)):
        await eventually(lambda: ran["s"] == [0, 1, 2, 3], timeout=20)


async def test_a_job_that_a_relay_took_and_did_not_send_waits_for_an_earlier_one_that_was_lost(
    pg, redis_url, database_url
):
    await commit(pg, *(Step("k", number) for number in range(3)))
    await pg.execute(
        "update streamworker.jobs set status = 'dispatching', updated_at = now() - interval '1 minute' "
        "where (payload->>'number')::int > 0"
    )
    ran = defaultdict(list)
    async with working(working_app(redis_url, database_url, ran)):
        await eventually(lambda: len(ran["k"]) == 3, timeout=20)
    assert ran["k"] == [0, 1, 2]


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_what_redis_lost_runs_again_in_order(pg, raw, redis_url, database_url, mode):
    ran = defaultdict(list)
    gate = asyncio.Event()
    mine = App(settings=settings_for(redis_url, database_url, relay="on", lease=1, mode=mode))

    @mine.handler
    async def step(payload: Step) -> None:
        if payload.number == 2 and not gate.is_set():
            raw.flushall()
            gate.set()
            await asyncio.sleep(3)  # its claim is lost
        ran[payload.key].append(payload.number)

    await commit(pg, *(Step("k", number) for number in range(6)))
    async with working(mine):
        await eventually(lambda: sorted(set(ran["k"])) == list(range(6)), timeout=30)
    first = list(dict.fromkeys(ran["k"]))
    assert first == list(range(6)), ran["k"]
