"""The producer of the latency question, a process of its own as producers are: one job every hundredth of a second.

``python -m benchmarks.producer URL bare|worker JOBS``. A job says when it was sent, in nanoseconds of the monotonic
clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import redis.asyncio as redis
import uvloop

from benchmarks.peers.workload import RATE
from benchmarks.worker import Noop, settings
from streamworker import App


async def paced(jobs: int, send: Callable[[int], Awaitable[object]]) -> None:
    """Send ``jobs`` jobs, one every hundredth of a second, late or not."""
    begin = time.perf_counter()
    for n in range(jobs):
        await asyncio.sleep(max(0.0, begin + n / RATE - time.perf_counter()))
        await send(time.perf_counter_ns())


async def main(url: str, contestant: str, jobs: int) -> None:
    """Produce for one contestant."""
    if contestant == "bare":
        client = redis.Redis.from_url(url, protocol=2)
        await paced(jobs, lambda now: client.execute_command("XADD", "bare", "*", "n", now))
        await client.aclose()
        return
    async with App(settings=settings(url)) as app:
        await paced(jobs, lambda now: app.enqueue(Noop(n=now)))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
