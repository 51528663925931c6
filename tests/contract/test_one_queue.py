"""One queue's trouble is its own: what its producers can spoil keeps no job of another queue from running."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from streamworker import App, Payload, QueueWorker
from streamworker.settings.rules import QueueSpec
from streamworker.telemetry import logs
from streamworker.worker import fetcher
from tests.conftest import eventually
from tests.contract.helpers import settings, working

LAST = "18446744073709551615-18446744073709551615"
BOTH = (QueueSpec("spoilt", None), QueueSpec("b", None))


class Limited(Payload, kind="limited", queue="spoilt"):
    n: int


class Other(Payload, kind="other", queue="b"):
    n: int


def spoil(raw: Any, how: str) -> None:
    match how:
        case "dead letters of a wrong type":
            raw.set("stream:{spoilt}:dead", "x")
        case "dead letters behind the last id":
            raw.xadd("stream:{spoilt}:dead", {"job": "{}"}, id=LAST)
        case "calls of a wrong type":
            raw.set("stream:{spoilt}:limit:calls", "x")
        case "turns of a wrong type":
            raw.set("stream:{spoilt}:limit:turns:limited", "x")
        case "cancelled jobs of a wrong type":
            raw.set("stream:{spoilt}:cancelled", "x")
            raw.hset("stream:{spoilt}:meta", "cancelled", "1")
        case "delayed jobs of a wrong type":
            raw.set("stream:{spoilt}:due", "x")


def made(raw: Any, ground: Any, ran: list[int]) -> QueueWorker:
    app = App(settings=settings(raw, ground, concurrency=10, queues=BOTH, grace=2))

    @app.handler(concurrency=3)
    async def limited(payload: Limited) -> None:
        if payload.n < 0:
            raise ValueError("to be parked")

    @app.handler
    async def other(payload: Other) -> None:
        ran.append(payload.n)

    return QueueWorker(app, redis=None, database=None, services=None)


@pytest.mark.parametrize(
    ("how", "body"),
    [
        ("dead letters of a wrong type", "no json"),
        ("dead letters behind the last id", "no json"),
        ("calls of a wrong type", json.dumps({"kind": "limited", "payload": {"n": 1}})),
        ("turns of a wrong type", json.dumps({"kind": "limited", "payload": {"n": 1}})),
        ("cancelled jobs of a wrong type", json.dumps({"kind": "limited", "payload": {"n": 1}})),
        ("delayed jobs of a wrong type", json.dumps({"kind": "limited", "payload": {"n": -1}})),
    ],
)
async def test_a_queue_that_was_spoilt_stops_no_other_and_no_shutdown(raw, ground, monkeypatch, how, body):
    monkeypatch.setattr(fetcher, "UNSETTLED", 20)
    monkeypatch.setattr("streamworker.worker.HAND_BACK", 0.5)
    ran: list[int] = []
    worker = made(raw, ground, ran)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.start)
        await eventually(lambda: hasattr(worker, "_lease"))
        spoil(raw, how)
        for _ in range(100):
            ground.push(body, queue="spoilt")
        await eventually(lambda: len(worker._in_flight) >= 5 or not ground.ready(queue="spoilt"))
        for n in range(20):
            ground.push(json.dumps({"kind": "other", "payload": {"n": n}}), queue="b")
        await eventually(lambda: sorted(ran) == list(range(20)), 15)
        assert not raw.exists("stream:{b}:dead")
        await worker.stop()  # hands back what it could not settle: a failure to do so would raise
    assert ground.held("spoilt") == 0


async def test_suspects_that_cannot_be_settled_keep_no_other_queue_waiting(raw, ground, monkeypatch, broker_factory):
    """Each is run, refused and held: a worker that drained for the next one would claim nothing for a lease."""
    monkeypatch.setattr("streamworker.broker.claim.TURN", 60.0)
    async with broker_factory("dead", queues=("spoilt",), lease=60) as gone:
        for _ in range(100):
            ground.push("no json", queue="spoilt")
        for claim in await gone.claim(100, 0, ()):
            ground.ripen(claim, count=4)
    ground.forget_pace("spoilt")
    spoil(raw, "dead letters of a wrong type")
    ran: list[int] = []
    async with working(app := made(raw, ground, ran)._app):
        await eventually(lambda: ground.held("spoilt") > 0)
        for n in range(20):
            ground.push(json.dumps({"kind": "other", "payload": {"n": n}}), queue="b")
            await eventually(lambda count=n + 1: len(ran) == count, 15)
    assert app is not None


async def test_what_is_refused_is_named_by_its_error_once_and_settled_when_it_can_be(raw, ground, capsys, monkeypatch):
    monkeypatch.setattr("streamworker.worker.settler.REFUSED_PAUSE", 0.2)
    logs.configure("info", "json")
    ran: list[int] = []
    worker = made(raw, ground, ran)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.start)
        await eventually(lambda: hasattr(worker, "_lease"))
        spoil(raw, "dead letters of a wrong type")
        for _ in range(30):
            ground.push("no json", queue="spoilt")
        await eventually(lambda: worker._pipeline.settler.refused == {"spoilt": 30})
        raw.delete("stream:{spoilt}:dead")
        await eventually(lambda: raw.xlen("stream:{spoilt}:dead") == 30, 40)
        assert worker._pipeline.settler.refused == {}
        await worker.stop()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    (said,) = [line for line in lines if line["event"] == "settle_refused"]
    assert said["queue"] == "spoilt" and "WRONGTYPE" in said["error"] and "wrong type" in said["hint"]


async def test_a_queue_that_is_shut_opens_with_the_next_settlement(raw, ground, monkeypatch):
    """With a ledger a fast worker has more endings than PostgreSQL takes: it waits for those, and for no second."""
    monkeypatch.setattr(fetcher, "UNSETTLED", -4)  # with the four slots: shut while one ending is not settled
    monkeypatch.setattr("streamworker.broker.claim.IDLE", 60.0)
    monkeypatch.setattr(fetcher, "BLOCK", 60.0)
    ran: list[int] = []
    app = App(settings=settings(raw, ground, concurrency=4))

    @app.handler
    async def other(payload: Other) -> None:
        ran.append(payload.n)

    async with app:
        await app.enqueue_many([Other(n=n) for n in range(200)])
        async with working(app):
            await eventually(lambda: len(ran) == 200)
