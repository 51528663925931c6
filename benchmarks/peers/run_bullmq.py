# /// script
# requires-python = ">=3.12,<3.14"
# dependencies = ["bullmq==3.4.4", "hiredis==3.5.0", "uvloop==0.23.0"]
# ///
"""BullMQ for Python on Redis, completed jobs removed; hiredis and uvloop, which its documentation does not mention."""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop
from bullmq import Queue, Worker
from workload import CONCURRENCY, Workload

work = Workload()
OPTIONS = {"removeOnComplete": True}


async def job(given: Any, _: str) -> None:
    """The workload's job."""
    await work.run(given.data["n"])


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    queue = Queue("bench", {"connection": work.url})
    for start in range(0, work.filled, 1000):
        numbers = range(start, min(start + 1000, work.filled))
        await queue.addBulk([{"name": "job", "data": {"n": n}, "opts": OPTIONS} for n in numbers])
    _ = Worker("bench", job, {"connection": work.url, "concurrency": CONCURRENCY})  # it runs by itself
    if work.paced:
        await work.produce(lambda n: queue.add("job", {"n": n}, OPTIONS))
    await asyncio.Event().wait()  # the last job ends the process


uvloop.run(main())
