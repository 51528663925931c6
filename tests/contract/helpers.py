"""What contract tests say often: jobs to publish, endings to settle, a look at what the server holds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from streamworker import QueueWorker, Settings, codec
from streamworker.broker import Broker, SettleRequest
from streamworker.job import Claim, Dead, Done, Level, PackedJob, ReleaseAt, RetryAt, Settled, Verdict
from tests.conftest import CLUSTER
from tests.contract.ground import Ground

# The keys of the queue q in stream mode, and those that both modes share.
HIGH, NORMAL, LOW = "stream:{q}:high", "stream:{q}", "stream:{q}:low"
DUE, BODIES, DEAD, META = "stream:{q}:due", "stream:{q}:bodies", "stream:{q}:dead", "stream:{q}:meta"
IDS = "stream:{q}:ids"

LEVELS: tuple[Level, ...] = ("high", "normal", "low")
stream_only = pytest.mark.parametrize("ground", ["stream"], indirect=True)
list_only = pytest.mark.parametrize("ground", ["list"], indirect=True)
list_in_all = pytest.mark.parametrize("ground", ["stream", pytest.param("list", marks=pytest.mark.all)], indirect=True)
"""For what takes seconds, and is in list mode the same once more: its scripts, or the loop around them, are held by others."""


def job(name: str = "", queue: str = "q", level: Level = "normal", **options: Any) -> PackedJob:
    name = name or codec.new_id()
    return PackedJob(name, queue, level, document(name), **{"key_ttl": 60.0, **options})


def document(name: str) -> bytes:
    return json.dumps({"id": name, "payload": {"name": name}}).encode()


def names(claims: list[Claim]) -> list[str]:
    return [json.loads(claim.body or b"{}").get("id", "") for claim in claims]


def done(claim: Claim) -> SettleRequest:
    return SettleRequest(claim, Done())


def ended(claim: Claim, verdict: Verdict, **options: Any) -> SettleRequest:
    return SettleRequest(
        claim, verdict, options.pop("body", b'{"id":"next","payload":{}}'), **{"job_id": "next", "kind": "k", **options}
    )


def retry(claim: Claim, at: float, **options: Any) -> SettleRequest:
    return ended(claim, RetryAt(at, "why"), **options)


def release(claim: Claim, at: float | None = None, **options: Any) -> SettleRequest:
    return ended(claim, ReleaseAt(at, "why"), **options)


def dead(claim: Claim, reason: str = "why", error: str = "e", **options: Any) -> SettleRequest:
    return ended(claim, Dead(reason, error), **options)


ENDINGS = {"done": done, "retry": lambda claim: retry(claim, 0), "release": release, "dead": dead}


async def one(broker: Broker, running: Any = ()) -> Claim:
    (claim,) = await broker.claim(1, 0, running)
    return claim


async def settle_one(broker: Broker, ending: SettleRequest) -> Settled:
    (result,) = await broker.settle([ending])
    return result


async def recover(broker: Broker, ground: Ground, limit: int = 100, running: Any = (), queue: str = "q") -> list[Claim]:
    ground.forget_pace(queue)
    ground.sweep_soon(broker)
    return await broker.claim(limit, 0, running)


def settings(raw: Any, ground: Any, **options: Any) -> Settings:
    """Those of a worker on the server that ``raw`` talks to."""
    port = raw.connection_pool.connection_kwargs["port"]
    # A node of a cluster leads to the others.
    url = f"redis+cluster://127.0.0.1:{port}" if CLUSTER else f"redis://127.0.0.1:{port}/0"
    return Settings(redis_url=url, mode=ground.mode, **options)


@asynccontextmanager
async def working(app: Any, workers: int = 1, **options: Any) -> AsyncIterator[list[QueueWorker]]:
    """Workers of this process, stopped at the end."""
    async with anyio.create_task_group() as group:
        made = [QueueWorker(app, redis=None, database=None, services=None) for _ in range(workers)]
        for worker in made:
            group.start_soon(worker.start)
        try:
            yield made
        finally:
            for worker in made:
                await worker.stop()
