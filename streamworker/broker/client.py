"""Connections to Redis, and what its errors mean to us.

Three kinds, never mixed: commands (a pool), one reader that may block, and a synchronous one for the lease thread. None
retries by itself: redis-py's default of ten retries runs an XADD twice when a reply is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import redis
import redis.asyncio as aioredis
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.retry import Retry as SyncRetry

from streamworker.broker import forms
from streamworker.broker.forms import Form
from streamworker.broker.sentinel import (
    ManagedBlockingConnection,
    ManagedBlockingSSLConnection,
    ManagedConnection,
    ManagedSSLConnection,
    Sentinels,
)
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
_MANAGED: Final[dict[str, Any]] = {"redis": ManagedConnection, "rediss": ManagedSSLConnection}
_MANAGED_SYNC: Final[dict[str, Any]] = {"redis": ManagedBlockingConnection, "rediss": ManagedBlockingSSLConnection}


class Address:
    """Where Redis is and how to log in; makes every kind of client. The one place that knows forms of URLs.

    Args:
        url: see `forms`.
        name: client name shown by CLIENT LIST.

    Raises:
        ConfigurationError: the URL cannot be understood.
    """

    def __init__(self, url: str, name: str = "streamworker") -> None:
        self._init(forms.parse(url), name)

    def _init(self, form: Form, name: str) -> None:
        self._form = form
        self._name = _shown(name)
        self._async, self._sync = _ASYNC[form.scheme], _SYNC[form.scheme]
        self._kwargs = dict(form.options)
        if form.kind == "sentinel":
            self._async, self._sync = _MANAGED[form.scheme], _MANAGED_SYNC[form.scheme]
            self._kwargs["sentinels"] = Sentinels(form)
        elif form.hosts:
            self._kwargs["host"], self._kwargs["port"] = form.hosts[0]

    @classmethod
    def of(cls, client: aioredis.Redis, name: str = "streamworker") -> Address:
        """The address a user's client talks to."""
        address = cls.__new__(cls)
        address._init(forms.of(client), name)
        return address

    def renamed(self, name: str) -> Address:
        """The same address with another client name."""
        other = Address.__new__(Address)
        other.__dict__.update(self.__dict__)
        other._name = _shown(name)
        return other

    def __str__(self) -> str:
        """Without the password."""
        return str(self._form)

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
            connection_class=self._async,
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
            connection_class=self._async,
            max_connections=1,
            socket_timeout=None,
            retry=Retry(NoBackoff(), 0),
            **self._options(),
        )
        return aioredis.Redis.from_pool(pool)

    def blocking(self) -> redis.Redis:
        """A synchronous client with one connection, for the lease thread."""
        pool = redis.ConnectionPool(
            connection_class=self._sync,
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
        self._connection: aioredis.Connection = address._async(
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
    """Turn redis-py's errors into ours, one sentence each.

    Raises:
        ConfigurationError: the server refuses us for good: password, permissions, not a usable server.
        Unreachable: nobody answers, or no Redis does.
        StreamworkerError: the server refuses a command for another reason.
    """
    try:
        yield
    except redis_errors.AuthenticationError as error:
        raise ConfigurationError(
            f"Redis at {address} refused the login ({error}): check the user and password in REDIS_URL"
        ) from error
    except redis_errors.NoPermissionError as error:
        raise ConfigurationError(
            f"Redis at {address} denies a command this needs ({error}): extend the ACL of this user"
        ) from error
    except redis_errors.MovedError as error:
        raise ConfigurationError(
            f"Redis at {address} is a node of a cluster: write redis+cluster:// instead of redis:// in REDIS_URL"
        ) from error
    except redis_errors.BusyLoadingError as error:
        raise Unreachable(f"Redis at {address} is still loading its data: try again when it is up") from error
    except redis_errors.InvalidResponse as error:
        raise Unreachable(f"what answers at {address} is not Redis: check host and port in REDIS_URL") from error
    except (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError) as error:
        _look_at_tls(address, error)
        raise Unreachable(
            f"Redis at {address} does not answer ({_short(error)}): check that it runs and that REDIS_URL is right"
        ) from error
    except redis_errors.ResponseError as error:
        if "ACL failure in script" in str(error) or str(error).startswith("NOPERM"):
            raise ConfigurationError(
                f"Redis at {address} denies a command this needs ({error}): extend the ACL of this user"
            ) from error
        raise StreamworkerError(f"Redis at {address} answered with an error: {error}") from error


def _look_at_tls(address: object, error: Exception) -> None:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        raise ConfigurationError(
            f"the certificate of Redis at {address} is not trusted ({_short(error)}): name the CA that signed it with "
            "ssl_ca_certs in REDIS_URL, and the host as the certificate has it"
        ) from error
    if "CERTIFICATE_REQUIRED" in text:
        raise ConfigurationError(
            f"Redis at {address} wants a client certificate: name it with ssl_certfile and ssl_keyfile in REDIS_URL"
        ) from error


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() and c != " " else "-" for c in name)


def _short(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) < 200 else text[:200] + "…"
