"""How fast are jobs enqueued, one by one and in bulk, beside a bare XADD?"""

from __future__ import annotations

import time

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Noop, settings
from streamworker import App

BODY = (
    b'{"id":"01996b2f-0000-7000-8000-000000000000","queue_name":"bench","kind":"noop","priority":100,"payload":{"n":1}}'
)


async def ask(url: str, options: Options) -> list[Row]:
    """One awaited command a job; then a thousand jobs a call."""
    client = redis.Redis.from_url(url, protocol=2)
    single, bulk = options.jobs(20_000), options.jobs(200_000)

    async def bare() -> float:
        await client.flushall()
        begin = time.perf_counter()
        for _ in range(single):
            await client.execute_command("XADD", "bare", "*", "job", BODY)
        return single / (time.perf_counter() - begin)

    async def pipeline() -> float:
        await client.flushall()
        begin = time.perf_counter()
        for _ in range(0, bulk, 1000):
            pipe = client.pipeline(transaction=False)
            for _ in range(1000):
                pipe.execute_command("XADD", "bare", "*", "job", BODY)
            await pipe.execute()
        return bulk / (time.perf_counter() - begin)

    async def ours() -> float:
        await client.flushall()
        async with App(settings=settings(url)) as app:
            begin = time.perf_counter()
            for n in range(single):
                await app.enqueue(Noop(n=n))
            return single / (time.perf_counter() - begin)

    async def ours_in_bulk() -> float:
        await client.flushall()
        async with App(settings=settings(url)) as app:
            begin = time.perf_counter()
            for start in range(0, bulk, 1000):
                await app.enqueue_many([Noop(n=n) for n in range(start, start + 1000)])
            return bulk / (time.perf_counter() - begin)

    one = await measure.take_turns(options.rounds, {"bare XADD": bare, "enqueue": ours})
    many = await measure.take_turns(options.rounds, {"pipeline of XADD": pipeline, "enqueue_many": ours_in_bulk})
    await client.aclose()
    return [
        *measure.rows_of("enqueue one by one", "/s", one, "bare XADD", enqueue=0.9),
        *measure.rows_of("enqueue in bulk", "/s", many, "pipeline of XADD", enqueue_many=3.0),
    ]


if __name__ == "__main__":
    measure.main(ask, __doc__)
