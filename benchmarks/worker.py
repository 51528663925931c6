"""Our side of most questions: a `QueueWorker` with everything on, in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from streamworker import App, Payload, QueueWorker, Settings


class Noop(Payload, kind="noop", queue="bench"):
    """A payload of one number."""

    n: int


class Bench:
    """An app with one handler that counts, and perhaps awaits.

    Args:
        settings: of app and worker.
        pause: seconds every job awaits.
    """

    def __init__(self, settings: Settings, pause: float = 0.0) -> None:
        self.settings = settings
        self.app = App(settings=settings)
        self.left = 0
        self.done = asyncio.Event()
        self.app.handler(self._handler(pause))

    def _handler(self, pause: float):
        async def noop(_: Noop) -> None:
            if pause:
                await asyncio.sleep(pause)
            self.left -= 1
            if self.left == 0:
                self.done.set()

        return noop

    async def fill(self, jobs: int) -> None:
        """Put ``jobs`` jobs on the queue."""
        self.left += jobs
        self.done.clear()
        async with self.app:
            for start in range(0, jobs, 10_000):
                await self.app.enqueue_many([Noop(n=n) for n in range(start, min(start + 10_000, jobs))])

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """A worker beside the block."""
        worker = QueueWorker(self.app, redis=None, database=None, services=None)
        task = asyncio.create_task(worker.start())
        try:
            yield
        finally:
            await worker.stop()
            await task

    async def throughput(self, jobs: int) -> float:
        """Jobs per second, from the worker's start to the end of the last job."""
        await self.fill(jobs)
        begin = time.perf_counter()
        async with self.working():
            await self.done.wait()
            return jobs / (time.perf_counter() - begin)

    async def drained(self) -> None:
        """Work until everything is done, settled and cleaned up."""
        async with self.working():
            await self.done.wait()


def settings(url: str, **more: object) -> Settings:
    """Defaults, but for the log."""
    return Settings(redis_url=url, log_level="warning", **more)  # type: ignore[arg-type]
