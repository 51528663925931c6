"""What our connections promise beyond redis-py's: whoever is told to end ends."""

from __future__ import annotations

import asyncio

import pytest

from streamworker.broker.client import Address


@pytest.mark.anyio
@pytest.mark.parametrize("steps", range(12))
async def test_a_cancelled_task_ends_wherever_its_command_is(redis_url, steps):
    client = Address(redis_url).commands()

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
