"""How long after a worker is killed do its jobs start elsewhere, by lease?"""

from __future__ import annotations

import asyncio
import signal
import sys
import time

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Noop, settings
from streamworker import App, Context, QueueWorker

JOBS = 50
LEASES = (1.0, 3.0, 15.0)


async def victim(url: str, lease: float) -> None:
    """A worker that never finishes what it takes."""
    app = App(settings=settings(url, lease=lease))

    @app.handler
    async def hang(_: Noop) -> None:
        await asyncio.sleep(3600)

    await QueueWorker(app, redis=None, database=None, services=None).start()


async def once(url: str, lease: float) -> list[float]:
    """Seconds from SIGKILL to the start of each job on another worker."""
    starts: list[float] = []
    done = asyncio.Event()
    app = App(settings=settings(url, lease=lease))

    @app.handler
    async def again(_: Noop, ctx: Context) -> None:
        if ctx.delivery > 1:
            starts.append(time.perf_counter())
            if len(starts) == JOBS:
                done.set()

    client = redis.Redis.from_url(url)
    await client.flushall()
    async with app:
        await app.enqueue_many([Noop(n=n) for n in range(JOBS)])
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.recovery", "--victim", url, str(lease)
    )
    while True:
        groups = await client.xinfo_groups("stream:{bench}") if await client.exists("stream:{bench}") else []
        if groups and groups[0]["pending"] == JOBS:
            break
        await asyncio.sleep(0.02)
    worker = QueueWorker(app, redis=None, database=None, services=None)
    task = asyncio.create_task(worker.start())
    await asyncio.sleep(lease / 2)
    killed = time.perf_counter()
    child.send_signal(signal.SIGKILL)
    await child.wait()
    await done.wait()
    await worker.stop()
    await task
    await client.aclose()
    return [start - killed for start in starts]


async def ask(url: str, options: Options) -> list[Row]:
    """The slowest job of each round: nothing lies longer."""
    rows = []
    for lease in LEASES if options.scale >= 1 else LEASES[:2]:
        slowest = [max(await once(url, lease)) for _ in range(min(options.rounds, 3))]
        question = "SIGKILL to the last restart"
        rows.append(
            Row(question=question, what=f"lease {lease:g} s", unit="s", values=slowest, goal=lease + 1, less=True)
        )
    return rows


if __name__ == "__main__":
    if "--victim" in sys.argv:
        measure.quiet()
        asyncio.run(victim(sys.argv[-2], float(sys.argv[-1])))
    else:
        measure.main(ask, __doc__)
