"""Signed POSTs to addresses that customers chose.

Signatures follow Standard Webhooks (``webhook-id``, ``webhook-timestamp``, ``webhook-signature``), for which
receivers find libraries in every language.

A customer's URL is an attempt to make our network talk to itself, until shown otherwise. So the name is resolved
once, the addresses are checked, and the connection goes to the checked address: a second lookup, which HTTP clients
do on their own, could answer differently (DNS rebinding). Redirects are not followed at all. All that is wanted of
the answer is its status, so a few lines on a socket do, and no library has to be talked out of being helpful.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from time import time
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit

IpAddress: TypeAlias = IPv4Address | IPv6Address
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
Verdict: TypeAlias = Literal["delivered", "again", "never", "gone"]

MAX_HEAD: Final = 16 * 1024
LONGEST_WAIT: Final = 3600.0
# 6to4 and Teredo carry IPv4 addresses inside; everything else outside 2000::/3 is no address of the internet.
_GLOBAL_V6: Final = IPv6Network("2000::/3")
_TUNNELS: Final = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))


class Forbidden(Exception):
    """The URL leads where webhooks must not go; trying again will not help."""


class NoAnswer(Exception):
    """Nobody answered in time, or not in HTTP; trying again may help."""


@dataclass(frozen=True)
class Answer:
    """What the receiver said.

    Attributes:
        status: the HTTP status.
        retry_after: seconds it asks us to wait, if it does.
    """

    status: int
    retry_after: float | None = None

    @property
    def verdict(self) -> Verdict:
        """What to do about it: a receiver that is broken or busy is tried again, one that says no is believed."""
        if 200 <= self.status < 300:
            return "delivered"
        if self.status == 410:
            return "gone"
        return "again" if self.status >= 500 or self.status in (408, 409, 425, 429) else "never"


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: HMAC-SHA256 over id, time and body, so that none can be exchanged.

    Raises:
        ValueError: the secret is not ``whsec_`` and base64.
    """
    kind, _, encoded = secret.partition("_")
    key = base64.b64decode(encoded, validate=True)
    if kind != "whsec" or not key:
        raise ValueError("a webhook's secret is whsec_ and a base64 key")
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def is_public(address: IpAddress) -> bool:
    """Whether an address belongs to the internet, whatever is wrapped in it."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address not in _GLOBAL_V6 or any(address in tunnel for tunnel in _TUNNELS):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


@cache
def _system_authorities() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads some hundred certificates, 30 ms


class WebhookClient:
    """Posts to receivers, one connection each.

    Args:
        allowed: private networks that may be reached all the same.
        timeout: seconds for everything: looking up, connecting, sending, the answer.
        context: how receivers' certificates are checked; the system's authorities unless given.
        resolve: (host, port) to addresses; the system's resolver unless given.
    """

    def __init__(
        self,
        *,
        allowed: Sequence[IPv4Network | IPv6Network] = (),
        timeout: float = 10.0,
        context: ssl.SSLContext | None = None,
        resolve: Resolver | None = None,
    ) -> None:
        self._allowed = tuple(allowed)
        self._timeout = timeout
        self._context = context or _system_authorities()
        self._resolve = resolve or _resolve

    async def post(self, url: str, secret: str, message_id: str, body: bytes) -> Answer:
        """POST a JSON body.

        Args:
            url: the receiver's.
            secret: the receiver's, for the signature.
            message_id: the same at each attempt, by which the receiver knows a repeat.
            body: JSON.

        Raises:
            Forbidden: the URL is none, or leads into a private network.
            NoAnswer: it did not work this time.
        """
        host, port, tls, target = _take_apart(url)
        timestamp = int(time())
        head = (
            f"POST {target} HTTP/1.1\r\nHost: {urlsplit(url).netloc.rpartition('@')[2]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nUser-Agent: mailer\r\nAccept: */*\r\n"
            f"webhook-id: {message_id}\r\nwebhook-timestamp: {timestamp}\r\n"
            f"webhook-signature: {signature(secret, message_id, timestamp, body)}\r\nConnection: close\r\n\r\n"
        )
        try:
            async with asyncio.timeout(self._timeout):
                address = await self._checked(host, port)
                reader, writer = await asyncio.open_connection(
                    address,
                    port,
                    ssl=self._context if tls else None,
                    server_hostname=host if tls else None,
                    limit=MAX_HEAD,
                )
                try:
                    writer.write(head.encode("ascii") + body)
                    # A receiver may answer before it has read everything, and close: its answer counts.
                    with suppress(ConnectionError):
                        await writer.drain()
                    return await _answer(reader)
                finally:
                    writer.transport.abort()
        except TimeoutError:
            raise NoAnswer(f"no answer within {self._timeout:g} s") from None
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ssl.CertificateError) as error:
            raise NoAnswer(f"{type(error).__name__}: {error}"[:500]) from error

    async def _checked(self, host: str, port: int) -> str:
        """The address to connect to. One forbidden address among several is a trap, not an alternative."""
        found = [ip_address(address.partition("%")[0]) for address in await self._resolve(host, port)]
        for address in found:
            if not is_public(address) and not any(address in network for network in self._allowed):
                raise Forbidden(f"{host} is {address}, which is not on the internet: webhooks go nowhere else")
        if not found:
            raise NoAnswer(f"{host} has no address")
        return str(found[0])


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, proto=6)  # TCP
    return [str(entry[4][0]) for entry in found]


def _take_apart(url: str) -> tuple[str, int, bool, str]:
    """(host, port, whether TLS, target) of a URL.

    Raises:
        Forbidden: it is none that a webhook may have.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Forbidden("the URL cannot be read") from None
    plain = url.isascii() and url.isprintable() and " " not in url and "%" not in host
    if parts.scheme not in ("http", "https") or not host or not plain or parts.username or parts.password:
        raise Forbidden("a webhook's URL is https://host/path, in ASCII and without a password")
    tls = parts.scheme == "https"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return host, port or (443 if tls else 80), tls, target


async def _answer(reader: asyncio.StreamReader) -> Answer:
    """The status line and headers of the final answer; what follows them is not read."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, _, rest = head[0].partition(" ")
        code = rest.partition(" ")[0]
        if not version.startswith("HTTP/1.") or not (len(code) == 3 and code.isascii() and code.isdigit()):
            raise NoAnswer("the answer is no HTTP")
        if code.startswith("1"):  # 100 Continue and the like come before the answer
            continue
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        wait = fields.get("retry-after", "")
        # Receivers may also give a date; then our own backoff serves.
        return Answer(int(code), min(float(wait), LONGEST_WAIT) if wait.isdecimal() else None)
