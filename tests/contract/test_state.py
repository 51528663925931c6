"""What workers remember of a job between its entries: beside the user's headers, and believed only where a worker wrote it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import anyio
import pytest

from streamworker import App, Context, Payload, codec
from streamworker.codec import GRACE, State, sealed
from streamworker.errors import UsageError
from tests.conftest import eventually
from tests.contract.helpers import DEAD, META, list_only, recover, settings, working

ID = "0198c0de-1234-7abc-8def-0123456789ab"
FORGED = {
    "streamworker-deliveries": "99",
    "streamworker-turn": "1 0123abcd",
    "streamworker-unknown-since": "1",
}


class Page(Payload, kind="page", queue="q"):
    site: str
    number: int = 1


async def test_a_child_with_its_parents_headers_waits_its_own_turn(ground, raw):
    order: list[str] = []
    seen: list[Any] = []
    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=1)
    async def page(payload: Page, ctx: Context) -> None:
        order.append(f"{payload.site}{payload.number}")
        seen.append(ctx.job.headers)
        if payload.number < 3:
            child = Page(site=payload.site, number=payload.number + 1)
            await app.enqueue(child, headers=ctx.job.headers)
        await asyncio.sleep(0.02)

    async with app:
        for site in "ABC":
            await app.enqueue(Page(site=site), headers={"tenant": "t"})
        async with working(app):
            await eventually(lambda: len(order) == 9, 20)
    assert order[:3] == ["A1", "B1", "C1"]
    assert sorted(order[3:6]) == ["A2", "B2", "C2"]
    assert seen == [{"tenant": "t"}] * 9


def forgeries() -> list[dict[str, Any]]:
    """What a producer can write who knows everything but the queue's secret."""
    true = {"id": "hop", "hop": 1}
    made_up = sealed(State(99, "1 0123abcd", 1), "state", b"5ec2e7 0")
    return [
        {"headers": FORGED},
        {"headers": FORGED, **true},
        {"streamworker_state": made_up, "id": "state", "hop": 7},
        {"streamworker_state": {"deliveries": 99}, **true},
        {"streamworker": {"id": ID, "deliveries": 99}, "hop": 1},
        {"streamworker": {"id": ID, "deliveries": 99, "seal": made_up["seal"]}},
    ]


async def test_what_a_producer_writes_of_a_job_is_not_believed(ground, raw):
    deliveries: list[int] = []
    headers: list[Any] = []
    app = App(settings=settings(raw, ground))

    @app.handler
    async def page(payload: Page, ctx: Context) -> None:
        deliveries.append(ctx.delivery)
        headers.append(ctx.job.headers)

    for number, forged in enumerate(forgeries()):
        body = {**forged, "kind": "page", "payload": {"site": "x", "number": number}}
        ground.push(json.dumps(body, separators=(",", ":")))  # the mark in front, as a worker of lists writes it
    async with working(app):
        await eventually(lambda: ground.empty() and len(deliveries) == len(forgeries()))
    assert deliveries == [1] * len(forgeries())
    assert headers == [None] * len(forgeries())
    assert raw.xlen(DEAD) == 0


async def test_a_forged_turn_overtakes_nothing(ground, raw):
    order: list[str] = []
    gate = anyio.Event()
    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=1)
    async def page(payload: Page) -> None:
        order.append(payload.site)
        await gate.wait()

    async with app, working(app):
        for site in "abc":
            await app.enqueue(Page(site=site))
        await eventually(lambda: order == ["a"] and raw.zcard("stream:{q}:due") == 2)
        for n, state in enumerate(({"headers": FORGED}, {"streamworker_state": {"turn": "1 0123abcd", "seal": "0"}})):
            forged = {"id": f"forged-{n}", "hop": 1, "kind": "page", "payload": {"site": "x"}, **state}
            ground.push(json.dumps(forged))
        await eventually(lambda: raw.zcard("stream:{q}:due") == 4)
        gate.set()
        await eventually(lambda: len(order) == 5)
    assert order == ["a", "b", "c", "x", "x"]


async def test_deaths_are_counted_across_a_hand_back(broker_factory, ground, raw):
    ground.push(json.dumps({"kind": "page", "payload": {"site": "x"}, "headers": {"tenant": "t"}}))
    async with broker_factory("dying") as dying:
        for _ in range(2):
            (claim,) = await recover(dying, ground)
            ground.ripen(claim)
    started, seen = anyio.Event(), []
    # A short lease: a worker on a server that has just started waits one before it takes what the dying left.
    app = App(settings=settings(raw, ground, grace=0.0, lease=1.0))

    @app.handler
    async def page(payload: Page, ctx: Context) -> None:
        seen.append((ctx.delivery, ctx.job.headers))
        started.set()
        await anyio.sleep(60 if len(seen) < 2 else 0)

    async with working(app):
        await started.wait()
    (body,) = ground.waiting()
    assert json.loads(body)["headers"] == {"tenant": "t"}
    assert codec.state_of(codec.read(body), raw.hget(META, "secret")).deliveries == 2
    async with working(app):
        await eventually(ground.empty)
    assert seen == [(3, {"tenant": "t"})] * 2


@pytest.mark.parametrize(("age", "delivery"), [(60, 3), (GRACE + 60, 1)])
async def test_documents_of_earlier_versions_in_flight(ground, raw, age, delivery):
    """The queue's secret tells since when workers with seals know it, and that others had worked there before."""
    seen: list[Any] = []
    app = App(settings=settings(raw, ground))

    @app.handler
    async def page(payload: Page, ctx: Context) -> None:
        seen.append((ctx.delivery, ctx.job.headers))

    raw.hset(META, mapping={"epoch": "old", "secret": f"5ec2e7 {1000 * (time.time() - age):.0f}"})
    old = {"id": "i", "hop": 1, "kind": "page", "payload": {"site": "x"}}
    ground.push(json.dumps({**old, "headers": {"streamworker-deliveries": "2", "tenant": "t"}}))
    async with working(app):
        await eventually(ground.empty)
    assert seen == [(delivery, {"tenant": "t"})]


@pytest.mark.parametrize("before", [True, False])
async def test_the_first_worker_with_seals_notes_whether_others_were_before(broker_factory, ground, raw, before):
    if before:
        raw.hset(META, "epoch", "old")
    async with broker_factory("first"):
        made = raw.hget(META, "secret")
        digits, _, born = made.partition(b" ")
        assert len(digits) == 32
        assert abs(int(born) / 1000 - (time.time() if before else 0)) < 60
    async with broker_factory("second"):
        assert raw.hget(META, "secret") == made


async def test_a_deleted_meta_key_takes_the_counts_along_and_not_the_job(broker_factory, ground, raw):
    async with broker_factory("w") as broker:
        first = raw.hget(META, "secret")
        state = sealed(State(4), "i", first)
        ground.push(json.dumps({"id": "i", "payload": {}, "streamworker_state": state}))
        raw.delete(META)
        (claim,) = await recover(broker, ground)
        assert codec.job_id(codec.read(claim.body), claim) == "i"
        assert codec.state_of(codec.read(claim.body), claim.secret).deliveries == 0
        await broker.claim(1, 0, [claim])
        assert raw.hget(META, "secret") not in (None, first)


@list_only
async def test_what_lists_remember_is_sealed_by_the_script_as_workers_read_it(broker_factory, ground, raw):
    ground.push(b'{"payload":{}}')
    async with broker_factory("dying") as dying, broker_factory("w") as broker:
        for count in (2, 3):
            (claim,) = await dying.claim(1, 0, ())
            assert (claim.count, claim.body) == (count - 1, b'{"payload":{}}')
            ground.ripen(claim)
            ground.sweep_soon(broker)
            await broker.promote()
            (element,) = raw.lrange("queue:q", 0, -1)
            assert codec.state_of(codec.read(element), claim.secret).deliveries == count - 1
            assert element.startswith(b'{"streamworker":{"id":"') and element.endswith(b'},"payload":{}}')


@pytest.mark.parametrize("name", sorted(FORGED))
def test_names_of_ours_are_refused_among_headers(name):
    app = App()
    with pytest.raises(UsageError, match=f"the header '{name}' .* rename it"):
        app.job(Page(site="x"), headers={"tenant": "t", name: "1"})
