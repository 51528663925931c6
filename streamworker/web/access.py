"""Who may see and do what in the dashboard."""

from __future__ import annotations

import os
import re
from base64 import b64decode
from collections.abc import Mapping
from hmac import compare_digest
from ipaddress import ip_address
from typing import Final, Self

import msgspec

from streamworker.environment import PREFIX, lookup
from streamworker.errors import ConfigurationError

USER: Final = f"{PREFIX}DASHBOARD_USER"
PASSWORD: Final = f"{PREFIX}DASHBOARD_PASSWORD"
LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Who may see and do what.

    Attributes:
        user: with ``password``, asked for by HTTP Basic authentication; ``None`` for nobody is asked.
        password: see ``user``.
        read_only: nothing can be changed.
        outer: the application around the dashboard has checked who asks; names it by ``scope["user"].display_name``.
        public: without a password, names other than localhost may be asked for; goes with ``read_only``.
        origins: what browsers may send as Origin besides the dashboard's own, as ``https://ops.example.com``, where a
            proxy changes the Host.
    """

    user: str | None = None
    password: str | None = None
    read_only: bool = False
    outer: bool = False
    public: bool = False
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.user is None) != (self.password is None):
            raise ConfigurationError(f"set {USER} and {PASSWORD} (or their _FILE forms), or neither of them")
        if self.public and not self.read_only and self.user is None:
            raise ConfigurationError("a public dashboard without a password has to be read-only")

    @classmethod
    def load(
        cls, env: Mapping[str, str] | None = None, *, read_only: bool = False, origins: tuple[str, ...] = ()
    ) -> Self:
        """From the environment.

        Raises:
            ConfigurationError: one of user and password is missing, or a file of secrets cannot be read.
        """
        env = os.environ if env is None else env
        user, password = lookup(env, [USER]), lookup(env, [PASSWORD])
        return cls(
            user=user.value if user else None,
            password=password.value if password else None,
            read_only=read_only,
            origins=origins,
        )

    def for_bind(self, host: str) -> Access:
        """The same for a server that listens on ``host``.

        Raises:
            ConfigurationError: others could reach it, and nobody would be asked who they are.
        """
        if self.user is not None or is_local(host):
            return self
        if not self.read_only:
            raise ConfigurationError(
                f"{host} can be reached from elsewhere: set {USER} and {PASSWORD} (or {PASSWORD}_FILE), or add "
                "--read-only, or listen on 127.0.0.1"
            )
        return msgspec.structs.replace(self, public=True)

    @property
    def payloads(self) -> bool:
        """Whether payloads may be looked at: they may be private, and not for whoever comes along."""
        return not self.public

    def admits_host(self, host: str) -> bool:
        """Whether this name may be asked for. Any, if a password is: no other site's page knows that."""
        # Otherwise a page from anywhere could have its own name point here, and read what is answered.
        return self.user is not None or self.outer or self.public or _name_of(host) in LOCAL

    def knows(self, authorization: str) -> str | None:
        """The user that an Authorization header names rightly; ``None`` if it does not."""
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = b64decode(encoded.strip(), validate=True)
        except ValueError:
            return None
        wanted = f"{self.user}:{self.password}".encode()
        # In constant time: how much of it was right must not be told by how long it took.
        right = compare_digest(given, wanted)
        return self.user if right and scheme.lower() == "basic" else None


_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/?#\\\s]+))(?::[0-9]{1,5})?")


def is_local(host: str) -> bool:
    """Whether a server that listens there is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _name_of(host: str) -> str:
    """The name of a Host header, without the port (RFC 3986, 3.2.2); empty if it is none."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found is not None else ""
