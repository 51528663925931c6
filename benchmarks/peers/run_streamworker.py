"""Ourselves, with everything on, in this workload."""

from __future__ import annotations

import uvloop
from workload import CONCURRENCY, Workload, together

from streamworker import App, Payload, QueueWorker, Settings

work = Workload()
app = App(settings=Settings(redis_url=work.url, concurrency=CONCURRENCY, log_level="warning"))


class Noop(Payload, kind="noop", queue="bench"):
    """A payload of one number."""

    n: int


@app.handler
async def job(payload: Noop) -> None:
    """The workload's job."""
    await work.run(payload.n)


async def main() -> None:
    """Fill, then work; or work, and produce beside it."""
    async with app:
        for start in range(0, work.filled, 10_000):
            await app.enqueue_many([Noop(n=n) for n in range(start, min(start + 10_000, work.filled))])
        worker = QueueWorker(app, redis=None, database=None, services=None)
        if work.paced:
            await together(worker.start(), work.produce(lambda n: app.enqueue(Noop(n=n))))
        await worker.start()


uvloop.run(main())
