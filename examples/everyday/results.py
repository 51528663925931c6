"""Wait for what handlers return: ``REDIS_URL=redis://localhost:6379 python results.py``.

No database is needed: ``result_ttl`` keeps results in Redis for a while. Producer and worker are one process here, so
that there is one file to read.
"""

import asyncio

from streamworker import App, Discard, Payload, QueueWorker
from streamworker.errors import JobDead


class Add(Payload, kind="add", queue="sums"):
    """Two numbers.

    Attributes:
        a: the one.
        b: the other.
    """

    a: int
    b: int


app = App()


@app.handler(result_ttl=60)
async def add(payload: Add) -> dict[str, int]:
    """What it returns is kept for a minute."""
    if payload.b < 0:
        raise Discard("no negative numbers")
    return {"sum": payload.a + payload.b}


async def main() -> None:
    """Enqueue, work, and wait for all results at once."""
    worker = QueueWorker(app, redis=None, database=None, services=None)
    async with app, asyncio.TaskGroup() as group:
        group.create_task(worker.start())
        made = await app.enqueue_many([Add(a=n, b=n) for n in range(3)])
        results = await asyncio.gather(*(app.result(each.id, timeout=30) for each in made))
        print(results)
        wrong = await app.enqueue(Add(a=1, b=-1))
        try:
            await app.result(wrong.id, timeout=30)
        except JobDead as error:
            print("dead:", error.reason)
        await worker.stop()


asyncio.run(main())
