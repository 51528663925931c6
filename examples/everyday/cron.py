"""A job every second, from two workers at once: ``REDIS_URL=redis://localhost:6379 python cron.py``.

``STREAMWORKER_APP=cron:app streamworker cron list`` shows when it is due. Two workers are one process here, so that
there is one file to read.
"""

import asyncio

from streamworker import App, Context, Payload, QueueWorker


class Beat(Payload, kind="beat", queue="beats"):
    """Nothing to say."""


app = App()
app.cron("* * * * * *", Beat(), name="every second", missed="skip")
app.cron("0 3 * * *", Beat(), name="at night", tz="Europe/Berlin")

ticks: list[str] = []
enough = asyncio.Event()


@app.handler
async def beat(payload: Beat, ctx: Context) -> None:
    """One job a tick, whoever runs it."""
    ticks.append((ctx.job.headers or {})["tick"])
    if len(ticks) == 3:
        enough.set()


async def main() -> None:
    """Work until three ticks came."""
    workers = [QueueWorker(app, redis=None, database=None, services=None) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.start())
        await enough.wait()
        for worker in workers:
            await worker.stop()
    print("one job a tick:", len(ticks) == len(set(ticks)))


if __name__ == "__main__":
    asyncio.run(main())
