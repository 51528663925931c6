"""The connection that may block."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import redis.asyncio as aioredis
from redis import exceptions as redis_errors

from streamworker.broker.wires import Wire


class Reader:
    """One connection of its own that may block, and knows its client id so that it can be unblocked from elsewhere.

    Args:
        wire: not connected yet; its limit is longer than the longest block.
        control: a client to the same server, to unblock it with.
    """

    def __init__(self, wire: Wire, control: aioredis.Redis) -> None:
        self._wire = wire
        self._control = control
        self.client_id: int | None = None

    async def execute_command(self, *args: Any, **_: Any) -> Any:
        """Send one command and return its raw reply. Raises what `Wire.call` raises."""
        if not self._wire.connected:
            self.client_id = None
        if await self._wire.ready():
            self.client_id = await self._wire.call("CLIENT", "ID")
        return await self._wire.call(*args)

    async def unblock(self) -> None:
        """End its blocking read, if there is one."""
        if self.client_id is not None:
            await self._control.client_unblock(self.client_id)

    async def close(self) -> None:
        """Close the connection."""
        with suppress(redis_errors.RedisError, OSError):
            await self._wire.close()
