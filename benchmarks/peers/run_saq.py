# /// script
# requires-python = ">=3.9"
# dependencies = ["saq[redis,hiredis]==0.26.4", "typing-extensions==4.15.0", "uvloop==0.23.0"]
# ///
"""saq on its Redis queue, no results kept. (It imports typing_extensions without asking for it on Python 3.12.)"""

from __future__ import annotations

import uvloop
from saq import Queue, Worker
from workload import CONCURRENCY, Workload, together

work = Workload()


async def job(_: object, *, n: int) -> None:
    """The workload's job."""
    await work.run(n)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    queue = Queue.from_url(work.url, max_concurrent_ops=CONCURRENCY)
    await queue.connect()
    for n in range(work.filled):
        await queue.enqueue("job", n=n, ttl=-1)
    worker = Worker(queue, functions=[("job", job)], concurrency=CONCURRENCY)
    if work.paced:
        await together(worker.start(), work.produce(lambda n: queue.enqueue("job", n=n, ttl=-1)))
    await worker.start()


uvloop.run(main())
