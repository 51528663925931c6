"""Options of libpq in DATABASE_URL, translated for asyncpg, which knows fewer of them.

asyncpg sends options that it does not know to the server as settings, and the server refuses libpq's own. This module
applies some of them itself (``connect_timeout``, ``keepalives…``, ``tcp_user_timeout``), drops those that ask for what
happens anyway (``channel_binding=prefer``), and refuses the others by name. Settings of the server
(``?statement_timeout=5000``) are passed on.
Source: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import asyncpg
import msgspec

from streamworker.errors import ConfigurationError

_ASIDE: Final = {
    "channel_binding": ("disable", "prefer"),
    "client_encoding": ("auto", "utf8", "utf-8", "unicode"),
    "gssdelegation": ("0",),
    "gssencmode": ("disable", "prefer"),
    "load_balance_hosts": ("disable",),
    "requiressl": ("0",),
    "sslcertmode": ("allow", "disable"),
    "sslcompression": ("0",),
    "sslsni": ("0", "1"),
}
"""Options of libpq, and their values that ask for what asyncpg does anyway."""
_LACKING: Final = frozenset(
    {
        "hostaddr", "max_protocol_version", "min_protocol_version", "oauth_client_id", "oauth_issuer",
        "replication", "require_auth", "requirepeer", "scram_client_key", "scram_server_key", "sslcrldir",
        "sslkeylogfile",
    }
)  # fmt: skip
_FILES: Final = ("sslcert", "sslcrl", "sslkey", "sslrootcert")
_SOCKET: Final = {
    "keepalives_idle": (socket.IPPROTO_TCP, "TCP_KEEPIDLE"),
    "keepalives_interval": (socket.IPPROTO_TCP, "TCP_KEEPINTVL"),
    "keepalives_count": (socket.IPPROTO_TCP, "TCP_KEEPCNT"),
    "tcp_user_timeout": (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT"),
}


class Dsn(msgspec.Struct, frozen=True):
    """A parsed DATABASE_URL.

    Attributes:
        url: for asyncpg.
        timeout: seconds a connection may take to be made; ``None`` if the URL does not set it.
        socket_options: (level, option, value) for each connection's socket.
    """

    url: str
    timeout: float | None = None
    socket_options: tuple[tuple[int, int, int], ...] = ()


def parse(url: str) -> Dsn:
    """Parse a URL.

    Raises:
        ConfigurationError: an option asks for what asyncpg cannot do, or is not a number.
    """
    base, _, query = url.partition("?")
    rest, timeout = [], None
    options: list[tuple[int, int, int]] = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "connect_timeout":
            timeout = float(max(2, _whole(name, value))) if _whole(name, value) > 0 else None  # as libpq: 2 at least
        elif name == "keepalives":
            options.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(bool(_whole(name, value)))))
        elif name in _SOCKET:
            level, option = _SOCKET[name]
            if _whole(name, value) > 0 and hasattr(socket, option):
                options.append((level, getattr(socket, option), _whole(name, value)))
        elif name in _LACKING or (name in _ASIDE and value.lower() not in _ASIDE[name]):
            raise ConfigurationError(
                f"DATABASE_URL has {name}={value}, which the driver (asyncpg) cannot do: remove it"
                + (f", or write {' or '.join(_ASIDE[name])}" if name in _ASIDE else "")
            )
        elif name in _FILES and value != "system":
            _readable(name, value)
            rest.append((name, value))
        elif name not in _ASIDE and name != "fallback_application_name":
            rest.append((name, value))
    return Dsn(base + (f"?{urlencode(rest)}" if rest else ""), timeout, tuple(options))


async def connect(url: str, *, timeout: float, **options: Any) -> Any:
    """One connection with the options of the URL.

    Args:
        url: in libpq's form.
        timeout: seconds it may take, unless the URL has ``connect_timeout``.
        options: asyncpg's.

    Raises:
        ConfigurationError: see `parse`.
    """
    dsn = parse(url)
    connection = await asyncpg.connect(dsn.url, timeout=dsn.timeout or timeout, **options)
    if dsn.socket_options:
        transport = getattr(connection, "_transport", None)
        line = transport.get_extra_info("socket") if transport is not None else None
        for option in dsn.socket_options:
            with suppress(OSError, AttributeError):  # a Unix socket has none of them
                line.setsockopt(*option)  # type: ignore[union-attr]
    return connection


def _readable(name: str, path: str) -> None:
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise ConfigurationError(
            f"DATABASE_URL has {name}={path}, which cannot be read ({error.strerror}): mount the file there, or "
            "correct the path"
        ) from None


def _whole(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigurationError(f"DATABASE_URL has {name}={value}: write a whole number") from None
