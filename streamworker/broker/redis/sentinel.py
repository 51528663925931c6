"""Connections to a master behind Sentinels, which are asked for its address at every connect.

Only the connection classes know of Sentinels: pools, clients and the reader are those of a single server. After a
failover Sentinel closes the connections of the old master; a connection that is answered READONLY closes itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from streamworker.broker.redis import connection as connections
from streamworker.broker.redis.url import Host, NotExecuted, RedisUrl
from streamworker.errors import ConfigurationError

TIMEOUT: Final = 1.0
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
            "socket_connect_timeout": TIMEOUT,
            "socket_timeout": TIMEOUT,
        }

    async def master(self) -> Host:
        """Address of the master.

        Raises:
            ConnectionError: no Sentinel answers.
            ConfigurationError: what answers is no Sentinel, refuses us, or knows no such master.
        """
        kind: Any = connections.TlsConnection if self._url.scheme == "rediss" else connections.TcpConnection
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


class ManagedConnection(_Managed, connections.TcpConnection):
    """To the master."""


class ManagedSSLConnection(_Managed, connections.TlsConnection):
    """To the master, over TLS."""
