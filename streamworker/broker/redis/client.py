"""Clients of Redis for each purpose.

Three kinds, never mixed: commands (a pool), one reader that may block, and one connection of the lease thread. None
retries by itself: redis-py's default of ten retries runs an XADD twice when a reply is lost.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Iterable
from functools import cache
from typing import Any, Final

import msgspec
import redis
import redis.asyncio as aioredis
from redis import exceptions as redis_errors
from redis.asyncio import connection as redis_connection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo

from streamworker.broker.keys import home_name
from streamworker.broker.redis import connection
from streamworker.broker.redis import url as urls
from streamworker.broker.redis.cluster import ClusterClient, ClusterReader, ClusterSlots, PartitionServers
from streamworker.broker.redis.connection import (
    CommandConnection,
    CommandPool,
    ManagedConnection,
    ManagedSSLConnection,
    Reader,
    Sentinels,
)
from streamworker.broker.redis.reactions import CLUSTER, _short, clustered
from streamworker.broker.redis.url import Host, RedisUrl
from streamworker.errors import ConfigurationError, NoConnection

COMMAND_TIMEOUT: Final = 5.0
"""Seconds a command may take before its connection is given up."""
BLOCK_SLACK: Final = 5.0
"""Seconds a blocking read may exceed its BLOCK: servers are late by up to 0.1 s, half-open connections for ever."""
POOL_SIZE: Final = 16
POOL_TIMEOUT: Final = 30.0
"""Seconds a handler waits for a connection of ``ctx.redis``, unless the URL has ``timeout``."""
BLOCKING: Final = frozenset(
    {
        "BLMOVE", "BLMPOP", "BLPOP", "BRPOP", "BRPOPLPUSH", "BZMPOP", "BZPOPMAX", "BZPOPMIN", "WAIT", "WAITAOF",
        "XREAD", "XREADGROUP",
    }
)  # fmt: skip
"""Commands that may block on purpose; they end with their job."""

_ASYNC: Final[dict[str, Any]] = {
    "redis": connection.TcpConnection,
    "rediss": connection.TlsConnection,
    "unix": connection.UnixConnection,
}
_MANAGED: Final[dict[str, Any]] = {"redis": ManagedConnection, "rediss": ManagedSSLConnection}


class RedisAddress:
    """Address of the server and login; makes every kind of client. The only place that knows the forms of URLs.

    Args:
        url: see `streamworker.broker.redis.url`.
        name: client name shown by CLIENT LIST.

    Raises:
        ConfigurationError: the URL cannot be understood.
    """

    def __init__(self, url: str, name: str = "streamworker") -> None:
        self._init(urls.parse(url), name)

    def _init(self, url: RedisUrl, name: str) -> None:
        self._url = url
        self._name = _shown(name)
        self._async = _ASYNC[url.scheme]
        self._kwargs = dict(url.options)
        if url.kind == "sentinel":
            self._async = _MANAGED[url.scheme]
            self._kwargs["sentinels"] = Sentinels(url)
        elif url.hosts:
            self._kwargs["host"], self._kwargs["port"] = url.hosts[0]
        self._slots: ClusterSlots | PartitionServers | None = ClusterSlots(url) if url.kind == "cluster" else None
        self._servers: dict[Host, RedisAddress] = {}
        if url.scheme == "rediss":
            _check_tls(url.options)

    @classmethod
    def of(cls, client: object, name: str = "streamworker") -> RedisAddress:
        """The address a user's client talks to.

        Raises:
            ConfigurationError: the client is of an unknown kind.
        """
        address = cls.__new__(cls)
        address._init(urls.of(client), name)
        return address

    def renamed(self, name: str) -> RedisAddress:
        """The same address with another client name."""
        other = RedisAddress.__new__(RedisAddress)
        other.__dict__.update(self.__dict__)
        other._name = _shown(name)
        return other

    def spread_over(self, partitions: Iterable[tuple[str, int, tuple[str, ...]]]) -> RedisAddress:
        """The same address, with partitions on other servers.

        Args:
            partitions: (queue, number of partitions, URL of the server of each behind the first) by the settings.

        Raises:
            ConfigurationError: this is the address of a cluster, or a URL cannot be understood.
        """
        urls = {home_name(queue, number): url for queue, _, more in partitions for number, url in enumerate(more, 1)}
        if not urls:
            return self
        if self._slots is not None:
            raise ConfigurationError(
                "partitions of a cluster are spread by their slots: set a number in STREAMWORKER_PARTITIONS, not URLs"
            )
        main = (str(self), 0)
        hosts, other = {self._url.place: main}, self.renamed(self._name)
        other._servers = {main: self}
        of_url = {}
        for url in dict.fromkeys(urls.values()):
            each = RedisAddress(url, self._name)
            # By what a URL means: two readings of one server would be two blocking reads there.
            of_url[url] = hosts.setdefault(each._url.place, (str(each), len(hosts)))
            other._servers.setdefault(of_url[url], each)
        other._slots = PartitionServers(main, {home: of_url[url] for home, url in urls.items()})
        return other

    @property
    def given(self) -> bool:
        """Whether partitions are on other servers, see `spread_over`."""
        return bool(self._servers)

    def slot(self, key: str) -> int:
        """The slot of a key; keys of one slot are on one server, for good."""
        return self._slots.slot(key) if self._slots is not None else 0

    def __str__(self) -> str:
        """Without the password."""
        return str(self._url)

    @property
    def spread(self) -> bool:
        """Whether queues are on different servers, so that no command may touch two of them."""
        return self._slots is not None

    def home(self, key: str) -> Host | None:
        """The node that serves a key, as far as it is known; ``None`` for a single server."""
        return self._slots.node(self._slots.slot(key)) if self._slots is not None else None

    def at(self, host: Host) -> RedisAddress:
        """One node of the cluster, or one of the servers."""
        if host in self._servers:
            return self._servers[host].renamed(self._name)
        other = self.renamed(self._name)
        other._slots = None
        other._url = msgspec.structs.replace(self._url, kind="server", hosts=(host,))
        other._kwargs = {**self._kwargs, "host": host[0], "port": host[1]}
        return other

    def bare(self) -> dict[str, Any] | None:
        """Hosts, TLS and login for a program without redis-py, as JSON values.

        Returns:
            ``None`` where only redis-py can connect: credential providers, OCSP.
        """
        url = self._url
        told = _bare(url.scheme, url.options)
        if told is None or url.scheme == "unix":
            return told
        if url.kind == "sentinel":
            asked = _bare(url.scheme, url.sentinel_options)
            if asked is None:
                return None
            return {**told, "sentinels": {**asked, "hosts": url.hosts, "service": url.service}}
        return {**told, "host": url.hosts[0][0], "port": url.hosts[0][1]}

    def _options(self) -> dict[str, Any]:
        return {
            **self._kwargs,
            "client_name": self._name,
            "protocol": 2,  # replies come as the scripts return them, without the client's reshaping
            "socket_connect_timeout": COMMAND_TIMEOUT,
            "health_check_interval": 0,
            "driver_info": _driver(),
        }

    def commands(self, size: int = POOL_SIZE) -> aioredis.Redis:
        """A client with a pool, per node in a cluster; waits for a free connection instead of failing."""
        if self._slots is not None:
            return ClusterClient(self._slots, lambda host: self.at(host).commands(size))
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
        """A client for a subscription: it may stay silent, and TCP keepalive notices a dead peer."""
        if self._servers:
            return self.at((str(self), 0)).listener()
        if self._slots is not None:  # a cluster passes messages on to all its nodes
            return self.at(random.choice(self._slots.masters or self._slots.candidates())).listener()  # noqa: S311
        pool = aioredis.ConnectionPool(
            connection_class=self._async,
            max_connections=1,
            socket_timeout=None,
            retry=Retry(NoBackoff(), 0),
            **self._options(),
        )
        return aioredis.Redis.from_pool(pool)

    def reader(self, block: float, control: aioredis.Redis, key: str = "") -> Reader | ClusterReader:
        """The connection for blocking reads of up to ``block`` seconds.

        Args:
            block: seconds.
            control: a client made by `commands`, to unblock it with.
            key: in a cluster, whose slot it reads.
        """
        if self._slots is not None and isinstance(control, ClusterClient):
            client = control
            return ClusterReader(client, self._slots, key, lambda host: self.at(host)._reader(block, client.at(host)))
        return self._reader(block, control)

    def _reader(self, block: float, control: aioredis.Redis) -> Reader:
        return Reader(CommandConnection(self._connection(), block + BLOCK_SLACK), control)

    def pool(
        self, size: int = POOL_SIZE, *, limit: float = COMMAND_TIMEOUT, probes: bool = True
    ) -> CommandPool | ClusterClient:
        """Pool for the commands of the hot path, per node in a cluster.

        Args:
            size: most connections, per node.
            limit: seconds a command may take, `COMMAND_TIMEOUT` at most.
            probes: see `ClusterClient`.
        """
        if self._slots is not None:
            return ClusterClient(
                self._slots, lambda host: self.at(host).commands(size), lambda host: self.at(host)._pool(size, limit),
                probes=probes,
            )  # fmt: skip
        return self._pool(size, limit)

    def _pool(self, size: int, limit: float) -> CommandPool:
        return CommandPool(self._connection, size, min(limit, COMMAND_TIMEOUT))

    def _connection(self) -> aioredis.Connection:
        connection: aioredis.Connection = self._async(
            socket_timeout=COMMAND_TIMEOUT, retry=Retry(NoBackoff(), 0), **self._options()
        )
        return connection

    def for_handlers(self, size: int) -> Any:
        """A client for handlers, with the options of the URL; in a cluster redis-py's own, which knows all commands.

        Args:
            size: most connections, unless the URL has ``max_connections``.
        """
        if self._servers:
            return self.at((str(self), 0)).for_handlers(size)
        said = {"client_name": self._name, "max_connections": size, **self._url.client}
        if self._slots is not None:
            nodes = [ClusterNode(host, port) for host, port in self._url.hosts]
            kept = {name: value for name, value in self._kwargs.items() if name not in ("host", "port")}
            known = inspect.signature(aioredis.RedisCluster.__init__).parameters
            options = {"socket_timeout": None, **{name: value for name, value in said.items() if name in known}}
            return aioredis.RedisCluster(startup_nodes=nodes, ssl=self._url.scheme == "rediss", **kept, **options)
        options = {"timeout": POOL_TIMEOUT, "socket_connect_timeout": COMMAND_TIMEOUT, "protocol": 2, **said}
        if options.pop("retry_on_timeout", False):
            options["retry"], options["retry_on_error"] = Retry(NoBackoff(), 1), [redis_errors.TimeoutError]
        patient = "socket_timeout" not in options
        if patient:
            options["socket_timeout"] = COMMAND_TIMEOUT
        options.setdefault("retry", Retry(NoBackoff(), 0))
        pool = HandlersPool(connection_class=self._async, **{**self._kwargs, **options})
        return (HandlersRedis if patient else aioredis.Redis).from_pool(pool)

    async def masters(self, client: aioredis.Redis) -> list[aioredis.Redis]:
        """A client for each server that holds keys."""
        return await client.masters() if isinstance(client, ClusterClient) else [client]

    async def greet(self, client: aioredis.Redis) -> dict[str, Any]:
        """INFO's section "server".

        Raises:
            ConfigurationError: it is a node of a cluster, and the URL is not that of one.
        """
        info: dict[str, Any] = await client.info("server")
        if not isinstance(self._slots, ClusterSlots) and clustered(info):
            raise ConfigurationError(CLUSTER.format(self))
        return info


def _bare(scheme: str, options: dict[str, Any]) -> dict[str, Any] | None:
    known = redis.SSLConnection(**{name: value for name, value in options.items() if name.startswith("ssl_")})
    if options.get("credential_provider") or known.ssl_validate_ocsp or known.ssl_validate_ocsp_stapled:
        return None
    password = options.get("password")
    auth = [word for word in (options.get("username"), password) if word] if password else []
    told: dict[str, Any] = {"auth": auth, "db": options.get("db", 0), "path": options.get("path")}
    if scheme == "rediss":
        told["tls"] = {
            "check_hostname": known.check_hostname,
            "cert_reqs": int(known.cert_reqs),
            "certfile": known.certfile,
            "keyfile": known.keyfile,
            "password": known.certificate_password,
            "ca_certs": known.ca_certs,
            "ca_path": known.ca_path,
            "ca_data": known.ca_data,
            "min_version": int(known.ssl_min_version) if known.ssl_min_version else 0,
            "ciphers": known.ssl_ciphers,
        }
    return told


class HandlersPool(aioredis.BlockingConnectionPool):
    """redis-py's pool, whose timeout names what was waited for."""

    async def get_connection(self, *_: Any, **__: Any) -> Any:
        """A connection, when one is free.

        Raises:
            NoConnection: none was.
        """
        began, taken = time.monotonic(), not self.can_get_connection()
        try:
            return await super().get_connection()  # type: ignore[no-untyped-call]
        except asyncio.CancelledError as error:
            if taken:
                error.add_note(self._waited(time.monotonic() - began))
            raise
        except redis_errors.ConnectionError as error:
            if not isinstance(error.__cause__, TimeoutError):
                raise
            raise NoConnection(
                f"{self._waited(time.monotonic() - began)}: raise max_connections in REDIS_URL, or use fewer at once"
            ) from error

    def _waited(self, seconds: float) -> str:
        return f"waited {seconds:.1f} s for a connection of ctx.redis ({self.max_connections} connections, all taken)"


class HandlersRedis(aioredis.Redis):
    """redis-py's client; its ``socket_timeout`` does not end commands that block on purpose."""

    async def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        name = command_name.decode() if isinstance(command_name, bytes) else str(command_name)
        if name.upper() not in BLOCKING:
            return await super().parse_response(connection, command_name, **options)
        bound, connection.socket_timeout = connection.socket_timeout, None  # the connection is this command's alone
        try:
            return await super().parse_response(connection, command_name, **options)
        finally:
            connection.socket_timeout = bound


def _check_tls(options: dict[str, Any]) -> None:
    """Check certificates, ciphers and flags before the first connection.

    Raises:
        ConfigurationError: they cannot.
    """
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    if not tls:
        return
    try:
        redis_connection.SSLConnection(**tls).ssl_context.get()
    except (redis_errors.RedisError, OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the TLS options in REDIS_URL cannot be used ({_short(error)}): check the files and words of "
            f"{', '.join(sorted(tls))}"
        ) from None


@cache
def _driver() -> DriverInfo:
    """Name of the library for CLIENT SETINFO. Without it each connection reads redis-py's metadata: 1 ms."""
    return DriverInfo()


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() and c != " " else "-" for c in name)
