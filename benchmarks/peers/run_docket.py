# /// script
# requires-python = ">=3.10"
# dependencies = ["pydocket==0.27.0", "hiredis==3.5.0", "uvloop==0.23.0"]
# ///
"""docket: a check every 10 ms instead of every 250, which would cap it; nothing is kept of finished jobs."""

from __future__ import annotations

from datetime import timedelta

import uvloop
from docket import Docket, Worker
from workload import CONCURRENCY, Workload, together

work = Workload()


async def job(n: int) -> None:
    """The workload's job."""
    await work.run(n)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    async with Docket(name="bench", url=f"{work.url}?max_connections=300", execution_ttl=timedelta(0)) as docket:
        docket.register(job)
        add = docket.add(job)
        if work.filled:
            await docket.add_many(docket.call(job)(n) for n in range(work.filled))
        short = timedelta(milliseconds=10)
        async with Worker(
            docket, concurrency=CONCURRENCY, minimum_check_interval=short, scheduling_resolution=short
        ) as worker:
            if work.paced:
                await together(worker.run_forever(), work.produce(add))
            await worker.run_forever()


uvloop.run(main())
