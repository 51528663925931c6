"""RelayProcess and Scheduler: what ``streamworker relay`` runs, and the relay of a worker."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Final, Protocol

import anyio

from streamworker.broker import CronStore, HoldsPayloads, ScheduleStorage
from streamworker.cron import Schedule
from streamworker.cron.stored import ScheduleMirror
from streamworker.encryption import Keys
from streamworker.loops import Pause
from streamworker.relay import Dispatcher, LedgerGauge, Outbox
from streamworker.relay.loss_detector import LossDetector, missing
from streamworker.relay.payload_sweeper import PayloadSweeper
from streamworker.relay.relay import Listener, Relay
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger
from streamworker.worker.scheduler import CronLoop, ScheduleLoop
from streamworker.worker.sealed import stages_of
from streamworker.worker.stored_payloads import PayloadReaper

log = get_logger("streamworker.relay")

NEW_QUEUES: Final = 5.0
"""Seconds between looks for queues that were not there before."""


class SchedulerStore(CronStore, ScheduleStorage, Protocol):
    """What a scheduler needs of Redis."""

    async def promote(self, queues: Sequence[str]) -> float:
        """Move due jobs to their queues; seconds until the next is due."""

    async def queues(self) -> list[str]:
        """All queues of the namespace."""


class Scheduler:
    """What makes jobs ready when their time comes, where no worker may be: due jobs of all queues, and an app's ticks.

    Args:
        dispatcher: where the jobs are.
        schedules: of the app; none where no app is known.
        settings: how large a job may be.
        encryption: seals the ticks.
    """

    dispatched: Final = 0
    """Jobs it took from a ledger."""

    def __init__(
        self,
        dispatcher: SchedulerStore,
        schedules: Sequence[Schedule],
        settings: Settings,
        encryption: Keys | None = None,
    ) -> None:
        self._dispatcher, self._schedules, self._settings = dispatcher, schedules, settings
        self._stages = stages_of(encryption)

    async def run(self, stopping: anyio.Event) -> None:
        """Promote and tick until stopped; no command to Redis is cancelled."""
        async with anyio.create_task_group() as loops:
            loops.start_soon(self._promote, stopping)
            seal = self._stages.tick
            loops.start_soon(CronLoop(self._dispatcher, self._schedules, self._settings, stopping, seal=seal).run)
            process = f"relay-{secrets.token_hex(8)}"
            kept = ScheduleLoop(self._dispatcher.schedules, None, self._settings, stopping, process, seal=seal)
            loops.start_soon(kept.run)

    async def gauges(self) -> Sequence[LedgerGauge]:
        """There is no ledger."""
        return ()

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


class RelayDispatcher(Dispatcher, ScheduleStorage, HoldsPayloads, Protocol):
    """Redis as a relay process uses it."""


class RelayProcess:
    """A relay, its loss detector, the mirror of its schedules, and perhaps a scheduler.

    Args:
        outbox: where jobs wait.
        dispatcher: where they go.
        listener: tells of commits, if anything does.
        lease: seconds a running job may take to finish after a sign of loss.
        queues: those that this process serves.
        scheduler: runs beside it, if there is one.
        sweepers: delete stored payloads that no job has.
        reaper: deletes those of jobs that have just ended, where no worker does.
    """

    def __init__(
        self,
        outbox: Outbox,
        dispatcher: RelayDispatcher,
        *,
        listener: Listener | None,
        lease: float,
        queues: Sequence[str] = (),
        scheduler: Scheduler | None = None,
        sweepers: Sequence[PayloadSweeper] = (),
        reaper: PayloadReaper | None = None,
    ) -> None:
        self._dispatcher, self._reaper = dispatcher, reaper
        self.sweepers: Final = tuple(sweepers)
        self.outbox: Final = outbox
        self._scheduler = scheduler
        self._ending = anyio.Event()
        self._mirror = ScheduleMirror(dispatcher.schedules, outbox.schedules, self._ending)
        self._loss_detector = LossDetector(
            outbox, dispatcher, self._ending, lease=lease, queues=tuple(queues), suspected=self._mirror.suspect
        )
        self.relay: Final = Relay(
            outbox, dispatcher, self._ending, listener=listener, loss_detector=self._loss_detector
        )

    async def run(self, stopping: anyio.Event) -> None:
        """Relay until stopped. What is under way is finished first: no command to Redis is cancelled."""
        async with anyio.create_task_group() as loops:
            loops.start_soon(self.relay.run)
            loops.start_soon(self._loss_detector.run)
            loops.start_soon(self._mirror.run)
            if self._scheduler is not None:
                loops.start_soon(self._scheduler.run, self._ending)
            for sweeper in self.sweepers:
                loops.start_soon(sweeper.run, self._ending)
            if self._reaper is not None:
                loops.start_soon(self._reaper.run, self._ending)
            await stopping.wait()
            self._ending.set()
            self.relay.wake()
            self._loss_detector.wake()
            self._mirror.wake()

    async def unsent(self) -> bool:
        """Whether jobs that are due have not reached their queues yet; then they are looked for now."""
        return await self.relay.unsent()

    async def gauges(self) -> Sequence[LedgerGauge]:
        """What the ledger counts for /metrics."""
        return await self.outbox.gauges()

    @property
    def dispatched(self) -> int:
        """Jobs it has dispatched."""
        return self.relay.dispatched

    @property
    def trouble(self) -> str | None:
        """Why nothing is relayed although both servers answer."""
        return self._loss_detector.trouble

    async def known(self) -> list[str]:
        """The queues of the ledger."""
        return sorted(queue.name for queue in await self.outbox.queues())

    async def missing(self, queue: str) -> tuple[list[str], datetime]:
        """(ids of open jobs of a queue that are nowhere in Redis, the moment the look began)."""
        before = await self.outbox.now()
        return await missing(self.outbox, self._dispatcher, queue, before), before


class NothingToRelay:
    """The relay of a worker that has none."""

    trouble: Final = None

    async def run(self, stopping: anyio.Event) -> None:
        """Nothing to do."""

    async def unsent(self) -> bool:
        """Nothing is."""
        return False

    async def gauges(self) -> Sequence[LedgerGauge]:
        """Nothing is counted."""
        return ()
