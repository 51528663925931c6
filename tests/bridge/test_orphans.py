"""What dead workers of list mode held: a bridge brings it into the streams, and leaves the living alone."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamworker import codec
from streamworker.bridge import BridgeLoop
from streamworker.broker.claim import Options
from streamworker.broker.lists import ListBroker
from streamworker.broker.redis.client import RedisAddress
from tests.bridge.conftest import push, running, stored
from tests.cli.conftest import Program
from tests.conftest import eventually, eventually_blocking

LEASE = 0.6


@pytest.fixture
def lister(redis_url: str) -> Callable[..., Any]:
    """``async with lister("w") as broker``: a consumer of list mode that renews nothing by itself."""

    @asynccontextmanager
    async def make(name: str, **options: Any) -> AsyncIterator[ListBroker]:
        broker = ListBroker(RedisAddress(redis_url), Options(queues=(("q", None),), **{"lease": LEASE, **options}))
        try:
            await broker.open()
            await broker.join(name)
            yield broker
        finally:
            await broker.close()

    return make


def document(name: str) -> bytes:
    return b'{"payload":{"name":"%s"}}' % name.encode()


def payload_names(bodies: list[bytes]) -> list[str]:
    return [json.loads(body)["payload"]["name"] for body in bodies]


async def test_what_the_dead_held_is_first_in_its_stream_in_order_with_id_and_count(raw, bridge_of, lister):
    push(raw, "queue:q", *[document(name) for name in ("a", "b", "c", "d")])
    push(raw, "queue:q:low", document("low"))
    async with lister("dead") as broker:
        claims = await broker.claim(2, 0, ())
        claims += await broker.claim(1, 0, claims)
        raw.lpop("queue:q:low")  # "low" was not reached
        push(raw, "queue:q:low", document("low"))
    async with bridge_of(lease=LEASE) as bridge, running(bridge):
        await eventually(lambda: raw.exists("stream:{q}:low"))
        assert raw.xlen("stream:{q}") == 1  # held is not moved before its lease is over
        await eventually(lambda: raw.xlen("stream:{q}") == 4)
    there = stored(raw)
    assert payload_names(there) == ["d", "a", "b", "c"]
    readings = [codec.read(body) for body in there]
    assert [codec.id_in(reading) for reading in readings[1:]] == [claim.entry.decode() for claim in claims]
    secret = raw.hget("stream:{q}:meta", "secret")
    assert [codec.state_of(reading, secret).deliveries for reading in readings] == [0, 1, 1, 1]
    assert raw.keys("queue:*") == []
    assert raw.zcard("stream:{q}:leases") == 0


async def test_what_a_living_worker_holds_stays_with_it(raw, bridge_of, lister):
    push(raw, "queue:q", document("a"), document("b"))
    async with lister("alive") as broker, bridge_of(lease=LEASE) as bridge:
        claims = await broker.claim(1, 0, ())
        async with running(bridge):
            for _ in range(12):
                assert await broker.renew(claims) == []
                await asyncio.sleep(LEASE / 6)
        assert payload_names(stored(raw)) == ["b"]
        assert raw.llen("queue:q:claimed:alive") == 1


async def test_a_drain_waits_for_what_workers_hold(raw, bridge_of, lister):
    push(raw, "queue:q", document("a"), document("b"))
    async with lister("dead") as broker, bridge_of(lease=LEASE) as bridge:
        await broker.claim(1, 0, ())
        bridging = BridgeLoop(bridge, drain=True)
        await bridging.run()
    assert sorted(payload_names(stored(raw))) == ["a", "b"]
    assert bridging.totals.jobs == 2


@pytest.mark.parametrize("namespace", ["", "ns:"])
async def test_all_finds_queues_of_which_workers_hold_everything(raw, bridge_of, lister, namespace):
    push(raw, "queue:q", document("a"))
    async with lister("dead", namespace=namespace) as broker:
        assert len(await broker.claim(1, 0, ())) == 1
    assert not raw.exists("queue:q")
    async with bridge_of(None, namespace=namespace, lease=LEASE) as bridge, running(bridge):
        await eventually(lambda: raw.exists(f"{namespace}stream:{{q}}"))
    assert payload_names(stored(raw, f"{namespace}stream:{{q}}")) == ["a"]


def test_a_job_of_a_killed_list_worker_runs_in_stream_mode(sw: Program, raw, tmp_path):
    """The whole fleet has been switched; nobody of list mode is left to give it back."""
    raw.lpush("queue:holds", json.dumps({"payload": {"gate": str(tmp_path / "gate")}}))
    settings = {"STREAMWORKER_QUEUES": "holds", "STREAMWORKER_LEASE": "0.6"}
    old = sw.worker(STREAMWORKER_MODE="list", **settings)
    eventually_blocking(lambda: raw.zcard("stream:{holds}:leases") == 1)
    held = raw.lrange(f"queue:holds:claimed:{old.worker_id}", 0, -1)
    old.kill()
    sw.start("bridge", **settings)
    new = sw.worker(STREAMWORKER_MODE="stream", **settings)
    eventually_blocking(lambda: raw.xlen("stream:{holds}") and raw.xpending("stream:{holds}", "workers")["pending"])
    (pending,) = sw.ok("pending", "--json").rows
    assert held[0].startswith(pending["job_id"].encode())  # the same job
    (tmp_path / "gate").touch()
    eventually_blocking(lambda: not raw.xlen("stream:{holds}"))
    new.signal(signal.SIGTERM)
    assert new.wait() == 0
    assert not raw.keys("queue:*")
