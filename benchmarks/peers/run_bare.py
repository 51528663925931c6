"""The loop without any safety (`benchmarks.reference`), in this workload."""

from __future__ import annotations

import asyncio

import msgspec
import redis.asyncio as redis
import uvloop
from workload import CONCURRENCY, Workload

STREAM, GROUP = "bare", "workers"
work = Workload()


class Envelope(msgspec.Struct):
    """What is decoded of a job."""

    payload: msgspec.Raw


class Payload(msgspec.Struct):
    """One number."""

    n: int


async def main() -> None:
    """One reader, a fixed pool of tasks, one XREADGROUP and one XACK a batch."""
    client, producer = (redis.Redis.from_url(work.url, protocol=2) for _ in range(2))
    await client.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    for start in range(0, work.filled, 1000):
        pipe = client.pipeline(transaction=False)
        for n in range(start, min(start + 1000, work.filled)):
            pipe.xadd(STREAM, {"job": b'{"payload":{"n":%d}}' % n})
        await pipe.execute()
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    running, idle = 0, asyncio.Event()
    envelope, payload = msgspec.json.Decoder(Envelope).decode, msgspec.json.Decoder(Payload).decode

    async def slot() -> None:
        nonlocal running
        while True:
            body = await queue.get()
            await work.run(payload(envelope(body).payload).n)
            running -= 1
            if running == 0:
                idle.set()

    async def send(n: int) -> None:
        await producer.execute_command("XADD", STREAM, "*", "job", b'{"payload":{"n":%d}}' % n)

    tasks = {asyncio.create_task(slot()) for _ in range(CONCURRENCY)}
    if work.paced:
        tasks.add(asyncio.create_task(work.produce(send)))
    while True:
        reply = await client.xreadgroup(GROUP, "me", {STREAM: ">"}, count=CONCURRENCY, block=5000)
        if not reply:
            continue
        entries = reply[0][1]
        idle.clear()
        running = len(entries)
        for _, fields in entries:
            queue.put_nowait(fields[b"job"])
        await idle.wait()
        await client.xack(STREAM, GROUP, *[entry for entry, _ in entries])


uvloop.run(main())
