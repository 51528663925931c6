"""Pause a queue, let it fill, look, resume it, and empty another one, from Python: what `streamworker queues` does.

REDIS_URL=redis://localhost:6379 python examples/everyday/pause.py
"""

import asyncio

from streamworker import App, Payload, QueueWorker

app = App()
sent: list[int] = []


class Letter(Payload, kind="letter", queue="letters"):
    number: int


@app.handler
async def send(payload: Letter) -> None:
    sent.append(payload.number)


async def main() -> None:
    async with app, app.operator() as operator:
        worker = QueueWorker(app, redis=None, database=None, services=None)
        working = asyncio.create_task(worker.start())
        await app.enqueue(Letter(number=1))
        while not sent:
            await asyncio.sleep(0.01)

        await operator.pause("letters", "by me: the printer is out of paper")
        await asyncio.sleep(1)  # within a second every worker knows
        await app.enqueue_many([Letter(number=n) for n in range(2, 12)])
        await asyncio.sleep(1)
        (depth,) = await operator.depth(["letters"])
        print(f"{len(sent)} sent, {depth.ready} wait, paused {await operator.paused('letters')}")

        await operator.resume("letters")
        while len(sent) < 11:
            await asyncio.sleep(0.01)
        print(f"{len(sent)} sent")

        await app.enqueue(Letter(number=0), delay=3600)
        print(f"{await operator.purge('letters', 'delayed', 100)} delayed deleted")
        await worker.stop()
        await working


if __name__ == "__main__":
    asyncio.run(main())
