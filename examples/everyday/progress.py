"""A job that says how far it has come: ``REDIS_URL=redis://localhost:6379 python progress.py``.

``streamworker pending`` shows the same from another terminal. Producer, worker and operator are one process here, so
that there is one file to read.
"""

import asyncio

from streamworker import App, Context, Payload, QueueWorker


class Load(Payload, kind="load", queue="loads"):
    """So many rows.

    Attributes:
        rows: how many.
    """

    rows: int


app = App()
may_end = asyncio.Event()


@app.handler
async def load(payload: Load, ctx: Context) -> None:
    """Says it for every row; it is written down once a second at most."""
    for row in range(1, payload.rows + 1):
        ctx.progress(row, payload.rows, "loading")
    await may_end.wait()


async def seen() -> str:
    """What an operator sees of the job when its rows are loaded; before, it may be any number of them."""
    async with app.operator() as operator:
        for _ in range(300):
            after: str | None = ""
            while after is not None:  # a page a level
                page = await operator.pending("loads", after)
                for entry in page.rows:
                    if entry.progress is not None and entry.progress.done == entry.progress.total:
                        return entry.progress.text
                after = page.after
            await asyncio.sleep(0.1)
    return "nothing in half a minute"


async def main() -> None:
    """Work, look, and let it end."""
    worker = QueueWorker(app, redis=None, database=None, services=None)
    async with app, asyncio.TaskGroup() as group:
        group.create_task(worker.start())
        await app.enqueue(Load(rows=10_000))
        print(await seen())
        may_end.set()
        await worker.stop()


asyncio.run(main())
