"""How many jobs per second does one worker process run, as a share of the loop without any safety?"""

from __future__ import annotations

import asyncio

import redis.asyncio as redis

from benchmarks import measure, reference
from benchmarks.measure import Options, Row
from benchmarks.worker import Bench, settings

SLOTS = 100


async def compared(url: str, options: Options, jobs: int, pause: float) -> dict[str, list[float]]:
    """Both loops over the same number of jobs."""
    client = redis.Redis.from_url(url)

    async def handler(_: reference.Payload) -> None:
        if pause:
            await asyncio.sleep(pause)

    async def bare() -> float:
        await client.flushall()
        return await reference.consume(url, jobs, slots=SLOTS, handler=handler)

    async def worker() -> float:
        await client.flushall()
        return await Bench(settings(url, concurrency=SLOTS), pause).throughput(jobs)

    try:
        return await measure.take_turns(options.rounds, {"bare loop": bare, "worker": worker})
    finally:
        await client.aclose()


async def ask(url: str, options: Options) -> list[Row]:
    """No-op jobs, and jobs that await 10 ms, where the ideal is 10,000 a second."""
    noop = await compared(url, options, options.jobs(200_000), 0)
    waits = await compared(url, options, options.jobs(40_000), 0.01)
    return [
        *measure.rows_of("no-op jobs", "/s", noop, "bare loop", worker=0.9),
        Row(question="jobs of 10 ms", what="bare loop", unit="/s", values=waits["bare loop"]),
        Row(question="jobs of 10 ms", what="worker", unit="/s", values=waits["worker"], goal=9600),
    ]


if __name__ == "__main__":
    measure.main(ask, __doc__)
