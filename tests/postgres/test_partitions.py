"""Partitions and the ledger: its jobs find their homes, a partition that lost its data is noticed, growth is no loss."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from streamworker import App, Payload
from streamworker.broker.dispatcher import RedisDispatcher
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.partitions import Partitions, home_name, partition_of
from streamworker.broker.redis.client import RedisAddress
from tests.conftest import eventually
from tests.postgres.working import settings_for, working


class Step(Payload, kind="step", queue="q", order_by="key"):
    key: str
    n: int


class Plain(Payload, kind="plain", queue="q"):
    n: int


def dispatcher_of(redis_url: str, keys: Any, count: int) -> RedisDispatcher:
    address, parts = RedisAddress(redis_url), Partitions([("q", count, ())])
    return RedisDispatcher(address, keys, group="workers", namespace="", parts=parts)


def app_of(redis_url: str, database_url: str, ran: dict[str, list[int]], **options: Any) -> App:
    app = App(settings=settings_for(redis_url, database_url, partitions="q=4", relay="on", **options))

    @app.handler
    async def step(payload: Step) -> None:
        ran[payload.key].append(payload.n)

    @app.handler
    async def plain(payload: Plain) -> None:
        ran["plain"].append(payload.n)

    return app


async def statuses(pg: Any) -> dict[str, int]:
    return dict(await pg.fetch("select status, count(*) from streamworker.jobs group by status"))


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_jobs_of_transactions_run_in_order_in_their_homes(redis_url, raw, database_url, pg, mode):
    ran: dict[str, list[int]] = defaultdict(list)
    app = app_of(redis_url, database_url, ran, mode=mode)
    async with app, working(app):
        for n in range(5):
            async with pg.transaction():
                await app.enqueue_many([Step(key=f"k{k}", n=n) for k in range(8)], connection=pg)
                await app.enqueue(Plain(n=n), connection=pg)

        async def done() -> bool:
            return await statuses(pg) == {"completed": 45}

        await eventually(done)
    assert {key: numbers for key, numbers in ran.items() if key != "plain"} == {
        f"k{k}": list(range(5)) for k in range(8)
    }
    assert sorted(ran["plain"]) == list(range(5))
    used = {partition_of(f"k{k}", 4) for k in range(8)}
    assert all(raw.exists(f"stream:{{{home_name('q', number)}}}:meta") for number in used)


@pytest.mark.parametrize("keys", [QueueKeys, ListKeys], ids=["stream", "list"])
async def test_the_identity_of_a_queue_tells_growth_from_loss(redis_url, raw, keys):
    whole, four = dispatcher_of(redis_url, keys, 1), dispatcher_of(redis_url, keys, 4)
    try:
        await whole.found("q")
        (before,) = await whole.pulses(["q"])
        await four.found("q")
        (grown,) = await four.pulses(["q"])
        assert grown.epoch == before.epoch
        await four.found("q")
        assert [pulse.epoch for pulse in await four.pulses(["q"])] == [before.epoch]
        raw.delete(*raw.keys("stream:{q#2}*"))
        await four.found("q")
        (lost,) = await four.pulses(["q"])
        assert lost.epoch != before.epoch
        await four.found("q")
        assert [pulse.epoch for pulse in await four.pulses(["q"])] == [lost.epoch]
    finally:
        await whole.close()
        await four.close()


async def test_what_a_partition_lost_runs_again(redis_url, raw, database_url, pg):
    ran: dict[str, list[int]] = defaultdict(list)
    app = app_of(redis_url, database_url, ran)
    async with app.operator() as operator:
        await operator.pause("q", "until it is lost")
    async with app, working(app):
        async with pg.transaction():
            await app.enqueue_many([Plain(n=n) for n in range(60)], connection=pg)

        async def dispatched() -> bool:
            return await statuses(pg) == {"dispatched": 60}

        await eventually(dispatched)
        # Sixty, of which some come to each partition; all are there, as nothing is claimed yet.
        homes = ("q", "q#1", "q#2", "q#3")
        await eventually(lambda: sum(raw.xlen(f"stream:{{{home}}}") for home in homes) == 60)
        lost = [name for name in raw.keys("stream:{q#2}*") if not name.endswith(b":order")]
        assert raw.xlen("stream:{q#2}")
        raw.delete(*lost)
        async with app.operator() as operator:
            await operator.resume("q")

        async def done() -> bool:
            return await statuses(pg) == {"completed": 60}

        await eventually(done)
    assert sorted(ran["plain"]) == list(range(60))
