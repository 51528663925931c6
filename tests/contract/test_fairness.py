"""Fairness: each tenant with work gets its share of the starts, whatever the length of its line; no slot stays idle."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import anyio
import pytest

from streamworker import App, Payload, Settings, codec
from streamworker.job import Dead, PackedJob, RetryAt
from streamworker.producer import make_job
from tests.conftest import eventually
from tests.contract.helpers import done, ended, names, settings, settle_one, stream_only, working


@pytest.fixture
async def operator(ground, redis_url):
    async with App(settings=Settings(redis_url=redis_url, mode=ground.mode)).operator() as operator:
        yield operator


def fair(name: str, tenant: str, level: Any = "normal", **options: Any) -> PackedJob:
    body = json.dumps({"id": name, "fair_key": tenant, "hop": 1, "payload": {"name": name}}).encode()
    return PackedJob(name, "q", level, body, key_ttl=60.0, lined=True, **options)


def many(tenant: str, count: int, **options: Any) -> list[PackedJob]:
    return [fair(f"{tenant}{number}", tenant, **options) for number in range(count)]


async def starts(broker: Any, count: int, at_once: int = 1) -> list[str]:
    """Tenants of the next starts, each settled before the next claim."""
    started: list[str] = []
    while len(started) < count:
        claims = await broker.claim(min(at_once, count - len(started)), 0, ())
        assert claims, f"nothing is ready after {started}"
        started += [name[0] for name in names(claims)]
        await broker.settle([done(claim) for claim in claims])
    return started


def nothing_left(raw: Any) -> bool:
    lines = [name for name in raw.keys("stream:{q}:fair*") if name != b"stream:{q}:fair"]
    return not lines and not raw.hexists("stream:{q}:meta", "fair")


@pytest.mark.parametrize("at_once", [1, 7])
async def test_every_tenant_gets_its_share(broker_factory, raw, at_once):
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 100) + many("b", 20) + many("c", 20))
        counts = Counter(await starts(broker, 45, at_once))
        assert all(13 <= counts[tenant] <= 17 for tenant in "abc"), counts
        await starts(broker, 95, at_once)
        assert await broker.claim(1, 0, ()) == []
        assert nothing_left(raw)


async def test_a_quiet_tenant_is_next_but_one_for_every_other(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 200) + many("b", 200))
        await starts(broker, 100, 5)
        await broker.publish(many("q", 1))
        assert "q" in await starts(broker, 4), "one that is ready, and one for every other tenant"


async def test_who_was_idle_has_saved_nothing_up(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 10) + many("b", 150))
        await starts(broker, 110)  # a has been idle for ninety starts
        await broker.publish(many("a", 50))
        counts = Counter(await starts(broker, 20))
        assert 9 <= counts["a"] <= 11, counts


async def test_coming_one_by_one_gains_nothing(broker_factory):
    """A tenant that enqueues its next job when its last one has started gets one start in T, not every second one."""
    async with broker_factory("w") as broker:
        for tenant in "abcd":
            await broker.publish(many(tenant, 60))
        count = 0
        await broker.publish([fair("s0", "s")])
        for number in range(1, 101):
            (tenant,) = await starts(broker, 1)
            if tenant == "s":
                count += 1
                await broker.publish([fair(f"s{number}", "s")])
        assert 18 <= count <= 23, count


async def test_weights(broker_factory, raw):
    raw.hset("stream:{q}:fair", mapping={"weight:a": 3})
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 100) + many("b", 100))
        counts = Counter(await starts(broker, 80, 5))
        assert 57 <= counts["a"] <= 63, counts


async def test_workers_store_the_weights_of_their_app(raw, ground):
    app = App(settings=settings(raw, ground, queues=()), fair_weights={"a": 3, "b": 0.5})

    @app.handler
    async def report(payload: Report) -> None: ...

    async with app, working(app):
        await eventually(lambda: raw.hget("stream:{q}:fair", "weight:a") == b"3.0")
    assert raw.hget("stream:{q}:fair", "weight:b") == b"0.5"


async def test_an_idle_worker_finds_a_ready_job_as_long_as_there_is_one(broker_factory, raw):
    """Workers that take one job at a time, and one that waits: the wait ends although the lines are no ready key."""
    async with broker_factory("v") as busy, broker_factory("w") as idle:
        found: list[Any] = []

        async def wait() -> None:
            found.extend(await idle.claim(1, 5, ()))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(0.1)
            await busy.publish(many("a", 3))
            with anyio.fail_after(4):
                await eventually(lambda: bool(found))
        assert len(await busy.claim(5, 0, ())) == 2
        assert nothing_left(raw)


async def test_levels_come_first(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 5, level="low") + many("b", 3) + many("c", 2, level="high"))
        assert "".join(await starts(broker, 10)) == "ccbbbaaaaa"


async def test_what_waits_in_lines_is_counted_as_ready(broker_factory, operator):
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 30))
        (claim,) = await broker.claim(1, 0, ())
        (depth,) = await broker.depth()
        assert (depth.ready, depth.running, depth.waiting) == (29, 1, 0)
        assert (await operator.depth(["q"]))[0].ready == 29
        await settle_one(broker, done(claim))


async def test_purging_the_ready_jobs_empties_the_lines(broker_factory, operator, raw):
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 30) + many("b", 5))
        (claim,) = await broker.claim(1, 0, ())
        assert await operator.purge("q", "ready", 1000) == 34
        assert (await broker.depth())[0].ready == 0
        await settle_one(broker, done(claim))
        await broker.publish(many("b", 2))
        assert await starts(broker, 2) == ["b", "b"]


async def test_a_retry_has_had_its_turn(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 1) + many("b", 30))
        (claim,) = await broker.claim(1, 0, ())
        body = codec.rewrite(claim.body, {"hop": 2})
        await settle_one(broker, ended(claim, RetryAt(0, "why"), body=body))
        await broker.promote()
        assert "a" in await starts(broker, 3)


async def test_a_dead_job_goes_back_by_way_of_its_line(broker_factory, operator, raw):
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 1))
        (claim,) = await broker.claim(1, 0, ())
        await settle_one(broker, ended(claim, Dead("why"), body=None, job_id="a0"))
        await broker.publish(many("b", 20))
        assert await operator.replay((await operator.dead("q")).rows[0])
        assert "a" in await starts(broker, 4)


@stream_only
async def test_a_ready_key_that_cannot_be_written_loses_nothing(broker_factory, raw):
    async with broker_factory("w") as broker:
        raw.set("stream:{q}:high", "odd")
        await broker.publish([fair("x", "a", "high"), fair("y", "a", "high")])
        raw.delete("stream:{q}:high")
        await broker.promote()
        assert names(await broker.claim(5, 0, ())) == ["x", "y"]


async def test_lines_outlive_what_the_meta_hash_says_of_them(broker_factory, raw):
    """It may be deleted by hand, or lost: no job stays in a line for that, though no other one joins it."""
    async with broker_factory("w") as broker:
        await broker.publish(many("a", 10) + many("b", 10, level="low"))
        await starts(broker, 1)
        raw.delete("stream:{q}:meta")
        for claim in await broker.claim(5, 0, ()):  # what was ready before; the queue is known anew
            await broker.settle([done(claim)])
        await broker.promote()
        while claims := await broker.claim(5, 0, ()):
            await broker.settle([done(claim) for claim in claims])
        assert nothing_left(raw)
        assert (await broker.depth())[0].ready == 0


# -- with workers


class Report(Payload, kind="report", queue="q", fair_by="tenant"):
    tenant: str
    number: int


class Both(Payload, kind="both", queue="q", fair_by="tenant", order_by="account"):
    tenant: str
    account: str
    number: int


def test_a_fair_job_goes_by_way_of_its_line():
    packed = codec.pack(make_job(Report("t", 1)), max_bytes=10_000, key_ttl=1)
    told = json.loads(packed.body)
    assert (told["fair_key"], told["hop"], packed.lined) == ("t", 1, True)


async def test_a_tenant_that_floods_does_not_hold_up_the_others(raw, ground):
    ran: list[str] = []
    app = App(settings=settings(raw, ground, concurrency=4))

    @app.handler
    async def report(payload: Report) -> None:
        await anyio.sleep(0.001)
        ran.append(payload.tenant)

    async with app:
        await app.enqueue_many([Report("large", number) for number in range(300)])
        async with working(app):
            await eventually(lambda: len(ran) > 20)
            before = len(ran)
            await app.enqueue(Report("small", 0))
            await eventually(lambda: "small" in ran)
            assert ran.index("small") - before <= 40
            await eventually(lambda: len(ran) == 301, timeout=20)
    assert nothing_left(raw)


async def test_a_producer_of_another_language_gets_its_share(raw, ground):
    ran: list[str] = []
    app = App(settings=settings(raw, ground, concurrency=4))

    @app.handler
    async def report(payload: Report) -> None:
        ran.append(payload.tenant)

    for tenant, count in (("large", 200), ("small", 5)):
        for number in range(count):
            body = {"kind": "report", "fair_key": tenant, "payload": {"tenant": tenant, "number": number}}
            ground.push(json.dumps(body))
    async with app, working(app):
        await eventually(lambda: len(ran) == 205, timeout=20)
    assert nothing_left(raw)


async def test_order_stands_before_fairness(raw, ground):
    ran: dict[str, list[int]] = {}
    running: Counter[str] = Counter()
    overlaps = 0
    app = App(settings=settings(raw, ground, concurrency=10))

    @app.handler
    async def both(payload: Both) -> None:
        nonlocal overlaps
        running[payload.account] += 1
        overlaps += running[payload.account] > 1
        await anyio.sleep(0.001)
        running[payload.account] -= 1
        ran.setdefault(payload.account, []).append(payload.number)

    async with app, working(app, workers=2):
        jobs = [Both(f"t{account % 3}", f"a{account}", number) for number in range(10) for account in range(7)]
        await app.enqueue_many(jobs)
        await eventually(lambda: sum(map(len, ran.values())) == 70, timeout=20)
    assert overlaps == 0 and all(numbers == list(range(10)) for numbers in ran.values())
    assert nothing_left(raw)
