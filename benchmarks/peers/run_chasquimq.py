# /// script
# requires-python = ">=3.12,<3.14"
# dependencies = ["chasquimq==1.3.0", "hiredis==3.5.0", "uvloop==0.23.0"]
# ///
"""ChasquiMQ (its engine is Rust), no results kept and no events; it needs Redis 8.6 or newer."""

from __future__ import annotations

from typing import Any

import redis
import uvloop
from chasquimq import Queue, Worker
from workload import CONCURRENCY, Workload, together

work = Workload()


def check_server() -> None:
    """End where the server is too old: it enqueues by ``XADD … IDMP``, which came with Redis 8.6."""
    with redis.Redis.from_url(work.url) as client:
        version = client.info("server")["redis_version"]
    if tuple(map(int, version.split(".")[:2])) < (8, 6):
        raise SystemExit(f"it needs Redis 8.6 or newer, and this server answers as Redis {version}")


async def job(given: Any) -> None:
    """The workload's job."""
    await work.run(given.data)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    async with Queue("bench", redis_url=work.url) as queue:
        for start in range(0, work.filled, 1000):
            numbers = range(start, min(start + 1000, work.filled))
            await queue.add_bulk([{"name": "job", "data": n} for n in numbers])
        worker = Worker("bench", job, redis_url=work.url, concurrency=CONCURRENCY, events_enabled=False)
        if work.paced:
            await together(worker.run(), work.produce(lambda n: queue.add("job", n)))
        await worker.run()


check_server()
uvloop.run(main())
