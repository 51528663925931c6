"""WorkerHost: what a worker needs of an app, which implements it. So workers do not import apps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Protocol

import anyio
import msgspec

from streamworker.broker import Operator, WorkerBroker
from streamworker.cron import Schedule
from streamworker.encryption import Keys
from streamworker.handlers import Handlers
from streamworker.observe import Observer
from streamworker.payload import PayloadStore
from streamworker.postgres import Ledger
from streamworker.relay import Dispatcher, LedgerGauge
from streamworker.settings import Settings
from streamworker.worker.executor import Middleware


class GaugeSource(Protocol):
    """What knows the numbers of the ledger: a relay."""

    async def gauges(self) -> Sequence[LedgerGauge]:
        """What the ledger counts for /metrics; nothing without a ledger."""


class Relays(GaugeSource, Protocol):
    """The relay of a worker: it puts jobs of the ledger onto Redis."""

    @property
    def trouble(self) -> str | None:
        """Why nothing is relayed although both servers answer; ``None`` if there is no reason."""

    async def run(self, stopping: anyio.Event, /) -> None:
        """Relay until stopped."""

    async def unsent(self) -> bool:
        """Whether jobs that are due have not reached their queues yet; then they are looked for now."""


class WorkerResources(msgspec.Struct, frozen=True):
    """The servers of a worker.

    Attributes:
        broker: hands out jobs.
        redis: the handlers' client.
        database: the handlers' database.
        ledger: the record; ``None`` without one.
        relay: puts jobs from the ledger onto Redis.
        dispatcher: looks for the ledger's jobs in Redis; ``None`` without a ledger.
        store: has payloads that are too large for a document, if there is one.
    """

    broker: WorkerBroker
    redis: Any
    database: Any
    ledger: Ledger | None
    relay: Relays
    dispatcher: Dispatcher | None = None
    store: PayloadStore | None = None


class WorkerHost(Protocol):
    """What a worker needs of an app."""

    @property
    def handlers(self) -> Handlers[Any]:
        """Kind to handler."""

    @property
    def schedules(self) -> Sequence[Schedule]:
        """What is enqueued by the calendar."""

    @property
    def middleware(self) -> tuple[Middleware, ...]:
        """Wraps every handler."""

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Told of every job."""

    @property
    def encryption(self) -> Keys | None:
        """Seal and open what its jobs leave; ``None`` without encryption."""

    @property
    def lifespan(self) -> Any:
        """Makes the context manager that yields the services, or ``None``."""

    def operator(self, settings: Settings, redis: Any) -> AbstractAsyncContextManager[Operator]:
        """Looks at queues, on the event loop that enters it."""

    def resolve(self, settings: Settings | None) -> Settings:
        """The settings in force."""

    def entered(self, settings: Settings, redis: Any) -> AbstractAsyncContextManager[Any]:
        """Keeps the app open, so that handlers can enqueue."""

    async def site(
        self, stack: AsyncExitStack, settings: Settings, redis: Any, database: Any, worker_id: str
    ) -> WorkerResources:
        """The servers of a worker, open until ``stack`` is left."""
