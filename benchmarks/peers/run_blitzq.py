# /// script
# requires-python = ">=3.12,<3.14"
# dependencies = ["blitzq==1.1.0", "hiredis==3.5.0", "uvloop==0.23.0"]
# ///
"""blitzq, reliable mode, no results kept; hiredis and uvloop as its guide to tuning says."""

from __future__ import annotations

import uvloop
from blitzq import Queue, Worker
from workload import CONCURRENCY, Workload, together

work = Workload()
queue = Queue("bench", redis_url=work.url, store_results=False)


@queue.task(name="job")
async def job(n: int) -> None:
    """The workload's job."""
    await work.run(n)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    for start in range(0, work.filled, 1000):
        await job.enqueue_many([(n,) for n in range(start, min(start + 1000, work.filled))])
    worker = Worker(queue, concurrency=CONCURRENCY, warn_cpu_bound=False)
    if work.paced:
        await together(worker.run(), work.produce(job.enqueue))
    await worker.run()


uvloop.run(main())
