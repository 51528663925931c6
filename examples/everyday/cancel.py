"""Cancel one job that waits and one that runs: ``REDIS_URL=redis://localhost:6379 python cancel.py``.

``REDIS_URL=embedded`` brings a server along (``pip install 'streamworker[embedded]'``). Producer and worker are one
process here, so that there is one file to read.
"""

import asyncio

from streamworker import App, Context, Payload, QueueWorker


class Export(Payload, kind="export", queue="exports"):
    """Write a file that takes its time.

    Attributes:
        name: the file's.
    """

    name: str


app = App()
began, ended = asyncio.Event(), asyncio.Event()


@app.handler(timeout=600)
async def export(payload: Export, ctx: Context) -> None:
    """Page by page; a cancellation comes at an await, and what must be tidied up goes into ``finally``."""
    print(payload.name, "began")
    began.set()
    try:
        for _ in range(6000):
            await asyncio.sleep(0.1)
    finally:
        print(payload.name, "tidied up, cancelled:", ctx.cancelled)
        ended.set()


async def main() -> None:
    """Enqueue, cancel, and wait until nothing is left."""
    async with app:
        later = await app.enqueue(Export(name="later.csv"), delay=3600)
        print("later.csv:", await app.cancel(later.id))

        running = await app.enqueue(Export(name="running.csv"))
        worker = QueueWorker(app, redis=None, database=None, services=None)
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.start())
            await began.wait()
            answer = await app.cancel(running.id)
            await ended.wait()
            print("running.csv:", answer)
            await worker.stop()
        print("nothing is left")


asyncio.run(main())
