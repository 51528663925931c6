"""What does the number of slots do to throughput, for jobs that do nothing and for jobs that await 10 ms?"""

from __future__ import annotations

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Bench, settings

SLOTS = (1, 10, 100, 500, 1000)


async def ask(url: str, options: Options) -> list[Row]:
    """One row a number of slots."""
    client = redis.Redis.from_url(url)
    rows = []
    for pause, jobs in ((0.0, 50_000), (0.01, 20_000)):
        for slots in SLOTS:
            # A hundredth of a second a job and slot: no more jobs than make a round last about two seconds.
            number = options.jobs(min(jobs, slots * 200) if pause else jobs if slots > 1 else 10_000)

            async def one(slots: int = slots, pause: float = pause, number: int = number) -> float:
                await client.flushall()
                return await Bench(settings(url, concurrency=slots), pause).throughput(number)

            name = f"{slots} slots"
            figures = await measure.take_turns(min(options.rounds, 3), {name: one})
            question = "slots, no-op jobs" if not pause else "slots, jobs of 10 ms"
            rows.append(Row(question=question, what=name, unit="/s", values=figures[name]))
    await client.aclose()
    return rows


if __name__ == "__main__":
    measure.main(ask, __doc__)
