"""The settings of a process as one frozen, checked value: ``Settings.load()``.

Every variable is one field of `Settings`, one line with its type, its rule and its default. A flag wins over
``STREAMWORKER_X``, that over ``REDIS_URL`` and ``DATABASE_URL`` without the prefix, that over the default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias, TypeVar, get_args, get_type_hints

import msgspec

from streamworker.errors import ConfigurationError
from streamworker.redact import MASK, mask_url, redact
from streamworker.settings.environment import PREFIX, Found, judge_names, lookup
from streamworker.settings.rules import (
    Address,
    FairWeight,
    PartitionSpec,
    QueueSpec,
    Rule,
    database_url,
    http_address,
    integer,
    one_of,
    partition_list,
    pattern,
    queue_list,
    redis_url,
    seconds,
    state_path,
    to_text,
    weight_list,
)

__all__ = ["EMBEDDED", "Address", "Described", "FairWeight", "PartitionSpec", "QueueSpec", "Settings", "mask_url"]

EMBEDDED = "embedded"
"""The ``REDIS_URL`` that means the embedded pair of servers."""

S = TypeVar("S")
L = TypeVar("L")

Mode: TypeAlias = Literal["stream", "list"]
Priority: TypeAlias = Literal["strict", "weighted"]
ListPop: TypeAlias = Literal["move", "brpop"]
Ledger: TypeAlias = Literal["auto", "on", "off"]
Relay: TypeAlias = Literal["on", "off"]
RecordHistory: TypeAlias = Literal["on", "off"]
Loop: TypeAlias = Literal["auto", "uvloop", "asyncio"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error", "critical"]
LogFormat: TypeAlias = Literal["console", "json"]
JobLog: TypeAlias = Literal["off", "ctx", "all"]

# These two are read without the prefix as well: platforms that run containers set them so.
_PLAIN = ("REDIS_URL", "DATABASE_URL")
# Read by the dashboard alone; listed so that they are not reported as misspelled.
_READ_ELSEWHERE = tuple(f"{PREFIX}DASHBOARD_{name}" for name in ("USER", "PASSWORD", "VIEWER", "VIEWER_PASSWORD"))

_YEAR = 366 * 86_400
# Redis parsers have let commands past their access rules for a group of this name (redis#15478).
_GROUP = pattern(
    r"(?!(?i:streams)\Z)[A-Za-z0-9._:-]{1,100}", "1 to 100 of the characters A-Z a-z 0-9 . _ : - and not STREAMS"
)
_WORKER_ID = pattern(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "1 to 64 of the characters A-Z a-z 0-9 . _ - and start with a letter or digit"
)
# Braces would move all keys of a queue to another cluster slot.
_NAMESPACE = pattern(r"[A-Za-z0-9._:-]{0,100}", "at most 100 of the characters A-Z a-z 0-9 . _ : -")
_APP = pattern(r"(?:[^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*(?:\.[^\W\d]\w*)*", "module:attribute, such as shop.jobs:app")


class Described(NamedTuple):
    """One line of ``streamworker config``.

    Attributes:
        name: the full name of the variable.
        value_masked: its value as text with passwords hidden; empty if unset.
        source: the flag, variable or file it came from, ``default``, or ``code`` for a value set in Python.
    """

    name: str
    value_masked: str
    source: str


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one process. Build it with `Settings.load`; code and tests may also name fields directly.

    Either way every value is checked, and URLs take their normal form. Durations are seconds.

    Attributes:
        sources: (field, where its value came from) of what `load` found.
        warnings: sentences about variables that have no effect; the caller of `load` logs them.

    Raises:
        ConfigurationError: a value is not allowed; nothing secret is in the message.
    """

    redis_url: Annotated[str | None, redis_url()] = None
    database_url: Annotated[str | None, database_url()] = None
    database_direct_url: Annotated[str | None, database_url()] = None
    app: Annotated[str | None, _APP] = None
    mode: Annotated[Mode, one_of(get_args(Mode))] = "stream"
    queues: Annotated[tuple[QueueSpec, ...], queue_list()] = ()
    partitions: Annotated[tuple[PartitionSpec, ...], partition_list()] = ()
    group: Annotated[str, _GROUP] = "workers"
    worker_id: Annotated[str | None, _WORKER_ID] = None
    concurrency: Annotated[int, integer(1, 10_000)] = 100
    database_connections: Annotated[int, integer(1, 10_000)] = 10
    lease: Annotated[float, seconds(0.2, 86_400)] = 15.0
    grace: Annotated[float, seconds(0, 86_400)] = 25.0
    max_jobs: Annotated[int | None, integer(1, 10**12)] = None
    max_rss: Annotated[int | None, integer(1, 10**9)] = None
    max_age: Annotated[float | None, seconds(1, 10 * _YEAR)] = None
    target_wait: Annotated[float, seconds(0.1, 86_400)] = 60.0
    max_deliveries: Annotated[int, integer(1, 10_000)] = 5
    unknown_kind_ttl: Annotated[float, seconds(0, 10 * _YEAR)] = 86_400.0
    max_job_bytes: Annotated[int, integer(1, 64 * 1_048_576)] = 262_144
    offload_bytes: Annotated[int | None, integer(1024, 64 * 1_048_576)] = None
    key_ttl: Annotated[float, seconds(0.1, 10 * _YEAR)] = 86_400.0
    priority: Annotated[Priority, one_of(get_args(Priority))] = "strict"
    fair_weights: Annotated[tuple[FairWeight, ...], weight_list()] = ()
    list_pop: Annotated[ListPop, one_of(get_args(ListPop))] = "move"
    audit_retention: Annotated[float, seconds(60, 100 * _YEAR)] = 365 * 86_400.0
    ledger: Annotated[Ledger, one_of(get_args(Ledger))] = "auto"
    relay: Annotated[Relay, one_of(get_args(Relay))] = "on"
    history: Annotated[RecordHistory, one_of(get_args(RecordHistory))] = "on"
    loop: Annotated[Loop, one_of(get_args(Loop))] = "auto"
    namespace: Annotated[str, _NAMESPACE] = ""
    # Beside the project, so that two projects on one machine never share servers, and queues, by accident.
    state_dir: Annotated[Path, state_path()] = Path(".streamworker")
    http: Annotated[Address | None, http_address()] = None
    log_level: Annotated[LogLevel, one_of(get_args(LogLevel))] = "info"
    log_format: Annotated[LogFormat, one_of(get_args(LogFormat))] = "json"
    job_log: Annotated[JobLog, one_of(get_args(JobLog))] = "off"
    job_log_lines: Annotated[int, integer(1, 10_000)] = 200

    sources: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        for name, rule in _RULES.items():
            given = getattr(self, name)
            if given == _DEFAULTS[name]:
                continue
            try:
                value = _parse(rule, Found(to_text(given), name))
            except ConfigurationError as error:
                problems.append(str(error))
            else:
                msgspec.structs.force_setattr(self, name, value)
        _raise(problems or _contradictions(self.ledger, self.redis_url, self.database_url))

    @classmethod
    def load(cls, env: Mapping[str, str] | None = None, *, tty: bool | None = None, **flags: Any) -> Self:
        """Read the settings from flags and the environment.

        Args:
            env: the environment; ``None`` takes ``os.environ``. An empty value counts as unset, and ``X_FILE`` names a
                file that holds the value of X.
            tty: whether people watch the logs, which makes ``console`` their default format; ``None`` asks stderr.
            flags: values from the command line by field name, as text or typed; ``None`` counts as not given.

        Raises:
            ConfigurationError: one line per wrong value or misspelled name, all at once.
            TypeError: a flag is no setting.
        """
        unknown = flags.keys() - _RULES.keys()
        if unknown:
            raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
        env = os.environ if env is None else env
        problems, warnings = judge_names(env, _KNOWN)
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name, rule in _RULES.items():
            try:
                found = _flag(name, flags.get(name)) or lookup(env, _names(name))
                if found is not None:
                    values[name] = _parse(rule, found)
                    sources[name] = found.source
            except ConfigurationError as error:
                problems.append(str(error))
        if problems:
            # A URL that is set but wrong must not also be reported as missing: contradictions wait for the next run.
            _raise(problems)
        if "log_format" not in values and (sys.stderr.isatty() if tty is None else tty):
            values["log_format"] = "console"
            sources["log_format"] = "default (standard error is a terminal)"
        return cls(**values, sources=tuple(sources.items()), warnings=tuple(warnings))

    def describe(self) -> list[Described]:
        """Return every variable with its value, passwords hidden, and where the value came from."""
        sources = dict(self.sources)
        lines = []
        for name, rule in _RULES.items():
            value = getattr(self, name)
            source = sources.get(name) or ("default" if value == _DEFAULTS[name] else "code")
            lines.append(Described(_names(name)[0], _shown(rule, to_text(value)), source))
        return lines

    def require_redis_url(self) -> str:
        """Return ``redis_url``.

        Raises:
            ConfigurationError: it is not set; the message names the cure.
        """
        if self.redis_url is None:
            raise ConfigurationError(
                "No Redis is configured: set REDIS_URL=redis://host:6379/0, or REDIS_URL=embedded for a private server "
                "on this machine (`streamworker demo` needs neither)."
            )
        return self.redis_url

    def require_database_url(self) -> str:
        """Return ``database_url``.

        Raises:
            ConfigurationError: it is not set; the message names the cure.
        """
        if self.database_url is None:
            raise ConfigurationError(
                "No PostgreSQL is configured: set DATABASE_URL=postgresql://user:password@host:5432/name."
            )
        return self.database_url

    def by_mode(self, stream: S, lists: L) -> S | L:
        """Return ``stream`` or ``lists``, as ``mode`` says."""
        return stream if self.mode == "stream" else lists

    def __repr__(self) -> str:
        # msgspec's own would print passwords into tracebacks.
        changed = (line for line in self.describe() if line.source != "default")
        return f"Settings({', '.join(f'{line.name}={line.value_masked!r}' for line in changed)})"

    def __rich_repr__(self) -> Any:
        return ((line.name, line.value_masked) for line in self.describe() if line.source != "default")


def _names(field: str) -> tuple[str, ...]:
    plain = field.upper()
    return (PREFIX + plain, plain) if plain in _PLAIN else (PREFIX + plain,)


def _flag(name: str, value: Any) -> Found | None:
    text = to_text(value)
    return Found(text, f"--{name.replace('_', '-')}") if text else None


def _parse(rule: Rule, found: Found) -> Any:
    try:
        return rule.parse(found.value)
    except ValueError as error:
        shown = MASK if found.private else repr(_shown(rule, found.value)[:100])
        quoted = len(found.value) > 1 and found.value[0] == found.value[-1] and found.value[0] in "\"'"
        why = "it stands in quotes, which `docker run --env-file` keeps: remove them" if quoted else str(error)
        hint = f" ({why})" if why else ""
        raise ConfigurationError(f"{found.source} is {shown}{hint}; it must be {rule.allowed}.") from None


def _shown(rule: Rule, text: str) -> str:
    return mask_url(text) if rule.secret else redact(text)


def _contradictions(ledger: str, redis: str | None, database: str | None) -> list[str]:
    if ledger == "on" and database is None and redis != EMBEDDED:
        return [f"{PREFIX}LEDGER is 'on' but there is no PostgreSQL; set DATABASE_URL or {PREFIX}LEDGER=auto."]
    return []


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigurationError("\n".join(problems))


_RULES: dict[str, Rule] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Settings, include_extras=True).items()
    if isinstance(getattr(hint, "__metadata__", (None,))[0], Rule)
}
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Settings)}
_KNOWN = (*(name for field in _RULES for name in _names(field)), *_READ_ELSEWHERE)
