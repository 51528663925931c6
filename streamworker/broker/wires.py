"""Connections for commands that are sent thousands of times a second: one command, one raw reply, nothing around it.

redis-py's client costs more per command than the job it carries: a pool with a condition, a retry loop, telemetry
hooks, a task a write, and packing in Python. Its connections know how to log in, to speak TLS and to find a Sentinel's
master; those are kept, through their public methods, and hiredis packs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import hiredis
import redis.asyncio as aioredis
from redis import exceptions as redis_errors


class Wire:
    """One connection, one command at a time.

    Args:
        connection: not connected yet; its own ``socket_timeout`` bounds the handshake.
        limit: seconds a command may take; afterwards the connection is given up, since its reply could still come.
    """

    def __init__(self, connection: aioredis.Connection, limit: float) -> None:
        self._connection = connection
        self._handshake = connection.socket_timeout
        self._limit = limit

    @property
    def connected(self) -> bool:
        """Whether the next command needs no new connection, as far as is known."""
        return bool(self._connection.is_connected)

    async def ready(self) -> bool:
        """Connect if need be; an idle connection the server has closed is noticed. Tells whether it is a new one."""
        connection = self._connection
        if connection.is_connected:
            try:
                if not await connection.can_read():  # nothing can be there to read but the end
                    return False
            except (redis_errors.ConnectionError, OSError):
                pass
            await connection.disconnect(nowait=True)
        connection.socket_timeout = self._handshake
        await connection.connect()
        connection.socket_timeout = None  # from here on `call` bounds the whole exchange
        return True

    async def call(self, *args: Any) -> Any:
        """Send one command on the ready connection; it is given up on any error but the server's own.

        Raises:
            redis.exceptions.ResponseError: the server said no.
            redis.exceptions.ConnectionError: the connection broke; the command may have been executed.
            redis.exceptions.TimeoutError: no reply came in time; the command may have been executed.
        """
        connection = self._connection
        try:
            async with asyncio.timeout(self._limit):  # cheaper than one around the write and one around the read
                await connection.send_packed_command(hiredis.pack_command(args), check_health=False)
                return await connection.read_response(timeout=math.inf)
        except TimeoutError:
            raise redis_errors.TimeoutError(f"no reply within {self._limit:g} seconds") from None

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.disconnect(nowait=True)


class Wires:
    """A few wires; whoever finds none free waits for one.

    Args:
        make: makes a connection.
        size: most connections.
        limit: seconds a command may take.
    """

    def __init__(self, make: Callable[[], aioredis.Connection], size: int, limit: float) -> None:
        self._make = make
        self._limit = limit
        self._free = asyncio.Semaphore(size)
        self._idle: list[Wire] = []
        self._closed = False

    async def execute_command(self, *args: Any, **_: Any) -> Any:
        """Send one command and return its raw reply. Raises what `Wire.call` raises."""
        async with self._free:
            wire = self._idle.pop() if self._idle else Wire(self._make(), self._limit)
            try:
                await wire.ready()
                return await wire.call(*args)
            finally:
                if self._closed:
                    await wire.close()
                else:
                    self._idle.append(wire)

    async def disconnect(self) -> None:
        """Give up the idle connections; the next commands make new ones."""
        idle, self._idle = self._idle, []
        for wire in idle:
            await wire.close()

    async def aclose(self) -> None:
        """Close all connections, those in use after their command."""
        self._closed = True
        await self.disconnect()
