"""How many jobs per second does one worker process run, as a share of the reference loop?

``python -m benchmarks.throughput [--jobs N] [--slots N] [--rounds N] [--await-ms MS]``: medians, taking turns.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import statistics
import time

import redis.asyncio as redis
import structlog
import uvloop

from benchmarks import reference
from benchmarks.server import server
from streamworker import App, Payload, QueueWorker, Settings


class Noop(Payload, kind="noop", queue="bench"):
    """A payload of one number."""

    n: int


async def ours(url: str, jobs: int, slots: int, pause: float) -> float:
    """Jobs per second of a `QueueWorker` with everything on."""
    settings = Settings(redis_url=url, concurrency=slots, log_level="warning")
    app = App(settings=settings)
    left = jobs
    done = asyncio.Event()

    @app.handler
    async def noop(_: Noop) -> None:
        nonlocal left
        if pause:
            await asyncio.sleep(pause)
        left -= 1
        if left == 0:
            done.set()

    async with app:
        for start in range(0, jobs, 10_000):
            await app.enqueue_many([Noop(n=n) for n in range(start, min(start + 10_000, jobs))])
    worker = QueueWorker(app, redis=None, database=None, services=None)
    gc.collect()
    begin = time.perf_counter()
    task = asyncio.create_task(worker.start())
    await done.wait()
    seconds = time.perf_counter() - begin
    await worker.stop()
    await task
    return jobs / seconds


async def main(arguments: argparse.Namespace, url: str) -> None:
    """Print one line a round, then the medians and their ratio."""
    pause = arguments.await_ms / 1000

    async def handler(_: reference.Payload) -> None:
        if pause:
            await asyncio.sleep(pause)

    bare, full = [], []
    client = redis.Redis.from_url(url)
    for number in range(arguments.rounds):
        await client.flushall()
        bare.append(await reference.consume(url, arguments.jobs, slots=arguments.slots, handler=handler))
        await client.flushall()
        full.append(await ours(url, arguments.jobs, arguments.slots, pause))
        print(f"round {number + 1}: reference {bare[-1]:,.0f}/s, worker {full[-1]:,.0f}/s")
    await client.aclose()
    a, b = statistics.median(bare), statistics.median(full)
    print(f"median: reference {a:,.0f}/s, worker {b:,.0f}/s, ratio {b / a:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--await-ms", type=float, default=0)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with server() as address:
        uvloop.run(main(parser.parse_args(), address))
