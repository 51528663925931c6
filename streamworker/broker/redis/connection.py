"""Connections: for blocking reads, and a pool for commands."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import hiredis
import redis.asyncio as aioredis
from redis import exceptions as redis_errors


class Reader:
    """A connection for blocking reads; it knows its client id, so that another connection can unblock it.

    Args:
        connection: not connected yet; its limit is longer than the longest block.
        control: a client of the same server that sends CLIENT UNBLOCK.
    """

    def __init__(self, connection: CommandConnection, control: aioredis.Redis) -> None:
        self._connection = connection
        self._control = control
        self.client_id: int | None = None

    async def execute_command(self, *args: Any, **_: Any) -> Any:
        """Send one command and return its raw reply. Raises what `CommandConnection.call` raises."""
        if not self._connection.connected:
            self.client_id = None
        if await self._connection.ready():
            self.client_id = await self._connection.call("CLIENT", "ID")
        return await self._connection.call(*args)

    async def unblock(self) -> None:
        """End its blocking read, if there is one."""
        if self.client_id is not None:
            await self._control.client_unblock(self.client_id)

    async def close(self) -> None:
        """Close the connection."""
        with suppress(redis_errors.RedisError, OSError):
            await self._connection.close()


class CommandConnection:
    """One connection, one command at a time.

    Args:
        connection: not connected yet; its own ``socket_timeout`` bounds the handshake.
        limit: seconds a command may take; then the connection is closed, because the reply may still arrive.
    """

    def __init__(self, connection: aioredis.Connection, limit: float) -> None:
        self._connection = connection
        self._handshake = connection.socket_timeout
        self._limit = limit

    @property
    def connected(self) -> bool:
        """Whether the connection is open, as far as it is known."""
        return bool(self._connection.is_connected)

    async def ready(self) -> bool:
        """Connect if needed, also where the server closed the idle connection; True if the connection is new."""
        connection = self._connection
        if connection.is_connected:
            try:
                if not await connection.can_read():  # nothing can be readable but its end
                    return False
            except (redis_errors.ConnectionError, OSError):
                pass
            await connection.disconnect(nowait=True)
        connection.socket_timeout = self._handshake
        await connection.connect()
        connection.socket_timeout = None  # from here on `call` bounds the whole exchange
        return True

    async def call(self, *args: Any) -> Any:
        """Send one command on the ready connection, which is closed on any error but the server's own.

        Raises:
            redis.exceptions.ResponseError: the server refused the command.
            redis.exceptions.ConnectionError: the connection broke; the command may have been executed.
            redis.exceptions.TimeoutError: no reply in time; the command may have been executed.
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


class CommandPool:
    """A few connections; a command waits until one is free.

    Args:
        make: makes a connection.
        size: most connections.
        limit: seconds a command may take.
    """

    def __init__(self, make: Callable[[], aioredis.Connection], size: int, limit: float) -> None:
        self._make = make
        self._limit = limit
        self._free = asyncio.Semaphore(size)
        self._idle: list[CommandConnection] = []
        self._closed = False

    async def execute_command(self, *args: Any, **_: Any) -> Any:
        """Send one command and return its raw reply. Raises what `CommandConnection.call` raises."""
        async with self._free:
            connection = self._idle.pop() if self._idle else CommandConnection(self._make(), self._limit)
            try:
                await connection.ready()
                return await connection.call(*args)
            finally:
                if self._closed:
                    await connection.close()
                else:
                    self._idle.append(connection)

    async def disconnect(self) -> None:
        """Close the idle connections; the next commands make new ones."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.close()

    async def aclose(self) -> None:
        """Close all connections, those in use after their command."""
        self._closed = True
        await self.disconnect()


class _Bounded:
    """Bounds its writes by ``asyncio.timeout``."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        here: Any = self
        if not here.is_connected:
            await here.connect()
        limit = here.socket_timeout
        if limit is None:  # the hot path: `CommandConnection` bounds the whole exchange
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
            return
        here.socket_timeout = None  # a connection has one user at a time
        try:
            async with asyncio.timeout(limit):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except TimeoutError:
            raise redis_errors.TimeoutError("Timeout writing to socket") from None
        finally:
            here.socket_timeout = limit


class TcpConnection(_Bounded, aioredis.Connection):
    """A connection over TCP."""


class TlsConnection(_Bounded, aioredis.SSLConnection):
    """A connection over TLS."""


class UnixConnection(_Bounded, aioredis.UnixDomainSocketConnection):
    """A connection over a Unix socket."""
