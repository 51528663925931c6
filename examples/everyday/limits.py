"""Limits of kinds: an API that allows ten calls a second, and reports of which each tenant may have one at a time.

    REDIS_URL=redis://localhost:6379 python examples/everyday/limits.py

Start it twice at the same time: both workers together keep to the limits.
"""

import asyncio
import time
from collections import Counter

from streamworker import App, Payload, QueueWorker

app = App()


class CallPartner(Payload, kind="partner.call", queue="calls"):
    number: int


class BuildReport(Payload, kind="report.build", queue="reports"):
    tenant: str
    number: int


called: list[float] = []
building: Counter[str] = Counter()
built: list[str] = []


@app.handler(rate="10/s", max_attempts=5)
async def call_partner(payload: CallPartner) -> None:
    called.append(time.monotonic())


@app.handler(concurrency=1, limit_by="tenant")
async def build_report(payload: BuildReport) -> None:
    building[payload.tenant] += 1
    if building[payload.tenant] > 1:
        raise RuntimeError(f"two reports of {payload.tenant} at once")
    await asyncio.sleep(0.05)
    building[payload.tenant] -= 1
    built.append(payload.tenant)


async def main() -> None:
    async with app:
        await app.enqueue_many([CallPartner(number=n) for n in range(10)])
        await app.enqueue_many([BuildReport(tenant=t, number=n) for n in range(3) for t in ("ada", "bob", "eve")])
        worker = QueueWorker(app, redis=None, database=None, services=None)
        working = asyncio.create_task(worker.start())
        while (len(called) < 10 or len(built) < 9) and not working.done():
            await asyncio.sleep(0.01)
        await worker.stop()
        await working
    print(f"{len(called)} calls in {called[-1] - called[0]:.1f} s, {len(built)} reports, one at a time for each tenant")


if __name__ == "__main__":
    asyncio.run(main())
