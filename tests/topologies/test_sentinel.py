"""The master that Sentinels know: found, lost, found again."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import redis
import redis.asyncio as aioredis

from streamworker import App, Settings
from streamworker.bridge import BridgeLoop
from streamworker.broker.redis.client import RedisAddress
from streamworker.errors import ConfigurationError, Unreachable
from tests.conftest import eventually
from tests.contract.ground import GROUNDS, GROUP
from tests.contract.helpers import job, names
from tests.contract.test_standby import renew
from tests.topologies.conftest import Count, Producer, working

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_master_dies_under_a_running_worker(sentinels, mode):
    old, ground = sentinels.master, GROUNDS[mode]
    async with working(sentinels.url, mode=mode) as ran:
        with Producer(sentinels.client, [ground(None).keys()]) as producer:
            await eventually(lambda: sum(ran.values()) > 100)
            old.kill()
            await eventually(lambda: sentinels.master is not old, 20)
            producer.replicas = 0  # there is none left
            before = len(producer.acknowledged)
            await eventually(lambda: len(producer.acknowledged) > before + 100, 30)
        await eventually(lambda: set(producer.acknowledged) <= ran.keys(), 20)
        assert sentinels.master is not old
        with sentinels.client() as client:
            await eventually(ground(client).empty)
            assert ground(client).held() == 0
    with sentinels.client() as client:
        assert ground(client).names() == []


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_demoted_master_is_left_for_the_new_one(sentinels, mode):
    """The old master lives on as a replica: connections to it must not be kept."""
    old = sentinels.master
    async with working(sentinels.url, mode=mode) as ran:
        with Producer(sentinels.client, [GROUNDS[mode](None).keys()]) as producer:
            await eventually(lambda: sum(ran.values()) > 50)
            await eventually(sentinels.demote)
            await eventually(lambda: sentinels.master is not old, 20)
            before = len(producer.acknowledged)
            await eventually(lambda: len(producer.acknowledged) > before + 50, 30)
        await eventually(lambda: set(producer.acknowledged) <= ran.keys(), 20)


@pytest.mark.parametrize("how", ["killed", "demoted"])
async def test_a_bridge_follows_the_master(sentinels, how):
    old = sentinels.master
    bridging = None
    acknowledged: list[bytes] = []

    def produce() -> None:
        while len(acknowledged) < 600:
            name = b"%d" % len(acknowledged)
            with suppress(redis.RedisError, OSError, StopIteration), sentinels.client() as client:
                alone = how == "killed" and sentinels.master is not old
                with client.pipeline(transaction=False) as pipe:
                    pipe.lpush("queue:q", name)
                    pipe.wait(0 if alone else 1, 1000)
                    _, replicas = pipe.execute()
                if alone or replicas:
                    acknowledged.append(name)

    async with App[Any](settings=Settings(redis_url=sentinels.url)).bridge(["q"]) as mover:
        bridging = BridgeLoop(mover)
        running = asyncio.create_task(bridging.run())
        producing = asyncio.create_task(asyncio.to_thread(produce))
        await eventually(lambda: bridging.totals.jobs > 100)
        if how == "killed":
            old.kill()
        else:
            await eventually(sentinels.demote)
        await eventually(lambda: sentinels.master is not old, 20)
        await producing
        with sentinels.client() as client:
            await eventually(lambda: not client.exists("queue:q"), 60)
            there = {fields[b"job"] for _, fields in client.xrange("stream:{q}")}
        bridging.stop()
        await running
    # Replication is asynchronous: what the old master moved and had not passed on lies in the new one's list again.
    assert set(acknowledged) <= there


async def test_what_a_replica_refuses_is_sent_to_the_master(sentinels, broker_of):
    """READONLY without a closed connection: whoever is told so looks the master up again."""
    async with broker_of(sentinels.url) as broker:
        await broker.publish([job("first"), job("before")])
        held = await broker.claim(1, 0, ())
        assert names(held) == ["first"]
        old = sentinels.master
        (replica,) = (node for node in sentinels.nodes if node is not old)
        for sentinel in sentinels.sentinels:  # nobody but us changes roles here
            sentinel.kill()
        with old.client() as one, replica.client() as two:
            await eventually(lambda: two.xpending("stream:{q}", GROUP)["pending"] == 1)
            two.replicaof("NO", "ONE")
            one.replicaof("127.0.0.1", replica.port)
            broker._session.address._kwargs["sentinels"].master = _found(replica.port)
            with pytest.raises(Unreachable, match="not the master any more"):
                await broker.publish([job("refused")])
            await broker.publish([job("after")])
            with pytest.raises(Unreachable):
                await broker.claim(10, 0, held)
            assert names(await broker.claim(10, 0, held)) == ["before", "after"]


def _found(port: int):
    async def master():
        return ("127.0.0.1", port)

    return master


async def test_a_users_own_sentinel_client_is_understood(sentinels, broker_of):
    hosts = [("127.0.0.1", node.port) for node in sentinels.sentinels]
    manager = aioredis.Sentinel(hosts)
    client = manager.master_for("mymaster", db=0)
    address = RedisAddress.of(client)
    assert str(address) == sentinels.url
    async with broker_of(address) as broker:
        await broker.publish([job("x")])
        assert names(await broker.claim(1, 0, ())) == ["x"]
    await client.aclose()
    for each in manager.sentinels:
        await each.aclose()


async def test_an_unknown_master_and_what_is_no_sentinel_are_said_in_one_sentence(sentinels, broker_of):
    with pytest.raises(ConfigurationError, match="know no master named 'other'"):
        async with broker_of(sentinels.url.replace("mymaster", "other")):
            pass
    with pytest.raises(ConfigurationError, match="is no Sentinel"):
        async with broker_of(f"redis+sentinel://127.0.0.1:{sentinels.nodes[0].port}/mymaster"):
            pass
    with pytest.raises(Unreachable, match="no Sentinel answers"):
        async with broker_of("redis+sentinel://:secret@127.0.0.1:1,127.0.0.1:2/mymaster") as broker:
            await broker.publish([job("x")])


async def test_the_first_sentinel_is_down(sentinels, broker_of):
    sentinels.sentinels[0].kill()
    async with broker_of(sentinels.url) as broker:
        await broker.publish([job("x")])
        assert names(await broker.claim(1, 0, ())) == ["x"]
        await broker.beat({"pid": 1})


async def test_handlers_get_a_client_to_the_master(sentinels):
    from streamworker import App, Context, QueueWorker, Settings

    app = App(settings=Settings(redis_url=sentinels.url))

    @app.handler
    async def count(payload: Count, ctx: Context) -> None:
        await ctx.redis.set("queue:seen", payload.name)

    async with app:
        await app.enqueue(Count(name="x"))
    await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
    with sentinels.client() as client:
        assert client.get("queue:seen") == b"x"


async def test_sentinels_with_a_login_of_their_own(sentinels, broker_of):
    """The one right that docs/security.md names is enough."""
    for node in sentinels.sentinels:
        with node.client() as client:
            rights = ("-@all", "+sentinel|get-master-addr-by-name")
            client.execute_command("ACL SETUSER", "finder", "on", ">SECRET", "resetkeys", "resetchannels", *rights)
    hosts = sentinels.url.removeprefix("redis+sentinel://")
    async with broker_of(f"redis+sentinel://{hosts}?sentinel_username=finder&sentinel_password=SECRET") as broker:
        await broker.publish([job("x")])
        assert names(await broker.claim(1, 0, ())) == ["x"]
        await broker.beat({"pid": 1})
    with pytest.raises(ConfigurationError, match="refused the login") as caught:
        async with broker_of(f"redis+sentinel://{hosts}?sentinel_username=finder&sentinel_password=WRONG"):
            pass
    assert "WRONG" not in str(caught.value)


async def test_the_renewing_process_asks_the_sentinels(sentinels, broker_of):
    async with broker_of(sentinels.url) as broker:
        await broker.publish([job("x")])
        (claim,) = await broker.claim(1, 0, ())
        with sentinels.client() as client:
            ground = GROUNDS["stream"](client)
            ground.ripen(claim, 10_000)
            await asyncio.to_thread(renew, broker)
            assert ground.idle(claim) < 5000
