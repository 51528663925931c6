"""Connections: for blocking reads, a pool for commands, and to a master behind Sentinels.

The Sentinels are asked for its address at every connect. Only the connection classes know of them: pools, clients and
the reader are those of a single server. After a failover Sentinel closes the connections of the old master; a
connection that is answered READONLY closes itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

import anyio
import hiredis
import redis.asyncio as aioredis
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from streamworker.broker.redis.url import Host, NotExecuted, RedisUrl
from streamworker.errors import ConfigurationError

CLOSES: Final = 1.0
"""Most seconds that a connection may take to close; then its socket is left to the system."""


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
        connection: not connected yet; its own timeouts bound connecting and the handshake, if they are below the limit.
        limit: seconds a command may take; then the connection is closed, because the reply may still arrive.
    """

    def __init__(self, connection: aioredis.Connection, limit: float) -> None:
        self._connection = connection
        self._handshake = min(connection.socket_timeout or limit, limit)
        connection.socket_connect_timeout = min(connection.socket_connect_timeout or limit, limit)
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

    async def end(self) -> None:
        """Close the connection, and wait for that: TLS says good-bye."""
        with suppress(redis_errors.RedisError, OSError), anyio.move_on_after(CLOSES):
            await self._connection.disconnect()


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
        """Close all connections, those in use after their command; the event loop may end after that."""
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.end()


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


SENTINEL_TIMEOUT: Final = 1.0
"""Seconds one Sentinel may take: the others are asked after it."""
_ASK: Final = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME")


class Sentinels:
    """The Sentinels of one service; the one that answered last is asked first.

    Args:
        url: a url of the kind "sentinel".
    """

    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._hosts = list(url.hosts)
        self._options: dict[str, Any] = {
            **url.sentinel_options,
            "protocol": 2,
            "socket_connect_timeout": SENTINEL_TIMEOUT,
            "socket_timeout": SENTINEL_TIMEOUT,
        }

    async def master(self) -> Host:
        """Address of the master.

        Raises:
            ConnectionError: no Sentinel answers.
            ConfigurationError: what answers is no Sentinel, refuses us, or knows no such master.
        """
        kind: Any = TlsConnection if self._url.scheme == "rediss" else TcpConnection
        search = _Search(self._url, self._hosts)
        for host, port in search:
            connection = kind(host=host, port=port, retry=Retry(NoBackoff(), 0), **self._options)
            try:
                await connection.connect()
                await connection.send_command(*_ASK, self._url.service)
                search.answered(await connection.read_response())
            except (redis_errors.RedisError, OSError) as error:
                search.failed(error)
            finally:
                await connection.disconnect(nowait=True)
        return search.found()


class _Search:
    """One round over the Sentinels, until one of them knows the master."""

    def __init__(self, url: RedisUrl, hosts: list[Host]) -> None:
        self._url = url
        self._hosts = hosts
        self._at: Host = hosts[0]
        self._master: Host | None = None
        self._unknown = False
        self._refusal: Exception | None = None
        self._silence: Exception | None = None

    def __iter__(self) -> Iterator[Host]:
        for host in list(self._hosts):  # a copy: the lease thread may change their order meanwhile
            self._at = host
            yield host
            if self._master is not None:
                return

    def answered(self, reply: Any) -> None:
        if not reply:
            self._unknown = True
            return
        host, port = reply
        self._master = (host.decode() if isinstance(host, bytes) else str(host), int(port))
        self._hosts[:] = [self._at, *(each for each in self._hosts if each != self._at)]

    def failed(self, error: Exception) -> None:
        if isinstance(error, redis_errors.ResponseError | redis_errors.AuthenticationError):
            self._refusal = error
        else:
            self._silence = error

    def found(self) -> Host:
        if self._master is not None:
            return self._master
        if self._unknown:
            raise ConfigurationError(
                f"the Sentinels of {self._url} know no master named {self._url.service!r}: check the name after the "
                "hosts in REDIS_URL"
            )
        if isinstance(self._refusal, redis_errors.AuthenticationError | redis_errors.NoPermissionError):
            raise ConfigurationError(
                f"the Sentinels of {self._url} refused the login ({self._refusal}): check sentinel_username and "
                "sentinel_password in REDIS_URL"
            )
        if self._refusal is not None:
            raise ConfigurationError(
                f"what answers at {self._url} is no Sentinel ({self._refusal}): name the Sentinels in REDIS_URL, or "
                "write redis:// for a server"
            )
        # By the word "connecting" the publisher knows that nothing was sent.
        raise redis_errors.ConnectionError(f"no Sentinel answers, last error connecting to one: {self._silence}")


class _Managed:
    """An async connection whose host is asked for when it connects."""

    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        super().__init__(**options)
        self._sentinels = sentinels

    async def connect(self) -> None:
        here: Any = self
        if not here.is_connected:
            here.host, here.port = await self._sentinels.master()
        await super().connect()  # type: ignore[misc]

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except redis_errors.ReadOnlyError as error:
            here: Any = self
            await here.disconnect(nowait=True)
            raise NotExecuted(f"{here.host}:{here.port} is not the master any more") from error


class ManagedConnection(_Managed, TcpConnection):
    """To the master."""


class ManagedSSLConnection(_Managed, TlsConnection):
    """To the master, over TLS."""
