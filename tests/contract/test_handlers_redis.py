"""``ctx.redis``: as many connections as jobs, commands that block on purpose, and what the URL says of it."""

from __future__ import annotations

import asyncio

import pytest
import redis.asyncio as aioredis
from redis.exceptions import TimeoutError as RedisTimeout

from streamworker import App, Context, Payload, QueueWorker, Settings
from streamworker.broker.redis import client as clients
from streamworker.broker.redis.client import RedisAddress
from streamworker.errors import NoConnection
from tests.conftest import TOPOLOGY, eventually

pytestmark = pytest.mark.skipif(
    bool(TOPOLOGY), reason="of a cluster it is redis-py's own client; behind Sentinel, the same"
)


class Wait(Payload, kind="wait", queue="q"):
    seconds: float = 0


class Hold(Payload, kind="hold", queue="q"):
    pass


async def test_commands_may_block_longer_than_others_may_take(redis_url, monkeypatch):
    monkeypatch.setattr(clients, "COMMAND_TIMEOUT", 0.15)
    async with RedisAddress(redis_url).for_handlers(4) as client:
        for command in (client.blpop(["queue:none"], timeout=0.5), client.xread({"queue:none:stream": "$"}, block=500)):
            began = asyncio.get_running_loop().time()
            assert not await command
            assert asyncio.get_running_loop().time() - began > 0.45
        with pytest.raises(RedisTimeout):
            await client.execute_command("CLIENT", "PAUSE", 400, "ALL")
            await client.get("queue:x")
        await asyncio.sleep(0.4)


@pytest.mark.mode_free
async def test_a_job_each_may_block_at_once(ground, redis_url, raw):
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, concurrency=40, lease=2, ledger="off"))
    ended: list[str] = []

    @app.handler(max_attempts=1)
    async def wait(payload: Wait, ctx: Context) -> None:
        if payload.seconds:
            await ctx.redis.blpop(["queue:trace:replies"], timeout=payload.seconds)
        else:
            await ctx.redis.get("queue:trace:x")
        ended.append("blpop" if payload.seconds else "get")

    async with app:
        await app.enqueue_many([Wait(seconds=30) for _ in range(39)])
        worker = QueueWorker(app, redis=None, database=None, services=None)
        life = asyncio.create_task(worker.start())
        await eventually(lambda: len([c for c in raw.client_list() if c["cmd"] == "blpop"]) == 39)
        await app.enqueue(Wait())
        await eventually(lambda: ended == ["get"])
        raw.rpush("queue:trace:replies", *range(39))
        await eventually(lambda: len(ended) == 40)
        await worker.stop()
        await life
    raw.delete("queue:trace:replies")


async def test_options_of_the_url_are_heard(redis_url):
    async with RedisAddress(f"{redis_url}?socket_timeout=0.2&decode_responses=true&client_name=mine").for_handlers(
        4
    ) as client:
        with pytest.raises(RedisTimeout):
            await client.blpop(["queue:none"], timeout=1)
        assert await client.client_getname() == "mine"
    async with RedisAddress(f"{redis_url}?max_connections=2&timeout=0.2").for_handlers(40) as client:
        holders = [asyncio.create_task(client.blpop(["queue:none"], timeout=3)) for _ in range(2)]
        await eventually(lambda: not client.connection_pool.can_get_connection())
        with pytest.raises(
            NoConnection,
            match=r"waited [0-9.]+ s for a connection of ctx.redis \(2 connections, all taken\): raise max_c",
        ):
            await client.get("queue:x")
        for each in holders:
            each.cancel()
        await asyncio.gather(*holders, return_exceptions=True)


@pytest.mark.mode_free
async def test_a_job_that_times_out_while_it_waits_says_so(ground, redis_url, raw):
    settings = Settings(redis_url=f"{redis_url}?max_connections=1", mode=ground.mode, lease=2, ledger="off")
    app = App(settings=settings)

    @app.handler(max_attempts=1, timeout=0.5)
    async def wait(payload: Wait, ctx: Context) -> None:
        await ctx.redis.get("queue:x")

    @app.handler(max_attempts=1, timeout=30)
    async def hold(payload: Hold, ctx: Context) -> None:
        await ctx.redis.blpop(["queue:trace:replies"], timeout=30)

    async with app:
        worker = QueueWorker(app, redis=None, database=None, services=None)
        life = asyncio.create_task(worker.start())
        await app.enqueue(Hold())
        await eventually(lambda: [client for client in raw.client_list() if client["cmd"] == "blpop"])
        await app.enqueue(Wait())
        await eventually(lambda: raw.xlen("stream:{q}:dead") == 1)
        raw.rpush("queue:trace:replies", "go")
        await worker.stop()
        await life
    ((_, fields),) = raw.xrange("stream:{q}:dead")
    error = fields[b"error"].decode()
    assert error.startswith("timed out after 0.5 s: waited ")
    assert error.endswith("for a connection of ctx.redis (1 connections, all taken)")


def test_a_clusters_client_hears_them_too():
    client = RedisAddress("redis+cluster://h:1?socket_timeout=3&max_connections=7").for_handlers(40)
    assert isinstance(client, aioredis.RedisCluster)
    assert client.connection_kwargs["socket_timeout"] == 3
    assert RedisAddress("redis+cluster://h:1").for_handlers(40).connection_kwargs["socket_timeout"] is None
