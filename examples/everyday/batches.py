"""Batches: many small jobs, one insert. Each job is settled by itself: a bad row fails alone.

REDIS_URL=redis://localhost:6379 python examples/everyday/batches.py
"""

import asyncio

from streamworker import App, Discard, Payload, QueueWorker

app = App()
table: list[tuple[str, int]] = []
inserts: list[int] = []


class PageView(Payload, kind="page.view", queue="views"):
    path: str
    milliseconds: int


@app.handler(batch=50, linger=0.1, timeout=30)
async def store(views: list[PageView]) -> list[Exception | None]:
    good = [view for view in views if view.milliseconds >= 0]
    table.extend((view.path, view.milliseconds) for view in good)  # one INSERT of many rows, in real life
    inserts.append(len(good))
    return [None if view.milliseconds >= 0 else Discard("a page cannot take less than no time") for view in views]


async def main() -> None:
    async with app:
        await app.enqueue_many([PageView(path=f"/{n}", milliseconds=-1 if n == 13 else n) for n in range(200)])
        await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
    print(f"{len(table)} rows in {len(inserts)} inserts")


if __name__ == "__main__":
    asyncio.run(main())
