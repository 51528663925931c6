"""Bridges in this process, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from streamworker.bridge import BridgeLoop
from streamworker.broker import list_bridge as bridge_module
from streamworker.broker.list_bridge import BridgeOptions, ListBridge
from streamworker.broker.redis.client import RedisAddress
from tests.cli.conftest import Program, bare, project  # noqa: F401 - fixtures

LISTS = ("queue:q:high", "queue:q", "queue:q:low")
STREAMS = ("stream:{q}:high", "stream:{q}", "stream:{q}:low")


def push(raw: redis.Redis, list_: str, *elements: bytes) -> None:
    """As legacy producers do, one after the other."""
    with raw.pipeline(transaction=False) as pipe:
        for element in elements:
            pipe.lpush(list_, element)
        pipe.execute()


def stored(raw: redis.Redis, stream: str = "stream:{q}") -> list[bytes]:
    """The documents of a stream in its order; every entry has the one field."""
    entries = raw.xrange(stream)
    assert all(list(fields) == [b"job"] for _, fields in entries)
    return [fields[b"job"] for _, fields in entries]


@pytest.fixture
def bridge_of(redis_url: str) -> Callable[..., Any]:
    """``async with bridge_of("q") as bridge``: open; ``None`` instead of queues for all there are."""

    @asynccontextmanager
    async def make(*queues: str | None, url: str = redis_url, **options: Any) -> AsyncIterator[ListBridge]:
        chosen = None if queues == (None,) else tuple(queues or ("q",))
        bridge = ListBridge(RedisAddress(url), BridgeOptions(queues=chosen, **options))  # type: ignore[arg-type]
        try:
            await bridge.open()
            yield bridge
        finally:
            await bridge.close()

    return make


@asynccontextmanager
async def running(bridge: ListBridge, **options: Any) -> AsyncIterator[BridgeLoop]:
    """The bridge's loop, until the body ends."""
    bridging = BridgeLoop(bridge, **options)
    async with anyio.create_task_group() as group:
        group.start_soon(bridging.run)
        try:
            yield bridging
        finally:
            bridging.stop()


def blocked(raw: redis.Redis) -> int:
    """How many connections wait at the server."""
    return sum("b" in client["flags"] for client in raw.client_list())


@pytest.fixture
def rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only doorbells tell of new elements: nobody looks in time."""
    monkeypatch.setattr(bridge_module, "SWEEP", 3600.0)
    monkeypatch.setattr(bridge_module, "POLL", 3600.0)


@pytest.fixture
def sw(bare: Program, redis_url: str) -> Program:  # noqa: F811
    """The program on a real and empty server, in the mode that a test names, or in stream mode."""
    bare.env["REDIS_URL"] = redis_url
    return bare
