"""The loop everything is compared with: the strongest that we can write with redis-py, without any safety.

Reading, running and acknowledging overlap, over two connections: the next batch is on its way while one runs, and what
has ended is acknowledged together while the next runs. Handlers run in a fixed pool of tasks, fed by a deque.
No fence, no lease, no retry, no deletion, one level, no task of a job's own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
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
    """Seconds for ``jobs`` jobs that are on the stream."""
    return await Loop(url, jobs, slots, handler).run()


class Loop:
    """The loop.

    Args:
        url: of Redis.
        jobs: after so many it ends.
        slots: jobs that run at once.
        handler: called with each payload.
    """

    def __init__(self, url: str, jobs: int, slots: int, handler: Callable[[Payload], Awaitable[None]]) -> None:
        self._reading, self._acknowledging = (redis.Redis.from_url(url, protocol=2) for _ in range(2))
        self._jobs, self._slots, self._handler = jobs, slots, handler
        self._ready: deque[tuple[bytes, bytes]] = deque()
        self._ended: list[bytes] = []
        self._arrived, self._taken, self._finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self) -> float:
        """Seconds from the first read to the last acknowledgement."""
        pool = [asyncio.create_task(self._slot()) for _ in range(self._slots)]
        begin = time.perf_counter()
        reader = asyncio.create_task(self._read())
        await self._acknowledge()
        seconds = time.perf_counter() - begin
        await reader
        for task in pool:
            task.cancel()
        await self._reading.aclose()
        await self._acknowledging.aclose()
        return seconds

    async def _read(self) -> None:
        """Read ahead: a batch is on its way while another one waits."""
        left = self._jobs
        while left > 0:
            reply = await self._reading.xreadgroup(GROUP, "me", {STREAM: ">"}, count=self._slots)
            for entry, fields in reply[0][1]:
                self._ready.append((entry, fields[b"job"]))
            left -= len(reply[0][1])
            self._arrived.set()
            while len(self._ready) > self._slots:
                self._taken.clear()
                await self._taken.wait()

    async def _slot(self) -> None:
        envelope, payload = msgspec.json.Decoder(Envelope).decode, msgspec.json.Decoder(Payload).decode
        ready, ended, handler = self._ready, self._ended.append, self._handler
        while True:
            while ready:
                entry, body = ready.popleft()
                await handler(payload(envelope(body).payload))
                ended(entry)
                self._finished.set()
            self._taken.set()
            self._arrived.clear()
            await self._arrived.wait()

    async def _acknowledge(self) -> None:
        done = 0
        while done < self._jobs:
            await self._finished.wait()
            self._finished.clear()
            batch = self._ended[:]
            self._ended.clear()
            await self._acknowledging.xack(STREAM, GROUP, *batch)
            done += len(batch)
