"""Connections to Redis, and what its errors mean to us.

Three kinds, never mixed: commands (a pool), one reader that may block, and a synchronous one for the lease thread. None
retries by itself: redis-py's default of ten retries runs an XADD twice when a reply is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import redis
import redis.asyncio as aioredis
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.retry import Retry as SyncRetry

from streamworker.broker.reactions import Reaction, row_of
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable

COMMAND_TIMEOUT: Final = 5.0
"""Seconds a command may take before its connection is given up."""
BLOCK_SLACK: Final = 5.0
"""Seconds a blocking read may overrun its BLOCK: servers are late by up to 0.1 s, half-open connections for ever."""
POOL_SIZE: Final = 16

_ASYNC: Final[dict[str, Any]] = {
    "redis": aioredis.Connection,
    "rediss": aioredis.SSLConnection,
    "unix": aioredis.UnixDomainSocketConnection,
}
_SYNC: Final[dict[str, Any]] = {
    "redis": redis.Connection,
    "rediss": redis.SSLConnection,
    "unix": redis.UnixDomainSocketConnection,
}
_ADDRESS: Final = frozenset({"host", "port", "db", "username", "password", "path", "credential_provider"})


class Address:
    """Where Redis is and how to log in; makes every kind of client.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        name: client name shown by CLIENT LIST.
    """

    def __init__(self, url: str, name: str = "streamworker") -> None:
        try:
            probe = redis.ConnectionPool.from_url(url)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"REDIS_URL cannot be understood: {error}") from None
        self._init(probe.connection_kwargs, probe.connection_class, name)

    def _init(self, kwargs: Mapping[str, Any], kind: type[Any], name: str) -> None:
        self._kwargs = {k: v for k, v in kwargs.items() if (k in _ADDRESS or k.startswith("ssl_")) and v is not None}
        self._scheme = "unix" if "Unix" in kind.__name__ else "rediss" if "SSL" in kind.__name__ else "redis"
        self._name = "".join(c if c.isprintable() and c != " " else "-" for c in name)

    @classmethod
    def of(cls, client: object, name: str = "streamworker") -> Address:
        """The address a user's client talks to."""
        pool = client.connection_pool if isinstance(client, aioredis.Redis) else None
        if pool is None or not {"path", "host"} & pool.connection_kwargs.keys():
            raise ConfigurationError(
                "redis= takes a redis.asyncio.Redis of one server: for Sentinel or a cluster give the URL instead"
            )
        address = cls.__new__(cls)
        address._init(pool.connection_kwargs, pool.connection_class, name)
        return address

    def renamed(self, name: str) -> Address:
        """The same address with another client name."""
        other = Address.__new__(Address)
        other.__dict__.update(self.__dict__)
        other._name = "".join(c if c.isprintable() and c != " " else "-" for c in name)
        return other

    def __str__(self) -> str:
        """Without the password."""
        if self._scheme == "unix":
            return f"unix://{self._kwargs.get('path')}"
        host, port = self._kwargs.get("host", "localhost"), self._kwargs.get("port", 6379)
        return f"{self._scheme}://{host}:{port}/{self._kwargs.get('db', 0)}"

    def _options(self) -> dict[str, Any]:
        return {
            **self._kwargs,
            "client_name": self._name,
            "protocol": 2,  # replies come as the scripts return them, without the client's reshaping
            "socket_connect_timeout": COMMAND_TIMEOUT,
            "health_check_interval": 0,
        }

    def commands(self, size: int = POOL_SIZE) -> aioredis.Redis:
        """A client with a pool; waits for a free connection instead of failing."""
        pool = aioredis.BlockingConnectionPool(
            connection_class=_ASYNC[self._scheme],
            max_connections=size,
            timeout=COMMAND_TIMEOUT,
            socket_timeout=COMMAND_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            **self._options(),
        )
        return aioredis.Redis.from_pool(pool)

    def listener(self) -> aioredis.Redis:
        """A client for a subscription: silence is normal there, and TCP keepalive notices a dead peer."""
        pool = aioredis.ConnectionPool(
            connection_class=_ASYNC[self._scheme],
            max_connections=1,
            socket_timeout=None,
            retry=Retry(NoBackoff(), 0),
            **self._options(),
        )
        return aioredis.Redis.from_pool(pool)

    def blocking(self) -> redis.Redis:
        """A synchronous client with one connection, for the lease thread."""
        pool = redis.ConnectionPool(
            connection_class=_SYNC[self._scheme],
            max_connections=1,
            socket_timeout=COMMAND_TIMEOUT,
            retry=SyncRetry(NoBackoff(), 0),
            **self._options(),
        )
        return redis.Redis(connection_pool=pool)

    def reader(self, block: float) -> Reader:
        """The connection for blocking reads of up to ``block`` seconds."""
        return Reader(self, block)


class Reader:
    """One connection of its own that may block, and knows its client id so that it can be unblocked from elsewhere."""

    def __init__(self, address: Address, block: float) -> None:
        self._connection: aioredis.Connection = _ASYNC[address._scheme](
            socket_timeout=block + BLOCK_SLACK, retry=Retry(NoBackoff(), 0), **address._options()
        )
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

    async def close(self) -> None:
        """Close the connection."""
        with suppress(redis_errors.RedisError, OSError):
            await self._connection.disconnect()


@contextmanager
def understood(address: object) -> Iterator[None]:
    """Turn redis-py's errors into ours, one sentence each, by the table of reactions.

    Raises:
        ConfigurationError: the server refuses us for good: password, permissions, not a usable server.
        Unreachable: nobody answers, no Redis does, or one that can do nothing for us now.
        StreamworkerError: the server refuses a command for another reason.
    """
    try:
        yield
    except (redis_errors.RedisError, OSError) as error:
        raise _ours(error, address) from error


def _ours(error: Exception, address: object) -> StreamworkerError:
    row = row_of(error)
    name, reaction = (row.name, row.reaction) if row is not None else ("", Reaction.REFUSE)
    if name == "WRONGPASS":
        return ConfigurationError(
            f"Redis at {address} refused the login ({error}): check the user and password in REDIS_URL"
        )
    if reaction is Reaction.FATAL:
        return ConfigurationError(
            f"Redis at {address} denies a command this needs ({error}): extend the ACL of this user"
        )
    if name == "LOADING":
        return Unreachable(f"Redis at {address} is still loading its data: try again when it is up")
    if isinstance(error, redis_errors.InvalidResponse):
        return Unreachable(f"what answers at {address} is not Redis: check host and port in REDIS_URL")
    if name == "no connection":
        return Unreachable(
            f"Redis at {address} does not answer ({_short(error)}): check that it runs and that REDIS_URL is right"
        )
    if reaction in (Reaction.WAIT, Reaction.RECONNECT):
        said = str(error) if str(error).startswith(name) else f"{name} {error}"
        return Unreachable(f"Redis at {address} can do nothing for us now ({_short(said)}): it is tried again")
    return StreamworkerError(f"Redis at {address} answered with an error: {error}")


def _short(error: BaseException | str) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) < 200 else text[:200] + "…"
