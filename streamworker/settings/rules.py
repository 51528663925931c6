"""Rules of settings: the texts that a setting accepts, and the value of each.

A `Rule` parses text or raises ValueError. The text that `to_text` makes of a parsed value parses to the same value
again, so that a setting can be passed through the environment to a child process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

QUEUE_NAME = re.compile(r"(?!.*:(?:high|low)\Z)[A-Za-z0-9._:-]{1,100}")
_INTEGER = re.compile(r"[0-9]{1,18}")
_DECIMAL = re.compile(r"[0-9]{1,18}(?:\.[0-9]*)?|\.[0-9]+")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_HOST = r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:@\[\],/?#]*)(?::[0-9]{1,5})?"
_URL = re.compile(
    rf"(?P<scheme>[a-z0-9+]+)://(?:(?P<user>[^/?#\s]*)@)?(?P<hosts>{_HOST}(?:,{_HOST})*)(?P<path>[/?#]\S*)?"
)
_DATABASE = re.compile(r"(?:/(?:[0-9]{1,9}/?)?)?(?:\?[^#]*)?")
_POSTGRES = re.compile(r"postgres(?:ql)?(?:\+[a-z0-9_]+)?://")
_REDIS_SCHEMES = {f"{scheme}{kind}" for scheme in ("redis", "rediss") for kind in ("", "+sentinel", "+cluster")}


MOST_PARTITIONS = 1024


class Rule(NamedTuple):
    """How the text of a setting is parsed.

    Attributes:
        allowed: completes the sentence "it must be ...".
        parse: text → value; raises ValueError, whose message may say why, and never contains the text.
        secret: whether the text is a URL that may hold a password.
    """

    allowed: str
    parse: Callable[[str], Any]
    secret: bool = False


class QueueSpec(NamedTuple):
    """A queue that a worker claims from.

    Attributes:
        name: the queue's name.
        cap: most jobs of it that this worker runs at once; ``None``: only the concurrency bounds them.
    """

    name: str
    cap: int | None = None

    def __str__(self) -> str:
        return self.name if self.cap is None else f"{self.name}={self.cap}"


class PartitionSpec(NamedTuple):
    """A queue with partitions.

    Attributes:
        name: the queue's name.
        partitions: how many it has.
        servers: URL of the server of each partition behind the first, which stays at ``REDIS_URL``; empty if all do.
    """

    name: str
    partitions: int
    servers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}={'|'.join(self.servers) or self.partitions}"


class FairWeight(NamedTuple):
    """The weight of a tenant: how many starts it gets where a tenant of weight 1 gets one."""

    tenant: str
    weight: float

    def __str__(self) -> str:
        return f"{self.tenant}={self.weight!r}"


class Address(NamedTuple):
    """An address to listen at: a host without brackets, and a TCP port (0 takes any free one)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def to_text(value: Any) -> str:
    """Return the text that parses to the value; empty for ``None``."""
    if value is None:
        return ""
    if isinstance(value, float):
        # repr() is exact but may use an exponent, which is no usual form of seconds.
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").removesuffix(".") if "." in text else text
    if isinstance(value, (list, tuple)) and not isinstance(value, (QueueSpec, Address, FairWeight, PartitionSpec)):
        return ",".join(map(str, value))
    return str(value)


def one_of(words: tuple[str, ...]) -> Rule:
    """Accept one of the words, in any case."""

    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError
        return text.lower()

    return Rule(" or ".join(words), parse)


def integer(low: int, high: int) -> Rule:
    """Accept a whole number within the bounds, both included."""

    def parse(text: str) -> int:
        # int() alone would take "1_0", " 1" and digits of other scripts.
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return Rule(f"a whole number from {low} to {high}", parse)


def seconds(low: float, high: float) -> Rule:
    """Accept a duration in seconds within the bounds, both included."""

    def parse(text: str) -> float:
        if not _DECIMAL.fullmatch(text) or not low <= float(text) <= high:
            raise ValueError
        return float(text)

    return Rule(f"seconds from {low:g} to {high:.0f} without a unit, such as 15 or 2.5", parse)


def pattern(expression: str, allowed: str) -> Rule:
    """Accept text that matches the expression as a whole."""
    compiled = re.compile(expression)

    def parse(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError
        return text

    return Rule(allowed, parse)


def weight_list() -> Rule:
    """Accept tenants with weights, separated by commas: ``large=3,small=0.5``."""

    def parse(text: str) -> tuple[FairWeight, ...]:
        weights = []
        for item in text.split(","):
            tenant, equals, number = item.rpartition("=")
            weight = float(number)
            if not equals or not tenant.strip() or not 0.001 <= weight <= 1000:
                raise ValueError("a weight is a number from 0.001 to 1000")
            weights.append(FairWeight(tenant.strip(), weight))
        if len({each.tenant for each in weights}) < len(weights):
            raise ValueError("a tenant is listed twice")
        return tuple(weights)

    return Rule("tenants with their weights, separated by commas, such as large=3,small=0.5", parse)


def queue_list() -> Rule:
    """Accept queues separated by commas, each with or without ``=cap``."""
    cap_of = integer(1, 10_000).parse

    def parse(text: str) -> tuple[QueueSpec, ...]:
        specs = []
        for item in text.split(","):
            name, equals, cap = item.strip().partition("=")
            if not QUEUE_NAME.fullmatch(name):
                raise ValueError
            specs.append(QueueSpec(name, cap_of(cap) if equals else None))
        if len({spec.name for spec in specs}) < len(specs):
            raise ValueError("a queue is listed twice")
        return tuple(specs)

    return Rule(
        "queue names separated by commas, each with an optional cap, such as billing=10,email "
        "(names: 1 to 100 of A-Z a-z 0-9 . _ : - and not ending in :high or :low; caps: 1 to 10000)",
        parse,
    )


def partition_list() -> Rule:
    """Accept ``name=count`` or ``name=URL|URL`` separated by commas."""
    count_of, url_of = integer(1, MOST_PARTITIONS).parse, redis_url().parse

    def parse(text: str) -> tuple[PartitionSpec, ...]:
        specs = []
        for item in re.split(r",(?=\s*[A-Za-z0-9._:-]+=)", text):
            name, _, value = item.strip().partition("=")
            if not QUEUE_NAME.fullmatch(name):
                raise ValueError
            servers = tuple(url_of(each.strip()) for each in value.split("|")) if "://" in value else ()
            if any("+cluster://" in each for each in servers):
                raise ValueError("a partition is on a single server or Sentinel; a cluster needs a number")
            specs.append(PartitionSpec(name, len(servers) + 1 if servers else count_of(value), servers))
        if len({spec.name for spec in specs}) < len(specs):
            raise ValueError("a queue is listed twice")
        return tuple(specs)

    return Rule(
        f"queue names with numbers of partitions from 1 to {MOST_PARTITIONS}, such as billing=8,email=2, or with URLs "
        "of servers for more partitions, such as billing=redis://b:6379/0|redis://c:6379/0",
        parse,
    )


def state_path() -> Rule:
    """Accept a path, with ``~`` for the home directory."""

    def parse(text: str) -> Path:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise ValueError("that home directory is unknown") from None

    return Rule("the path of a directory", parse)


def http_address() -> Rule:
    """Accept ``host:port``, or ``off``."""

    def parse(text: str) -> Address | None:
        if text == "off":
            return None
        match = _ADDRESS.fullmatch(text)
        if match is None or int(match[2]) > 65_535:
            raise ValueError
        return Address(match[1].strip("[]"), int(match[2]))

    return Rule("host:port, such as 127.0.0.1:8080 or 0.0.0.0:8080, or off", parse)


def redis_url() -> Rule:
    """Accept the URL of a Redis server or ``embedded``. Whether a mode can use a cluster is judged by the app."""

    def parse(text: str) -> str:
        if text == "embedded":
            return text
        url = _match_url(text)
        if url["scheme"] == "unix":
            if url["hosts"] or len(url["path"] or "") < 2:
                raise ValueError("a socket's path begins with a third slash")
        elif url["scheme"] not in _REDIS_SCHEMES:
            raise ValueError("the scheme is unknown")
        elif url["scheme"] in ("redis", "rediss") and not _DATABASE.fullmatch(url["path"] or ""):
            raise ValueError("after the host comes the number of a database, or nothing")
        return text

    return Rule(
        "redis://host:6379/0, rediss://... for TLS, unix:///path/to/socket, redis+sentinel://..., redis+cluster://..., "
        "or embedded",
        parse,
        secret=True,
    )


def database_url() -> Rule:
    """Accept the URL of a PostgreSQL server; ``postgres://`` and SQLAlchemy's drivers become ``postgresql://``."""

    def parse(text: str) -> str:
        plain, count = _POSTGRES.subn("postgresql://", text, count=1)
        if not count or not _POSTGRES.match(text):
            raise ValueError("the scheme is unknown")
        _match_url(plain)
        return plain

    return Rule("postgresql://user:password@host:5432/name", parse, secret=True)


def _match_url(text: str) -> re.Match[str]:
    match = _URL.fullmatch(text)
    if match is None:
        # The usual reason, and the hardest to see: everything after the first / of a password becomes a path.
        raise ValueError("it does not parse; percent-encode special characters of the password")
    if "@" in (match["path"] or ""):
        # The @ of a password ended it, and what follows it was taken for the host: that would be asked, and shown.
        raise ValueError("it has an @ behind the host; percent-encode special characters of the password: @ as %40")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("it is not UTF-8")
    if any(int(port) > 65_535 for port in re.findall(r":([0-9]+)(?=,|\Z)", match["hosts"])):
        raise ValueError("the port is above 65535")
    return match
