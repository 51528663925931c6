"""The connection that may block."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import redis.asyncio as aioredis
from redis import exceptions as redis_errors


class Reader:
    """One connection of its own that may block, and knows its client id so that it can be unblocked from elsewhere.

    Args:
        connection: not connected yet.
        control: a client to the same server, to unblock it with.
    """

    def __init__(self, connection: aioredis.Connection, control: aioredis.Redis) -> None:
        self._connection = connection
        self._control = control
        self.client_id: int | None = None

    async def execute_command(self, *args: Any, **_: Any) -> Any:
        """Send one command and return its raw reply; the connection is given up on any error but the server's own."""
        connection = self._connection
        if not connection.is_connected:
            self.client_id = None
            await connection.connect()
            await connection.send_command("CLIENT", "ID")
            self.client_id = await connection.read_response()
        try:
            await connection.send_command(*args)
            return await connection.read_response()
        except redis_errors.ResponseError:
            raise
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    async def unblock(self) -> None:
        """End its blocking read, if there is one."""
        if self.client_id is not None:
            await self._control.client_unblock(self.client_id)

    async def close(self) -> None:
        """Close the connection."""
        with suppress(redis_errors.RedisError, OSError):
            await self._connection.disconnect()
