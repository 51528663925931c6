"""What every request passes: who asks, from where, and whether a write was meant. And what every answer carries."""

from __future__ import annotations

import os
import re
import secrets
from base64 import b64decode
from collections.abc import Mapping
from hmac import compare_digest
from ipaddress import ip_address, ip_network
from typing import Any, Final, Literal, Self, TypeAlias
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamworker.errors import ConfigurationError
from streamworker.redact import printable
from streamworker.settings.environment import PREFIX, lookup
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.web")

COOKIE: Final = "streamworker_csrf"
HEADER: Final = "x-csrf-token"
LARGEST: Final = 1_000_000
"""Bytes of a form."""

# No inline code or style, nothing from elsewhere, no frames: what a payload says is never more than text.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "x-robots-tag": "noindex, nofollow",
}


Role: TypeAlias = Literal["viewer", "operator"]
"""A viewer sees everything but payloads, and changes nothing."""


class Login(msgspec.Struct, frozen=True):
    """Who asks, and what they may do."""

    who: str
    role: Role


class Guard:
    """ASGI middleware. Sets ``scope["state"]["who"]`` and ``["csrf"]``.

    Args:
        app: what is guarded.
        access: who may do what.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through what may pass."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        sent, scope = scope, self._access.as_sent(scope)
        headers = Headers(scope=scope)
        token = _cookie(headers.get("cookie", ""))
        fresh = "" if token else secrets.token_urlsafe(32)
        login = self._access.login(sent, headers)
        refusal = self._refusal(scope, headers, token, login)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    found[name] = value
                found.setdefault("cache-control", "no-store")
                if "location" in found:
                    found["location"] = _local(found["location"])
                if fresh and refusal is None and scope["method"] == "GET":
                    found.append("set-cookie", _baked(fresh, scope))
            await send(message)

        if refusal is not None:
            await refusal(scope, receive, answer)
            return
        scope.setdefault("state", {})
        # Mounts inside the site move the root path: links begin at this one.
        scope["state"] |= {
            "who": login.who if login is not None else self._who(scope),
            "role": _role(login),
            "csrf": token or fresh,
            "root": scope.get("root_path", ""),
        }
        await self._app(scope, receive, answer)

    def _refusal(self, scope: Scope, headers: Headers, token: str, login: Login | None) -> PlainTextResponse | None:
        access, client = self._access, (scope.get("client") or ("?",))[0]
        if not access.admits_host(headers.get("host", "")):
            return _no(421, "This dashboard asks for no password and answers to localhost alone.")
        if login is None and (access.user is not None or access.user_header is not None):
            return self._stranger(headers, client)
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return _no(405, "There is nothing to do here but GET and POST.", {"allow": "GET, HEAD, POST"})
        if access.read_only or _role(login) == "viewer":
            why = "This dashboard is read-only." if access.read_only else "Viewers change nothing: ask an operator."
            return _no(403, why)
        forged = self._foreign(headers)
        if forged is None and not (token and compare_digest(token.encode(), headers.get(HEADER, "").encode())):
            forged = "This page is older than its cookie, or the cookie is gone: load the page anew."
        if forged is not None:
            log.warning(
                "dashboard_forged_request", client=client, path=scope["path"], origin=headers.get("origin"),
                host=headers.get("host"), reason=forged,
            )  # fmt: skip
            return _no(403, forged)
        if "transfer-encoding" in headers:
            return _no(411, "Say how long the form is (Content-Length): let the proxy buffer requests.")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST:
            return _no(413, "That is more than a form of ours holds.")
        return None

    def _stranger(self, headers: Headers, client: str) -> PlainTextResponse:
        """The answer to who does not say, or prove, who they are."""
        if (header := self._access.user_header) is not None:
            return _no(401, f"Who are you? The proxy in front has to say so, in {header}.")
        if "authorization" in headers:
            log.warning("dashboard_login_refused", client=client)
        challenge = {"www-authenticate": 'Basic realm="streamworker", charset="UTF-8"'}
        return _no(401, "Who are you?", challenge)

    def _foreign(self, headers: Headers) -> str | None:
        """Why a request is not one of our pages, in a sentence; ``None`` if it is. Browsers say where it comes from."""
        origin, host = headers.get("origin"), headers.get("host", "")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "Another site's page sent this: nothing was done."
        if origin is None:
            return "No page of a browser sent this (it has no Origin): use the command line for scripts."
        split = urlsplit(origin)
        if split.scheme in ("http", "https") and split.netloc.lower() == host.lower():
            return None
        if origin.lower() in self._access.admitted_origins:
            return None
        if split.scheme not in ("http", "https"):
            return "Another site's page sent this: nothing was done."
        return (
            f"The browser sees this dashboard at {printable(origin)[:200]}, a proxy asks for it as "
            f"{printable(host)[:200]}: if that is as it should be, start it with --origin {printable(origin)[:200]}"
        )

    def _who(self, scope: Scope) -> str:
        user: Any = scope.get("user")
        name = getattr(user, "display_name", "") if self._access.outer else ""
        return str(name) or ("local" if not self._access.public else "anybody")


def _role(login: Login | None) -> Role:
    return "operator" if login is None else login.role


def _local(location: str) -> str:
    """A redirect without scheme and host: those of the browser may be others than a proxy passes on."""
    split = urlsplit(location)
    return f"/{split.path.lstrip('/')}" + (f"?{split.query}" if split.query else "")


def _no(status: int, sentence: str, headers: dict[str, str] | None = None) -> PlainTextResponse:
    return PlainTextResponse(f"{sentence}\n", status, headers)


def _cookie(header: str) -> str:
    """Our token in a Cookie header; empty if there is none that we could have made."""
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE and 20 <= len(value) <= 100 and value.replace("-", "").replace("_", "").isalnum():
            return value
    return ""


def _baked(token: str, scope: Scope) -> str:
    path = scope.get("root_path") or "/"
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    return f"{COOKIE}={token}; Path={path}; HttpOnly; SameSite=Strict{secure}"


USER: Final = f"{PREFIX}DASHBOARD_USER"
PASSWORD: Final = f"{PREFIX}DASHBOARD_PASSWORD"
VIEWER: Final = f"{PREFIX}DASHBOARD_VIEWER"
VIEWER_PASSWORD: Final = f"{PREFIX}DASHBOARD_VIEWER_PASSWORD"
LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Who may see and do what.

    Attributes:
        user: with ``password``, asked for by HTTP Basic authentication; ``None``: no password is asked for.
        password: see ``user``.
        viewer: the name of those who only look, with ``viewer_password``.
        viewer_password: see ``viewer``.
        user_header: in which a trusted proxy (``proxies``) says who asks, as ``X-Forwarded-User``; without a password.
        operators: with ``user_header``, those who may change something; all others are viewers.
        read_only: nothing can be changed.
        outer: the application around the dashboard has checked who asks; names it by ``scope["user"].display_name``.
        public: without a password, names other than localhost may be asked for; goes with ``read_only``.
        origins: what browsers may send as Origin besides the dashboard's own, as ``https://ops.example.com``, where a
            proxy changes the Host.
        prefix: the path below which browsers see the dashboard, as ``/ops``; a proxy may pass it on or cut it off.
        proxies: addresses or networks of proxies that are believed about the browser (X-Forwarded-For and -Proto).
    """

    user: str | None = None
    password: str | None = None
    viewer: str | None = None
    viewer_password: str | None = None
    user_header: str | None = None
    operators: tuple[str, ...] = ()
    read_only: bool = False
    outer: bool = False
    public: bool = False
    origins: tuple[str, ...] = ()
    prefix: str = ""
    proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            split = urlsplit(origin)
            if split.scheme not in ("http", "https") or not split.netloc or split.path.strip("/"):
                raise ConfigurationError(f"the origin {origin!r} must be as in https://ops.example.com, without a path")
        if not _PREFIX.fullmatch(self.prefix):
            raise ConfigurationError(f"the prefix {self.prefix!r} must be a path as in /ops")
        for proxy in self.proxies:
            try:
                ip_network(proxy, strict=False)
            except ValueError:
                raise ConfigurationError(
                    f"the proxy {proxy!r} must be an address or a network, as in 10.0.0.0/8"
                ) from None
        if (self.user is None) != (self.password is None):
            raise ConfigurationError(f"set {USER} and {PASSWORD} (or their _FILE forms), or neither of them")
        if (self.viewer is None) != (self.viewer_password is None):
            raise ConfigurationError(f"set {VIEWER} and {VIEWER_PASSWORD} (or their _FILE forms), or neither of them")
        if self.viewer is not None and (self.user is None or self.viewer == self.user):
            raise ConfigurationError(f"{VIEWER} needs a {USER} of another name: an operator has to be left")
        if self.user_header is not None and (not self.proxies or self.user is not None):
            raise ConfigurationError("the user header needs the proxies that are believed, and no password beside it")
        if self.public and not self.read_only and self.user is None and self.user_header is None:
            raise ConfigurationError("a public dashboard without a password has to be read-only")

    @classmethod
    def load(
        cls,
        env: Mapping[str, str] | None = None,
        *,
        read_only: bool = False,
        origins: tuple[str, ...] = (),
        prefix: str = "",
        proxies: tuple[str, ...] = (),
        user_header: str | None = None,
        operators: tuple[str, ...] = (),
    ) -> Self:
        """From the environment.

        Raises:
            ConfigurationError: one of user and password is missing, or a file of secrets cannot be read.
        """
        env = os.environ if env is None else env
        user, password = lookup(env, [USER]), lookup(env, [PASSWORD])
        viewer, viewer_password = lookup(env, [VIEWER]), lookup(env, [VIEWER_PASSWORD])
        return cls(
            viewer=viewer.value if viewer else None,
            viewer_password=viewer_password.value if viewer_password else None,
            user_header=user_header,
            operators=operators,
            user=user.value if user else None,
            password=password.value if password else None,
            read_only=read_only,
            origins=origins,
            prefix=prefix.rstrip("/"),
            proxies=proxies,
        )

    def for_bind(self, host: str) -> Access:
        """The same for a server that listens on ``host``.

        Raises:
            ConfigurationError: others could reach it, and no password would be asked for.
        """
        if self.user is not None or self.user_header is not None or is_local(host):
            return self
        if not self.read_only:
            raise ConfigurationError(
                f"{host} can be reached from elsewhere: set {USER} and {PASSWORD} (or {PASSWORD}_FILE), or add "
                "--read-only, or listen on 127.0.0.1"
            )
        return msgspec.structs.replace(self, public=True)

    @property
    def payloads(self) -> bool:
        """Whether payloads may be looked at: they may be private, and not for every visitor."""
        return not self.public

    def admits_host(self, host: str) -> bool:
        """Whether this name may be asked for. Any, if a password is: no other site's page knows that."""
        # Otherwise a page from anywhere could have its own name point here, and read what is answered.
        asked = self.user is not None or self.user_header is not None
        return asked or self.outer or self.public or _name_of(host) in LOCAL

    @property
    def admitted_origins(self) -> frozenset[str]:
        """`origins` as browsers write them."""
        return frozenset(origin.lower().rstrip("/") for origin in self.origins)

    def as_sent(self, scope: Scope) -> Scope:
        """The request as the browser sent it: below the prefix, and from where trusted proxies say."""
        changed: dict[str, Any] = {}
        if self.prefix and not scope.get("root_path"):
            path = scope["path"]
            below = path if path == self.prefix or path.startswith(f"{self.prefix}/") else self.prefix + path
            changed |= {"root_path": self.prefix, "path": below, "raw_path": below.encode()}
        peer = (scope.get("client") or ("", 0))[0]
        if self._is_proxy(peer):
            headers = Headers(scope=scope)
            hops = [hop.strip() for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
            while hops and self._is_proxy(peer) and _is_address(hops[-1]):
                peer = hops.pop()  # each proxy adds whom it was asked by; what is left of the last one may be invented
            changed["client"] = (peer, 0)
            if (scheme := headers.get("x-forwarded-proto")) in ("http", "https"):
                changed["scheme"] = scheme
        return {**scope, **changed} if changed else scope

    def _is_proxy(self, address: str) -> bool:
        if not self.proxies or not _is_address(address):
            return False
        found = ip_address(address)
        found = getattr(found, "ipv4_mapped", None) or found
        return any(found in ip_network(proxy, strict=False) for proxy in self.proxies)

    def login(self, sent: Scope, headers: Headers) -> Login | None:
        """Who asks, by password or by the word of a trusted proxy; ``None`` if neither says so.

        Args:
            sent: the request as it arrived, before proxies are believed.
            headers: of the request.
        """
        if self.user_header is not None:
            names = headers.getlist(self.user_header)
            if len(names) != 1 or not names[0].strip() or not self._is_proxy((sent.get("client") or ("", 0))[0]):
                return None
            name = printable(names[0].strip())[:200]
            return Login(name, "operator" if name in self.operators else "viewer")
        return self.knows(headers.get("authorization", "")) if self.user is not None else None

    def knows(self, authorization: str) -> Login | None:
        """Whom an Authorization header names rightly; ``None`` if it does not."""
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = b64decode(encoded.strip(), validate=True)
        except ValueError:
            return None
        # In constant time: how much of it was right must not be told by how long it took.
        operator = compare_digest(given, f"{self.user}:{self.password}".encode())
        viewer = compare_digest(given, f"{self.viewer}:{self.viewer_password}".encode()) and self.viewer is not None
        if scheme.lower() != "basic" or self.user is None or not (operator or viewer):
            return None
        return Login(self.user, "operator") if operator else Login(self.viewer or "", "viewer")


_PREFIX: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")
_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/?#\\\s]+))(?::[0-9]{1,5})?")


def is_local(host: str) -> bool:
    """Whether a server that listens there is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """The name of a Host header, without the port (RFC 3986, 3.2.2); empty if it is none."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found is not None else ""
