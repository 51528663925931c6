"""Sets of servers that tests may break, and a worker that runs in this process."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from streamworker import App, Payload, QueueWorker, Settings
from streamworker.broker.claim import StreamOptions
from streamworker.broker.keys import QueueKeys
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.stream import StreamBroker
from tests.conftest import eventually
from tests.topologies.servers import Clustered, Sentineled


class Count(Payload, kind="count", queue="q"):
    name: str


class Other(Payload, kind="other", queue="b"):
    name: str


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentineled]:
    """Three Sentinels, a master and a replica of this test's own."""
    servers = Sentineled(tmp_path)
    try:
        yield servers
    finally:
        servers.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Clustered]:
    """Three masters of this test's own; the first has a replica."""
    servers = Clustered(tmp_path, replicas=3)
    try:
        yield servers
    finally:
        servers.kill()


class Ran(Counter[str]):
    """How often each job ran, by name."""


@asynccontextmanager
async def working(url: str, **options: object) -> AsyncIterator[Ran]:
    """A worker for `Count` and `Other` whose runs are counted; afterwards it must stop cleanly."""
    ran = Ran()
    app = App(settings=Settings(redis_url=url, **{"lease": 1.0, "concurrency": 10, **options}))

    @app.handler
    async def count(payload: Count) -> None:
        ran[payload.name] += 1

    @app.handler
    async def other(payload: Other) -> None:
        ran[payload.name] += 1

    worker = QueueWorker(app, redis=None, database=None, services=None)
    task = asyncio.create_task(worker.start())
    try:
        await eventually(lambda: task.done() or (hasattr(worker, "_lease") and worker._lease._thread is not None))
        yield ran
        await worker.stop()
    except BaseException:
        task.cancel()
        raise
    finally:
        await asyncio.wait([task])
    task.result()


class Producer:
    """Stores jobs in a thread, each on the master and on ``replicas`` replicas before it counts as acknowledged."""

    def __init__(self, client: Callable[[], redis.Redis], queues: Sequence[QueueKeys] = (QueueKeys("q"),)) -> None:
        self._client, self._queues = client, queues
        self.acknowledged: list[str] = []
        self.replicas = 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Producer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _main(self) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                with self._client() as client:
                    while not self._stop.wait(0.002):
                        number += 1
                        name = f"job{number}"
                        document = f'{{"id":"{name}","payload":{{"name":"{name}"}}}}'
                        with client.pipeline(transaction=False) as pipe:
                            keys = self._queues[number % len(self._queues)]
                            pipe.execute_command(*keys.adding("normal", document.encode()))
                            pipe.wait(self.replicas, 1000)
                            _, replicas = pipe.execute()
                        if replicas >= self.replicas:
                            self.acknowledged.append(name)
            except (redis.RedisError, OSError, StopIteration):
                self._stop.wait(0.05)


@pytest.fixture
def broker_of() -> Callable[..., Any]:
    """``async with broker_of(url) as broker``: open, joined, and ready to take from the dead."""

    @asynccontextmanager
    async def make(where: str | RedisAddress, *queues: str, **options: Any) -> AsyncIterator[StreamBroker]:
        address = where if isinstance(where, RedisAddress) else RedisAddress(where)
        pairs = tuple((queue, None) for queue in queues or ("q",))
        broker = StreamBroker(address, StreamOptions(queues=pairs, **options))
        try:
            await broker.open()
            await broker.join("w")
            yield broker
        finally:
            await broker.close()

    return make
