# /// script
# requires-python = ">=3.12"
# dependencies = ["ardiq==1.2.0", "uvloop==0.23.0"]
# ///
"""ardiq: its loop and its Redis client are Rust; jobs are staged in batches."""

from __future__ import annotations

import uvloop
from ardiq import Ardiq
from workload import CONCURRENCY, Workload, together

work = Workload()
app = Ardiq(redis_url=work.url, queue_name="bench", concurrency=CONCURRENCY)


@app.task(name="job")
async def job(n: int) -> None:
    """The workload's job."""
    await work.run(n)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    for start in range(0, work.filled, 1000):
        await app.enqueue_many([job.prepare(n) for n in range(start, min(start + 1000, work.filled))])
    if work.paced:
        await together(app.run(), work.produce(job.enqueue))
    await app.run()


uvloop.run(main())
