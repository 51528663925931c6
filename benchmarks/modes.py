"""What does list mode cost beside stream mode?"""

from __future__ import annotations

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Bench, settings


async def ask(url: str, options: Options) -> list[Row]:
    """No-op jobs in both modes, the same handler and the same producer's code."""
    client = redis.Redis.from_url(url)
    jobs = options.jobs(100_000)

    async def mode(name: str) -> float:
        await client.flushall()
        return await Bench(settings(url, mode=name)).throughput(jobs)

    contestants = {"stream": lambda: mode("stream"), "list": lambda: mode("list")}
    figures = await measure.take_turns(options.rounds, contestants)
    await client.aclose()
    return measure.rows_of("modes, no-op jobs", "/s", figures, "stream", list=0.6)


if __name__ == "__main__":
    measure.main(ask, __doc__)
