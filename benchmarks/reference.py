"""The loop everything is compared with: a pool of tasks fed by an asyncio queue, one XREADGROUP and one XACK a batch.

No fence, no lease, no retry, no deletion: nothing can be faster and still be written in Python."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import redis.asyncio as redis

STREAM, GROUP = "reference", "workers"


class Envelope(msgspec.Struct):
    """What the loop decodes of a job: the least there is."""

    payload: msgspec.Raw


class Payload(msgspec.Struct):
    """A payload of one number."""

    n: int


async def fill(client: redis.Redis, jobs: int) -> None:
    """Put ``jobs`` jobs on the stream."""
    await client.delete(STREAM)
    await client.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    for start in range(0, jobs, 1000):
        pipe = client.pipeline(transaction=False)
        for n in range(start, min(start + 1000, jobs)):
            pipe.xadd(STREAM, {"job": b'{"payload":{"n":%d}}' % n})
        await pipe.execute()


async def consume(url: str, jobs: int, *, slots: int, handler: Callable[[Payload], Awaitable[None]]) -> float:
    """Jobs per second over ``jobs`` jobs with ``slots`` tasks, filled in before."""
    client = redis.Redis.from_url(url, protocol=2)
    await fill(client, jobs)
    await client.aclose()
    return jobs / await drain(url, jobs, slots=slots, handler=handler)


async def drain(url: str, jobs: int, *, slots: int, handler: Callable[[Payload], Awaitable[None]]) -> float:
    """Seconds for ``jobs`` jobs that lie on the stream."""
    client = redis.Redis.from_url(url, protocol=2)
    envelope, payload = msgspec.json.Decoder(Envelope).decode, msgspec.json.Decoder(Payload).decode
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    idle = asyncio.Event()
    running = 0

    async def slot() -> None:
        nonlocal running
        while True:
            body = await queue.get()
            await handler(payload(envelope(body).payload))
            running -= 1
            if running == 0:
                idle.set()

    tasks = [asyncio.create_task(slot()) for _ in range(slots)]
    begin = time.perf_counter()
    done = 0
    while done < jobs:
        reply = await client.xreadgroup(GROUP, "me", {STREAM: ">"}, count=slots)
        entries = reply[0][1]
        idle.clear()
        running = len(entries)
        for _, fields in entries:
            queue.put_nowait(fields[b"job"])
        await idle.wait()
        await client.xack(STREAM, GROUP, *[entry for entry, _ in entries])
        done += len(entries)
    seconds = time.perf_counter() - begin
    for task in tasks:
        task.cancel()
    await client.aclose()
    return seconds
