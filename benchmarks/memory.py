"""How much memory does a worker take: with a million jobs waiting, and after millions of them?"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Bench, Noop, settings
from streamworker import QueueWorker

BATCH = 50_000


def resident() -> float:
    """MB this process holds in memory (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def watched(url: str, waiting: int, total: int) -> dict[str, float]:
    """MB at the start, among ``waiting`` jobs, and after ``total`` jobs; run in a process of its own."""
    bench = Bench(settings(url))
    figures: dict[str, float] = {}
    bench.left = waiting + total  # before the worker starts: it does tens of thousands in its first second
    worker = QueueWorker(bench.app, redis=None, database=None, services=None)
    figures["start"] = resident()
    task = asyncio.create_task(worker.start())
    while bench.left > total:
        await asyncio.sleep(0.2)
        figures["waiting"] = max(figures.get("waiting", 0.0), resident())
    done = 0
    client = redis.Redis.from_url(url, protocol=2)
    while done < total:
        # Filled from outside of the app, so that what is measured is the worker.
        pipe = client.pipeline(transaction=False)
        for n in range(1000):
            pipe.execute_command("XADD", "stream:{bench}", "*", "job", b'{"kind":"noop","payload":{"n":%d}}' % n)
        await pipe.execute()
        done += 1000
        while total - done < bench.left - BATCH:  # noqa: ASYNC110 - a look now and then costs the worker less than an event a job
            await asyncio.sleep(0.01)
        if done * 10 % total < 10_000:
            figures.setdefault("early", resident())
    while bench.left > 0:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    figures["end"] = resident()
    await client.aclose()
    await worker.stop()
    await task
    return figures


async def ask(url: str, options: Options) -> list[Row]:
    """One long run; the process that is measured does nothing else."""
    waiting, total = options.jobs(1_000_000), options.jobs(10_000_000)
    filler = Bench(settings(url))
    async with filler.app:
        for start in range(0, waiting, 10_000):
            await filler.app.enqueue_many([Noop(n=n) for n in range(start, min(start + 10_000, waiting))])
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.memory",
        "--watch",
        url,
        str(waiting),
        str(total),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await child.communicate()
    figures = json.loads(output)
    question = "memory of a worker"
    return [
        Row(question=question, what="at its start", unit="MB", values=[figures["start"]], less=True),
        Row(question=question, what=f"{waiting:,} jobs waiting", unit="MB", values=[figures["waiting"]], less=True),
        Row(question=question, what=f"after {total:,} jobs", unit="MB", values=[figures["end"]], goal=60, less=True),
    ]


if __name__ == "__main__":
    if "--watch" in sys.argv:
        measure.quiet()
        address, few, many = sys.argv[-3:]
        print(json.dumps(asyncio.run(watched(address, int(few), int(many)))))
    else:
        measure.main(ask, __doc__)
