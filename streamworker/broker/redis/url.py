"""Forms of REDIS_URL: a server, a socket, a master behind Sentinels, a cluster; with TLS or without.

::

    redis://[user:password@]host:6379[/db]                rediss://… the same over TLS
    unix://[user:password@]/path[?db=N]
    redis+sentinel://[user:password@]host:26379[,host:port…]/SERVICE[/db][?sentinel_username=…&sentinel_password=…]
    redis+cluster://[user:password@]host:6379[,host:port…]
    rediss+sentinel://…  rediss+cluster://…               TLS to every node, and to the Sentinels

Options of TLS are in the query, under redis-py's names: ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``,
``ssl_password``, ``ssl_check_hostname``, ``ssl_cert_reqs`` and their like. Other options of redis-py
(``socket_timeout``, ``max_connections``, …) apply to ``ctx.redis``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import parse_qsl, unquote, urlencode

import msgspec
import redis
import redis.asyncio as aioredis
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.connection import parse_url
from redis.exceptions import ConnectionError as RedisConnectionError

from streamworker.errors import ConfigurationError

Host: TypeAlias = tuple[str, int]

SENTINEL_PORT: Final = 26379
REDIS_PORT: Final = 6379

_URL: Final = re.compile(
    r"(?P<scheme>rediss?)\+(?P<kind>sentinel|cluster)://(?:(?P<user>[^/?#]*)@)?(?P<hosts>[^/?#]*)"
    r"(?P<path>/[^?#]*)?(?:\?(?P<query>.*))?"
)
_HOST: Final = re.compile(r"(?P<host>\[[^\]]+\]|[^\[\]:]+)?(?::(?P<port>\d+))?")
_LOGIN: Final = frozenset({"db", "username", "password", "credential_provider"})
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path")
_TLS: Final = frozenset(n for n in inspect.signature(aioredis.SSLConnection.__init__).parameters if "ssl_" in n)
_CERT_REQS: Final = ("none", "optional", "required")
CLIENT: Final = frozenset(
    {
        "client_name", "decode_responses", "encoding", "encoding_errors", "health_check_interval", "lib_name",
        "lib_version", "max_connections", "protocol", "retry_on_timeout", "socket_connect_timeout", "socket_keepalive",
        "socket_read_size", "socket_timeout", "timeout",
    }
)  # fmt: skip
"""Options of the client for handlers; our own connections have fixed ones."""


class NotExecuted(RedisConnectionError):
    """The server is not the master any more and executed nothing: the command may be sent again."""


class RedisUrl(msgspec.Struct, frozen=True):
    """A parsed REDIS_URL.

    Attributes:
        kind: topology.
        scheme: transport.
        hosts: the server, the Sentinels, or the nodes to ask for the others.
        options: options of redis-py's connections: login, database, path, TLS.
        service: the name under which Sentinels know the master.
        sentinel_options: the same as ``options`` for connections to Sentinels.
        client: further options of the client for handlers.
    """

    kind: Literal["server", "sentinel", "cluster"]
    scheme: Literal["redis", "rediss", "unix"]
    hosts: tuple[Host, ...]
    options: dict[str, Any]
    service: str = ""
    sentinel_options: dict[str, Any] = {}
    client: dict[str, Any] = {}

    def __str__(self) -> str:
        """Without passwords."""
        if self.scheme == "unix":
            return f"unix://{self.options.get('path')}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        db = self.options.get("db", 0)
        if self.kind == "server":
            return f"{self.scheme}://{hosts}/{db}"
        return f"{self.scheme}+{self.kind}://{hosts}" + (f"/{self.service}/{db}" if self.service else "")

    @property
    def place(self) -> tuple[str, ...]:
        """What two URLs of one database and one user have in common."""
        return str(self), *(str(self.options.get(option) or "") for option in ("username", "password"))


def parse(url: str) -> RedisUrl:
    """Parse a URL.

    Raises:
        ConfigurationError: it cannot be understood, or names a file that cannot be read.
    """
    match = _URL.fullmatch(url)
    try:
        form = _server(url) if match is None else _several(match)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"REDIS_URL cannot be understood: {error}") from None
    for name in _FILES:
        _readable(name, form.options.get(name))
    return form


def of(client: Any) -> RedisUrl:
    """The URL of a user's client: of a server, a master behind Sentinels or a cluster.

    Raises:
        ConfigurationError: the client is of an unknown kind.
    """
    if isinstance(client, aioredis.RedisCluster):
        nodes = client.nodes_manager.startup_nodes.values()
        given = client.connection_kwargs
        scheme: Literal["redis", "rediss"] = "rediss" if _secure(given.get("connection_class")) else "redis"
        hosts = tuple((str(node.host), int(node.port)) for node in nodes)
        return RedisUrl("cluster", scheme, hosts, _kept(given))
    pool = client.connection_pool if isinstance(client, aioredis.Redis) else None
    given = pool.connection_kwargs if pool is not None else {}
    if isinstance(pool, SentinelConnectionPool):
        asked = [each.connection_pool.connection_kwargs for each in pool.sentinel_manager.sentinels]
        hosts = tuple((str(each.get("host", "localhost")), int(each.get("port", SENTINEL_PORT))) for each in asked)
        login = {name: value for name, value in (_kept(asked[0]) if asked else {}).items() if name != "db"}
        scheme = "rediss" if _secure(pool.connection_class) else "redis"
        return RedisUrl("sentinel", scheme, hosts, _kept(given), str(pool.service_name), login)
    if pool is None or not {"path", "host"} & given.keys():
        raise ConfigurationError("redis= takes a URL, or redis.asyncio's Redis, RedisCluster or Sentinel.master_for()")
    return _plain(given, pool.connection_class)


def _server(url: str) -> RedisUrl:
    given: dict[str, Any] = dict(parse_url(url))
    kind = given.pop("connection_class", redis.Connection)
    tls = sorted(name for name in given if name.startswith("ssl"))
    if unknown := [name for name in tls if name not in _TLS]:
        raise ValueError(f"there is no option {', '.join(unknown)}; TLS knows {', '.join(sorted(_TLS))}")
    if tls and not _secure(kind):
        raise ValueError(f"{tls[0]} is about TLS, and the URL has none: write rediss:// instead of redis://")
    if "ssl_cert_reqs" in given:
        # Celery and the ssl module of Python call them CERT_NONE and so on.
        word = str(given["ssl_cert_reqs"]).lower().removeprefix("cert_")
        if word not in _CERT_REQS:
            raise ValueError(f"ssl_cert_reqs is one of {', '.join(_CERT_REQS)}")
        given["ssl_cert_reqs"] = word
    if "decode_responses" in given:
        given["decode_responses"] = str(given["decode_responses"]).lower() in ("1", "true", "yes", "on")
    return _plain(given, kind)


def _plain(given: Mapping[str, Any], kind: type[Any]) -> RedisUrl:
    if "Unix" in kind.__name__:
        return RedisUrl("server", "unix", (), {**_kept(given), "path": given.get("path")}, client=_client(given))
    host = (str(given.get("host") or "localhost"), int(given.get("port") or REDIS_PORT))
    return RedisUrl("server", "rediss" if _secure(kind) else "redis", (host,), _kept(given), client=_client(given))


def _several(match: re.Match[str]) -> RedisUrl:
    scheme: Literal["redis", "rediss"] = "rediss" if match["scheme"] == "rediss" else "redis"
    hosts = tuple(
        _host(text, SENTINEL_PORT if match["kind"] == "sentinel" else REDIS_PORT) for text in match["hosts"].split(",")
    )
    query = parse_qsl(match["query"] or "", keep_blank_values=True)
    user = f"{match['user']}@" if match["user"] is not None else ""
    asked = {name: value for name, value in query if name.startswith("sentinel_")}
    rest = urlencode([(name, value) for name, value in query if name not in asked])
    # redis-py reads login and query as it does everywhere else; hosts and path are ours.
    plain = _server(f"{scheme}://{user}localhost/?{rest}")
    given = plain.options
    path = [unquote(part) for part in (match["path"] or "").strip("/").split("/") if part]
    if match["kind"] == "cluster":
        if path not in ([], ["0"]) or given.get("db"):
            raise ValueError("a cluster has no databases but 0")
        options = {name: value for name, value in given.items() if name != "db"}
        return RedisUrl("cluster", scheme, hosts, options, client=plain.client)
    if not path or len(path) > 2 or (len(path) == 2 and not path[1].isdigit()):
        raise ValueError(
            "after the Sentinels comes the name of their master, as in redis+sentinel://host:26379/mymaster/0"
        )
    unknown = asked.keys() - {"sentinel_username", "sentinel_password"}
    if unknown:
        raise ValueError(f"there is no option {', '.join(sorted(unknown))}")
    login = {name.removeprefix("sentinel_"): value for name, value in asked.items()}
    tls = {name: value for name, value in given.items() if name in _TLS}
    if len(path) == 2:
        given = {**given, "db": int(path[1])}
    return RedisUrl("sentinel", scheme, hosts, given, path[0], {**tls, **login}, plain.client)


def _host(text: str, port: int) -> Host:
    match = _HOST.fullmatch(text.strip())
    if match is None or not match["host"]:
        raise ValueError("hosts are separated by commas, each with or without :port")
    return unquote(match["host"]).strip("[]"), int(match["port"] or port)


def _kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of login and TLS; pools and retries are ours."""
    return {name: value for name, value in given.items() if (name in _LOGIN or name in _TLS) and value is not None}


def _client(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in CLIENT and value is not None}


def _secure(kind: Any) -> bool:
    return "SSL" in getattr(kind, "__name__", "")


def _readable(name: str, path: Any) -> None:
    if not isinstance(path, str):
        return
    try:
        if name == "ssl_ca_path":
            next(Path(path).iterdir(), None)
        else:
            Path(path).open("rb").close()
    except OSError as error:
        raise ConfigurationError(
            f"REDIS_URL has {name}={path}, which cannot be read ({error.strerror}): mount the file there, or correct "
            "the path"
        ) from None
