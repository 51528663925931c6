"""What our connections promise beyond redis-py's: whoever is told to end ends."""

from __future__ import annotations

import asyncio

import pytest

from streamworker.broker.lists import WakeLists
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.session import Session
from tests.conftest import CLUSTER


@pytest.mark.parametrize("steps", range(12))
async def test_a_cancelled_task_ends_wherever_its_command_is(redis_url, steps):
    client = RedisAddress(redis_url).commands()

    async def endless() -> None:
        while True:
            await client.exists("some-key")

    await client.exists("some-key")
    task = asyncio.create_task(endless())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=10)
    task.cancel()
    await client.aclose()
    assert done
    assert task.cancelled()


@pytest.mark.skipif(CLUSTER, reason="of list mode, which refuses a cluster")
async def test_a_wait_that_has_not_begun_can_be_ended(redis_url):
    session = Session(RedisAddress(redis_url))
    lists = WakeLists(session, 1)
    waiting = asyncio.create_task(lists.wait(["queue:q"], 0.2))
    await asyncio.sleep(0)  # the blocking read is due, and its task has not had its turn
    await lists.unblock()
    assert not await waiting
    await lists.close()
    await session.close()
