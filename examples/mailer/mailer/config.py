"""Where mail goes and how fast, from the environment: ``MAILER_*``."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Literal, Self, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

Tls: TypeAlias = Literal["implicit", "starttls", "none"]
_SCHEMES: dict[str, tuple[Tls, int]] = {
    "smtps": ("implicit", 465),
    "smtp+starttls": ("starttls", 587),
    "smtp": ("none", 25),
}
_HERE = ("localhost", "127.0.0.1", "::1")


class BadConfig(ValueError):
    """A variable is missing or wrong; the message says what it must be."""


@dataclass(frozen=True)
class Smtp:
    """One SMTP server.

    Attributes:
        tls: ``implicit`` (port 465), ``starttls`` (required, never merely tried), or ``none``, on this machine only.
        ca: a file with the certificate authority to trust instead of the system's.
    """

    host: str
    port: int
    tls: Tls
    username: str | None = None
    password: str | None = None
    ca: str | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """``smtps://user:password@smtp.example.com:465?ca=/etc/ssl/ours.pem``.

        Raises:
            BadConfig: it is no such URL.
        """
        try:
            parts = urlsplit(url)
            tls, port = _SCHEMES[parts.scheme]
            port = parts.port or port
        except (KeyError, ValueError):
            raise BadConfig("MAILER_SMTP_URL must be smtps://user:password@host:465 or smtp+starttls://…:587") from None
        host = parts.hostname or ""
        if not host or (tls == "none" and host not in _HERE):
            raise BadConfig("MAILER_SMTP_URL without TLS is for this machine only: use smtps:// or smtp+starttls://")
        return cls(
            host=host,
            port=port,
            tls=tls,
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            ca=parse_qs(parts.query).get("ca", [None])[0],
        )

    def context(self) -> ssl.SSLContext | None:
        """What its certificate is checked with; ``None`` without TLS."""
        return None if self.tls == "none" else ssl.create_default_context(cafile=self.ca)

    def __repr__(self) -> str:
        return f"Smtp({self.host}:{self.port}, {self.tls})"  # a traceback must not show the password


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the mailer is told.

    Attributes:
        smtp: the server that takes our mail.
        domain: what Message-IDs end with, and where bounces go to (``bounce+…@domain``).
        per_domain: mails a second to one recipient domain, over all workers.
        connections: SMTP connections of one worker.
        webhook_networks: private networks that webhooks may reach all the same, for receivers of our own.
    """

    smtp: Smtp
    domain: str = "localhost"
    per_domain: float = 10.0
    connections: int = 10
    webhook_networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def load(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Read the environment: ``MAILER_SMTP_URL``, ``MAILER_DOMAIN``, ``MAILER_PER_DOMAIN``, ``MAILER_CONNECTIONS``,
        ``MAILER_WEBHOOK_NETWORKS``.

        Raises:
            BadConfig: a variable is wrong.
        """
        networks = env.get("MAILER_WEBHOOK_NETWORKS", "").replace(",", " ").split()
        try:
            per_domain, connections = (
                float(env.get("MAILER_PER_DOMAIN", "10")),
                int(env.get("MAILER_CONNECTIONS", "10")),
            )
            allowed = tuple(ip_network(network) for network in networks)
        except ValueError as error:
            raise BadConfig(
                f"{error}: MAILER_PER_DOMAIN is mails a second, MAILER_CONNECTIONS a number, and "
                "MAILER_WEBHOOK_NETWORKS a list such as 10.1.0.0/16"
            ) from None
        if not per_domain > 0 or not connections > 0:
            raise BadConfig("MAILER_PER_DOMAIN and MAILER_CONNECTIONS must be above 0")
        return cls(
            smtp=Smtp.parse(env.get("MAILER_SMTP_URL", "smtp://127.0.0.1:2525")),
            domain=env.get("MAILER_DOMAIN", "localhost"),
            per_domain=per_domain,
            connections=connections,
            webhook_networks=allowed,
        )
