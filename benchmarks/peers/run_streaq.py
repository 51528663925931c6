# /// script
# requires-python = ">=3.10"
# dependencies = ["streaq==7.2.0", "uvloop==0.23.0"]
# ///
"""streaq: no results kept, no log line a job."""

from __future__ import annotations

import uvloop
from streaq import Worker
from workload import CONCURRENCY, Workload, together

work = Workload()
worker, producer = (
    Worker(redis_url=work.url, queue_name="bench", concurrency=CONCURRENCY, handle_signals=False) for _ in range(2)
)


async def job(n: int) -> None:
    """The workload's job."""
    await work.run(n)


worker.task(name="job", silent=True, ttl=0)(job)
task = producer.task(name="job", silent=True, ttl=0)(job)


async def send(n: int) -> None:
    """Enqueue one."""
    await task.enqueue(n)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    async with producer:
        for start in range(0, work.filled, 1000):
            await producer.enqueue_many([task.enqueue(n) for n in range(start, min(start + 1000, work.filled))])
        if work.paced:
            await together(worker.run_async(), work.produce(send))
        await worker.run_async()


uvloop.run(main())
