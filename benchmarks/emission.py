"""How long from ``ctx.emit`` to a reader, while 1,000 jobs emit 50 chunks a second each?"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from contextlib import aclosing

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.server import on_any_core
from benchmarks.worker import settings
from streamworker import App, Context, Payload
from streamworker.results import MAX_BYTES

APP = "benchmarks.emission:app"
JOBS = 1000
READERS = 20
PERIOD = 0.02
SECONDS = 10.0
WARM_SECONDS = 2.0
"""Readers measure nothing before all jobs emit."""
START_SECONDS = 30.0
MOST_SECONDS = 120.0
"""Where the machine is too slow for the load, the jobs take longer; after this the round is given up."""
app: App[None] = App()


class Talk(Payload, kind="talk", queue="talking"):
    """Seconds to emit for."""

    seconds: float


@app.handler(timeout=None)
async def talk(payload: Talk, ctx: Context) -> None:
    """Emit the moment, as a model emits tokens: on time, however long one took."""
    begin = time.monotonic()
    count = round(payload.seconds / PERIOD)
    for number in range(count):
        await ctx.emit(str(time.perf_counter_ns()))
        await asyncio.sleep(max(0.0, begin + (number + 1) * PERIOD - time.monotonic()))


async def run(url: str, jobs: int) -> tuple[float, float, float, float]:
    """(median and 99th percentile in ms, chunks read a second, most MB of Redis) of jobs that all emit at once.

    The worker, and with it all jobs, is ended in the end, whatever happens here.
    """
    async with redis.Redis.from_url(url) as client:
        await client.flushall()
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "streamworker", "worker", APP, "--concurrency", str(jobs),
            env={**os.environ, "REDIS_URL": url, "STREAMWORKER_LOG_LEVEL": "warning"},
            preexec_fn=on_any_core,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await client.exists("stream:{talking}"):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
            async with asyncio.timeout(MOST_SECONDS):
                return await _read_all(url, client, jobs)
        finally:
            child.terminate()
            await child.wait()


async def _read_all(url: str, client: redis.Redis, jobs: int) -> tuple[float, float, float, float]:
    waits: list[float] = []
    most = 0
    async with App(settings=settings(url)) as reader:
        made = await reader.enqueue_many([Talk(seconds=WARM_SECONDS + SECONDS) for _ in range(jobs)])
        begin = time.perf_counter()

        async def read(job_id: str) -> None:
            async with aclosing(reader.output(job_id, queue="talking")) as items:
                async for item in items:
                    now = time.perf_counter_ns()
                    if now / 1e9 - begin > WARM_SECONDS:
                        waits.append((now - int(item.chunk)) / 1e6)

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, (await client.info("memory"))["used_memory"])
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        try:
            await asyncio.gather(*(read(each.id) for each in made[:: max(1, jobs // READERS)]))
        finally:
            watching.cancel()
        seconds = time.perf_counter() - begin - WARM_SECONDS
    return statistics.median(waits), statistics.quantiles(waits, n=100)[98], len(waits) / seconds, most / 1e6


async def ask(url: str, options: Options) -> list[Row]:
    """The delay of half of the chunks and of nearly every one, and what Redis holds meanwhile."""
    jobs = max(READERS, int(JOBS * options.scale))
    figures = [await run(url, jobs) for _ in range(options.rounds)]
    medians, delays, rates, memory = (list(each) for each in zip(*figures, strict=True))
    who = f"{jobs:,} jobs, 50 chunks/s each"
    bound = jobs * MAX_BYTES / 1e6
    return [
        Row(question="emit to reader, p50", what=who, unit="ms", values=medians, less=True),
        Row(question="emit to reader, p99", what=who, unit="ms", values=delays, goal=100, less=True),
        Row(question="chunks read", what=f"{READERS} readers of {who}", unit="/s", values=rates),
        Row(question="memory of Redis, most", what=who, unit="MB", values=memory, goal=bound, less=True),
    ]


if __name__ == "__main__":
    measure.main(ask, __doc__)
