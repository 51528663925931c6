"""The loop that proposes the ticks of an app's schedules. Every worker has one, and there is no leader.

It sleeps until the next tick, by the server's clock, and sends one command then; between ticks it sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import time
from typing import Final

import anyio

from streamworker import codec
from streamworker.broker import Broker, Tick
from streamworker.cron import Schedule
from streamworker.pause import Pause
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

LATE: Final = 60.0
"""Seconds after which a tick counts as missed."""
LOOK: Final = 60.0
"""Most seconds of one sleep: a machine that was suspended notices soon that time went by."""


class Clock:
    """Proposes ticks until stopped.

    Args:
        broker: where they are proposed.
        schedules: of the app.
        settings: how large a job may be.
        stopping: ends the loop.
        now: this machine's clock, which may be wrong.
    """

    def __init__(
        self,
        broker: Broker,
        schedules: Sequence[Schedule],
        settings: Settings,
        stopping: anyio.Event,
        now: Callable[[], float] = time,
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._stopping = stopping
        self._clock = now
        self._offset = 0.0  # of the server's clock from ours
        self._due = dict.fromkeys(schedules, 0.0)

    def now(self) -> float:
        """The server's clock, as far as it is known."""
        return self._clock() + self._offset

    async def run(self) -> None:
        """Propose until stopped; an error is logged and followed by a pause."""
        pause = Pause()
        while self._due and not self._stopping.is_set():
            try:
                seconds = await self.step()
                pause.reset()
            except Exception as error:  # noqa: BLE001 - the main loop never crashes
                log.error("cron_failed", error=str(error))
                await pause.wait(self._stopping)
                continue
            with anyio.move_on_after(seconds):
                await self._stopping.wait()

    async def step(self) -> float:
        """Propose what is due; returns the seconds until the next tick."""
        for schedule, due in list(self._due.items()):
            if due <= self.now():
                self._due[schedule] = await self._propose(schedule)
        return max(0.0, min(LOOK, min(self._due.values(), default=0.0) - self.now()))

    async def _propose(self, schedule: Schedule) -> float:
        """Propose the last tick of a schedule; returns when to look again."""
        now = self.now()
        at = schedule.previous(now)
        body = b""
        if schedule.missed == "last" or now - at <= LATE:
            settings = self._settings
            body = codec.pack(schedule.tick(at), max_bytes=settings.max_job_bytes, key_ttl=settings.key_ttl).body
        job = schedule.job
        answer = await self._broker.propose(Tick(job.queue, job.level, schedule.key, at, body))
        self._offset = answer.now - self._clock()
        if answer.added:
            log.info("cron_tick", schedule=schedule.name, kind=job.kind, queue=job.queue)
        if answer.early > 0:  # our clock was ahead: now it is known by how much
            return self.now() + min(answer.early, 1.0)
        return schedule.next(max(at, self.now()))
