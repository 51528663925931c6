"""How much more do two processes do than one, for handlers that burn a millisecond of CPU?"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.server import on_any_core
from benchmarks.worker import settings
from streamworker import App, Payload

APP = "benchmarks.processes:app"
app: App[None] = App()


class Burn(Payload, kind="burn", queue="burning"):
    """Milliseconds of CPU."""

    ms: float


@app.handler
async def burn(payload: Burn) -> None:
    """Compute, as far as anybody can tell."""
    until = time.thread_time() + payload.ms / 1000
    while time.thread_time() < until:
        pass


async def run(url: str, jobs: int, processes: int) -> float:
    """Jobs per second of ``streamworker worker --processes N``, from the first to the last."""
    client = redis.Redis.from_url(url)
    await client.flushall()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streamworker", "worker", APP, "--processes", str(processes), "--concurrency", "20",
        env={**os.environ, "REDIS_URL": url, "STREAMWORKER_LOG_LEVEL": "warning"},
        preexec_fn=on_any_core,
    )  # fmt: skip
    while (  # noqa: ASYNC110 - other processes
        await client.exists("stream:{burning}") == 0
        or len(await client.xinfo_consumers("stream:{burning}", "workers")) < processes
    ):  # a consumer is there when it first waited
        await asyncio.sleep(0.05)
    async with App(settings=settings(url)) as producer:
        await producer.enqueue_many([Burn(ms=1) for _ in range(jobs)])
    begin = time.perf_counter()
    while await client.xlen("stream:{burning}"):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    seconds = time.perf_counter() - begin
    child.terminate()
    await child.wait()
    await client.aclose()
    return jobs / seconds


async def ask(url: str, options: Options) -> list[Row]:
    """One process, then two; Redis has so little to do that it may share a core."""
    jobs = options.jobs(5_000)
    figures = await measure.take_turns(
        options.rounds, {"one process": lambda: run(url, jobs, 1), "two processes": lambda: run(url, jobs, 2)}
    )
    return measure.rows_of("handlers of 1 ms of CPU", "/s", figures, "one process", **{"two processes": 1.8})


if __name__ == "__main__":
    measure.main(ask, __doc__)
