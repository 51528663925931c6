"""Workers with a ledger, inside the test's process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from streamworker import App, Payload, QueueWorker, Settings


class Job(Payload, kind="job", queue="q"):
    """What the tests' handlers are given."""

    n: int = 0


def settings_for(redis_url: str, database_url: str | None, **more: Any) -> Settings:
    """Settings of a test's worker."""
    values = {"concurrency": 10, "lease": 2.0, "grace": 5.0, "relay": "off", **more}
    return Settings(redis_url=redis_url, database_url=database_url, **values)


@asynccontextmanager
async def working(app: App[Any], *, database: Any = None, **options: Any) -> AsyncIterator[QueueWorker]:
    """A worker that runs until the block is left, and must have ended well then."""
    worker = QueueWorker(app, redis=None, database=database, services=None, **options)
    life = asyncio.create_task(worker.start())
    try:
        yield worker
    finally:
        await worker.stop()
        await life
