"""What runs wherever jobs are relayed: the relay and the watch over queues; without workers, the scheduler too."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from functools import partial
from typing import Any, Final, Protocol

import anyio

from streamworker.broker import Tick, Ticked
from streamworker.clock import Clock
from streamworker.cron import Schedule
from streamworker.errors import ConfigurationError
from streamworker.handover import Dispatcher, Outbox
from streamworker.pause import Pause
from streamworker.postgres.listening import listen
from streamworker.postgres.pool import RELAY_CONNECTIONS, borrowed_database, open_database
from streamworker.postgres.relay import PostgresOutbox
from streamworker.reconciling import missing
from streamworker.relay import Listener, Relay
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger
from streamworker.vigil import Vigil

log = get_logger("streamworker.relay")

NEW_QUEUES: Final = 5.0
"""Seconds between looks for queues that were not there before."""


class Promoting(Protocol):
    """What a scheduler needs of Redis."""

    async def promote(self, queues: Sequence[str]) -> float:
        """See `Dispatcher.promote`."""

    async def queues(self) -> list[str]:
        """See `Dispatcher.queues`."""

    async def propose(self, tick: Tick) -> Ticked:
        """See `Broker.propose`."""


class Scheduler:
    """What makes jobs ready when their time comes, where no worker may be: due jobs of all queues, and an app's ticks.

    Args:
        dispatcher: where the jobs are.
        schedules: of the app; none where no app is known.
        settings: how large a job may be.
    """

    dispatched: Final = 0
    """Jobs it took from a ledger."""

    def __init__(self, dispatcher: Promoting, schedules: Sequence[Schedule], settings: Settings) -> None:
        self._dispatcher, self._schedules, self._settings = dispatcher, schedules, settings

    async def run(self, stopping: anyio.Event) -> None:
        """Promote and tick until stopped; no command to Redis is cancelled."""
        async with anyio.create_task_group() as loops:
            loops.start_soon(self._promote, stopping)
            loops.start_soon(Clock(self._dispatcher, self._schedules, self._settings, stopping).run)

    async def _promote(self, stopping: anyio.Event) -> None:
        pause = Pause()
        while not stopping.is_set():
            try:
                seconds = await self._dispatcher.promote(await self._dispatcher.queues())
                pause.reset()
            except Exception as error:  # noqa: BLE001 - goes on when the server does
                log.error("promotion_failed", error=str(error))
                await pause.wait(stopping)
                continue
            with anyio.move_on_after(min(seconds, NEW_QUEUES)):
                await stopping.wait()


class Relaying:
    """A relay and its watch.

    Args:
        outbox: where jobs wait.
        dispatcher: where they go.
        listener: tells of commits, if anybody does.
        lease: seconds a running job may take to finish after a sign of loss.
        queues: those that this process serves.
        scheduler: runs beside it, if there is one.
    """

    def __init__(
        self,
        outbox: Outbox,
        dispatcher: Dispatcher,
        *,
        listener: Listener | None,
        lease: float,
        queues: Sequence[str] = (),
        scheduler: Scheduler | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self.outbox: Final = outbox
        self._scheduler = scheduler
        self._ending = anyio.Event()
        self.relay: Final = Relay(
            outbox,
            dispatcher,
            self._ending,
            listener=listener,
            queues_changed=lambda: self._vigil.wake(),  # noqa: PLW0108 - made after it
            barred=lambda: self._vigil.barred,
        )
        self._vigil = Vigil(
            outbox, dispatcher, self._ending, lease=lease, hearing=lambda: self.relay.hearing, queues=tuple(queues)
        )

    async def run(self, stopping: anyio.Event) -> None:
        """Relay until stopped. What is under way is finished first: no command to Redis is cancelled."""
        async with anyio.create_task_group() as loops:
            loops.start_soon(self.relay.run)
            loops.start_soon(self._vigil.run)
            if self._scheduler is not None:
                loops.start_soon(self._scheduler.run, self._ending)
            await stopping.wait()
            self._ending.set()
            self.relay.wake()
            self._vigil.wake()

    async def unsent(self) -> bool:
        """Whether jobs that are due have not reached their queues yet; then they are looked for now."""
        return await self.relay.unsent()

    @property
    def dispatched(self) -> int:
        """Jobs it has dispatched."""
        return self.relay.dispatched

    async def known(self) -> list[str]:
        """The queues of the ledger."""
        return sorted(queue.name for queue in await self.outbox.queues())

    async def missing(self, queue: str) -> tuple[list[str], datetime]:
        """(ids of open jobs of a queue that lie nowhere in Redis, the moment the look began)."""
        before = await self.outbox.now()
        return await missing(self.outbox, self._dispatcher, queue, before), before


class NothingToRelay:
    """The relay of a worker that has none."""

    async def run(self, stopping: anyio.Event) -> None:
        """Nothing to do."""

    async def unsent(self) -> bool:
        """Nothing is."""
        return False


async def open_relaying(
    stack: AsyncExitStack,
    settings: Settings,
    dispatcher: Dispatcher,
    url: str | None,
    pool: Any,
    *,
    queues: Sequence[str] = (),
    scheduler: Scheduler | None = None,
) -> Relaying:
    """A relay, closed with ``stack``, the dispatcher too.

    Args:
        stack: closes what is made here.
        settings: lease, and the way past a pooler.
        dispatcher: where jobs go.
        url: of the database, if there is one.
        pool: the user's, where there is none.
        queues: those that this process serves.
        scheduler: runs beside it, if there is one.

    Raises:
        ConfigurationError: the database has no schema streamworker.
        Unreachable: PostgreSQL does not answer.
    """
    stack.push_async_callback(dispatcher.close)
    if url is not None:
        database = await open_database(url, name="relay", connections=RELAY_CONNECTIONS)
        stack.callback(database.close)
    else:
        database = await borrowed_database(pool)
    outbox = PostgresOutbox(database)
    if not await outbox.is_there():
        raise ConfigurationError("the schema streamworker is not there: run `streamworker migrate up`")
    listener = listener_for(url, settings.database_direct_url, pooled=database.pooled)
    return Relaying(outbox, dispatcher, listener=listener, lease=settings.lease, queues=queues, scheduler=scheduler)


def listener_for(url: str | None, direct: str | None, *, pooled: bool) -> Listener | None:
    """What listens for commits: nobody, if the only way leads through a pooler."""
    way = direct or (None if pooled else url)
    return None if way is None else partial(listen, way)
