# /// script
# requires-python = ">=3.9"
# dependencies = ["arq==0.28.0", "hiredis==3.5.0", "uvloop==0.23.0"]
# ///
"""arq: no results kept, no log line a job, and a poll every 10 ms instead of every 500, which would cap it."""

from __future__ import annotations

import uvloop
from arq.connections import RedisSettings, create_pool
from arq.worker import Worker, func
from workload import CONCURRENCY, Workload, together

work = Workload()


async def job(_: object, n: int) -> None:
    """The workload's job."""
    await work.run(n)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    settings = RedisSettings.from_dsn(work.url)
    pool = await create_pool(settings)
    for n in range(work.filled):
        await pool.enqueue_job("job", n)
    worker = Worker(
        [func(job, name="job", keep_result=0)], redis_settings=settings, max_jobs=CONCURRENCY, poll_delay=0.01,
        handle_signals=False, log_results=False,
    )  # fmt: skip
    if work.paced:
        await together(worker.async_run(), work.produce(lambda n: pool.enqueue_job("job", n)))
    await worker.async_run()


uvloop.run(main())
