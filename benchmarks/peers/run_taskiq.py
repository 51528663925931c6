# /// script
# requires-python = ">=3.10"
# dependencies = ["taskiq==0.13.0", "taskiq-redis==1.2.4", "hiredis==3.5.0", "uvloop==0.23.0"]
# ///
"""taskiq-redis on its stream broker: no result backend, no parsing of parameters, jobs prefetched."""

from __future__ import annotations

import uvloop
from taskiq.api import run_receiver_task
from taskiq_redis import RedisStreamBroker
from workload import CONCURRENCY, Workload, together

work = Workload()
broker = RedisStreamBroker(work.url, consumer_id="0")


@broker.task(task_name="job")
async def job(n: int) -> None:
    """The workload's job."""
    await work.run(n)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    broker.is_worker_process = True
    await broker.startup()
    for n in range(work.filled):
        await job.kiq(n)
    worker = run_receiver_task(broker, validate_params=False, max_async_tasks=CONCURRENCY, max_prefetch=CONCURRENCY)
    if work.paced:
        await together(worker, work.produce(job.kiq))
    await worker


uvloop.run(main())
