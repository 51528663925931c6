"""What many commands take: settings as flags, and how a listing or a change is wanted.

Flags of settings stay text: `Settings` parses them as it parses the environment, and names the flag that is wrong.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from streamworker.broker import Operator
from streamworker.cli import importing
from streamworker.cli.streams import say
from streamworker.encryption import Keys
from streamworker.errors import LONGEST_WAIT, ConfigurationError
from streamworker.payload import PayloadStore
from streamworker.settings import Settings
from streamworker.settings.environment import PREFIX
from streamworker.settings.rules import QUEUE_NAME
from streamworker.telemetry import logs
from streamworker.views.fleet import Fleet
from streamworker.views.opened import KeyOpener, PlainOpener

SETTINGS = Group.create_ordered("Settings", help="Each goes before the variable of its name, STREAMWORKER_... .")

Text = Annotated[str | None, Parameter(group=SETTINGS)]
"""A setting's flag."""


def _queue(_: Any, name: str | None) -> None:
    if name is not None and not QUEUE_NAME.fullmatch(name):
        raise ValueError("Use 1 to 100 of A-Z a-z 0-9 . _ : - and do not end in :high or :low.")


def _queues(type_: Any, names: tuple[str, ...]) -> None:
    for name in names:
        _queue(type_, name)


def _wait(_: Any, seconds: float | None) -> None:
    if seconds is not None and not 0 <= seconds <= LONGEST_WAIT:
        raise ValueError("Use seconds from 0 up to 100 years.")


QueueName = Annotated[str | None, Parameter(validator=_queue)]
OneQueue = Annotated[str, Parameter(validator=_queue)]
QueueNames = Annotated[tuple[str, ...], Parameter(name="--queue", validator=_queues)]
"""Queues, each with a flag of its own."""
NamedIds = Annotated[tuple[str, ...], Parameter(name="--id", help="The same, once per id.")]
Seconds = Annotated[float, Parameter(validator=_wait)]
"""How long to wait, or how long ago."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """Settings of commands that look at the server.

    Attributes:
        redis_url: redis://host:6379/0, or embedded.
        namespace: Goes before every key.
        group: The consumer group.
        mode: stream or list.
        state_dir: Where the embedded servers keep their data.
        log_level: debug, info, warning, error or critical.
        log_format: console or json.
    """

    redis_url: Text = None
    namespace: Text = None
    group: Text = None
    mode: Text = None
    state_dir: Text = None
    log_level: Text = None
    log_format: Text = None

    def given(self) -> dict[str, str]:
        """The flags that were given, by the field of `Settings`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def export(self) -> None:
        """Put the flags into the environment: the app, its handlers and child processes see the same settings."""
        for name, value in self.given().items():
            variable = f"{PREFIX}{name.upper()}"
            os.environ[variable] = value
            os.environ.pop(f"{variable}_FILE", None)  # set in both forms would be a contradiction

    def settings(self, **more: str | None) -> Settings:
        """The settings in force, with logs prepared and warnings logged.

        Raises:
            ConfigurationError: a flag or a variable is wrong.
        """
        flags: dict[str, Any] = {**self.given(), **more}
        settings = Settings.load(**flags)
        logs.prepare(settings.log_level, settings.log_format)
        for warning in settings.warnings:
            logs.get_logger("streamworker.cli").warning("setting_without_effect", reason=warning)
        return settings


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WorkerFlags(ServerFlags):
    """All settings.

    Attributes:
        database_url: postgresql://user:password@host:5432/name.
        database_direct_url: The same past a connection pooler.
        queues: Queues in order, each with an optional cap: billing=10,email.
        partitions: Queues that are spread over several slots or servers, and over how many: billing=8.
        worker_id: A name for this worker; a random part is added.
        concurrency: Jobs at once.
        database_connections: Most connections of ctx.database, and as many of ctx.transaction().
        lease: Seconds a job stays with a worker that gives no sign.
        grace: Seconds running jobs may take to finish at shutdown.
        max_jobs: Jobs after which a worker is replaced by a new process.
        max_rss: Resident memory in MB from which it is.
        max_age: Seconds after which it is.
        target_wait: Seconds a job may wait until it starts, for autoscalers that ask a relay.
        max_deliveries: Deliveries after which a job whose workers died is dead.
        unknown_kind_ttl: Seconds a job waits for a worker that knows its kind.
        max_job_bytes: The largest document allowed.
        offload_bytes: Payloads with more bytes are kept in the payload store.
        key_ttl: Seconds a deduplication key is remembered.
        priority: strict or weighted.
        fair_weights: Starts of a tenant where others get one: large=3,small=0.5.
        list_pop: move or brpop (list mode).
        audit_retention: Seconds for which the audit is kept.
        ledger: auto, on or off.
        relay: on or off.
        history: on or off: keep how many runs there were, and how long they took.
        job_log: off, ctx or all: keep with a job what its handler logs.
        job_log_lines: Most lines of the log of one run.
        loop: auto, uvloop or asyncio: the event loop handlers run on.
        http: host:port of health and metrics, or off.
    """

    database_url: Text = None
    database_direct_url: Text = None
    queues: Text = None
    partitions: Text = None
    worker_id: Text = None
    concurrency: Text = None
    database_connections: Text = None
    lease: Text = None
    grace: Text = None
    max_jobs: Text = None
    max_rss: Text = None
    max_age: Text = None
    target_wait: Text = None
    max_deliveries: Text = None
    unknown_kind_ttl: Text = None
    max_job_bytes: Text = None
    offload_bytes: Text = None
    key_ttl: Text = None
    priority: Text = None
    fair_weights: Text = None
    list_pop: Text = None
    audit_retention: Text = None
    ledger: Text = None
    relay: Text = None
    history: Text = None
    job_log: Text = None
    job_log_lines: Text = None
    loop: Text = None
    http: Text = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Listing:
    """How a listing is wanted.

    Attributes:
        json: One JSON object per line, for programs.
        limit: Rows at most; 50 in a table unless given, all as JSON.
        watch: Show it again and again until Ctrl-C.
        interval: Seconds between two looks of --watch.
    """

    json: bool = False
    limit: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    watch: bool = False
    interval: Annotated[float, Parameter(validator=Number(gte=0.1, lte=3600))] = 2.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ActionFlags:
    """How a change is wanted.

    Attributes:
        yes: Do not ask.
        dry_run: Only show what would be done.
        limit: Change so many at most.
        json: One JSON object per line and change, for programs.
    """

    yes: Annotated[bool, Parameter(alias="-y")] = False
    dry_run: bool = False
    limit: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    json: bool = False


SERVER = ServerFlags()
WORKER = WorkerFlags()
LISTING = Listing()
ACTION = ActionFlags()


def operator_name() -> str:
    """Who types commands: user@host."""
    from streamworker.operators.audit_trail import user_name  # noqa: PLC0415 - it imports redis

    return user_name()


def fleet(operator: Operator, listing: Listing, queue: str | None) -> Fleet | None:
    """The summary above a listing that is watched; ``None`` if it is not."""
    return Fleet(operator, operator.lease, queue) if listing.watch else None


def operate(
    server: ServerFlags,
    work: Callable[[Operator], Coroutine[Any, Any, int]],
    *,
    endless: bool = False,
    private: bool = False,
) -> int:
    """Run ``work`` with an operator of the server that the settings name; returns what it returns.

    Args:
        server: flags of settings.
        work: what is done.
        endless: Ctrl-C is the regular end.
        private: payloads and errors are opened with the keys of the app, if STREAMWORKER_APP names one.

    Raises:
        ConfigurationError: the settings or the server are wrong.
        Unreachable: no server answers.
    """
    settings = server.settings()

    async def main() -> int:
        from streamworker.operators import open_operator  # noqa: PLC0415 - see `run`

        async with open_operator(settings) as operator:
            return await work(opener(settings).operator(operator) if private else operator)

    return run(main, endless=endless)


def opener(settings: Settings) -> PlainOpener | KeyOpener:
    """Opens what is sealed, with the keys of the app that the settings name; without one all stays as it is."""
    if settings.app is None:
        return PlainOpener()
    from streamworker.cli.app_loader import load_app  # noqa: PLC0415 - it imports all there is

    try:
        return load_app(settings).opener
    except ConfigurationError as error:
        say(f"what is sealed stays so, because the app cannot be loaded: {error}")
        return PlainOpener()


def app_store(settings: Settings) -> PayloadStore | None:
    """The store of large payloads of the app that the settings name, if it has one of its own."""
    if settings.app is None:
        return None
    from streamworker.cli.app_loader import load_app  # noqa: PLC0415 - it imports all there is

    return load_app(settings).store


def encryption(settings: Settings) -> Keys | None:
    """The keys of the app that the settings name."""
    found = opener(settings)
    return found.keys if isinstance(found, KeyOpener) else None


def run(main: Callable[[], Coroutine[Any, Any, int]], *, endless: bool = False) -> int:
    """Import what talks to servers, and run a coroutine with it; where it is ``endless``, Ctrl-C is its regular end."""
    with importing(), _no_opentelemetry():
        from streamworker.operators import audit_trail  # noqa: PLC0415 - redis takes longer to import than all else

    async def acting() -> int:
        audit_trail.ACTOR.set(audit_trail.Actor(audit_trail.user_name(), "cli"))
        return await main()

    try:
        return asyncio.run(acting())  # anyio's would import TLS, sockets and streams of its own
    except KeyboardInterrupt:
        if endless:
            return 0
        raise


@contextmanager
def _no_opentelemetry() -> Iterator[None]:
    """Let redis-py find no OpenTelemetry: it imports the whole SDK for metrics that only code of users turns on."""
    if "redis" in sys.modules or "opentelemetry" in sys.modules:
        yield
        return
    sys.modules["opentelemetry"] = None  # type: ignore[assignment] # as if it were not installed
    try:
        yield
    finally:
        del sys.modules["opentelemetry"]
