"""DelayedPromoter, CronLoop and ScheduleLoop: the loops that promote due jobs and offer the ticks of schedules."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from time import monotonic, time
from typing import Final

import anyio

from streamworker import codec
from streamworker.broker import Broker, CronStore, ScheduleStore
from streamworker.cron import Schedule
from streamworker.cron.stored import stored_schedule
from streamworker.errors import StreamworkerError
from streamworker.job import CronTick, Job, ScheduleEntry, ScheduleTick
from streamworker.loops import LookLoop, Pause
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

LATE: Final = 60.0
"""Seconds after which a tick counts as missed."""
LOOK: Final = 60.0
"""Most seconds between two proposals of a schedule, unless there are more schedules than that: one a second, then."""
AGAIN: Final = 0.05
"""Fewest seconds after which a tick that came too early is proposed again."""


def _as_it_is(job: Job) -> Job:
    return job


class CronLoop:
    """Proposes ticks until stopped.

    Args:
        broker: where they are proposed.
        schedules: of the app.
        settings: how large a job may be.
        stopping: ends the loop.
        now: this machine's clock, which may be wrong: the first guess at the server's.
        seal: makes of a tick's job what is stored.
    """

    def __init__(
        self,
        broker: CronStore,
        schedules: Sequence[Schedule],
        settings: Settings,
        stopping: anyio.Event,
        now: Callable[[], float] = time,
        *,
        seal: Callable[[Job], Job] = _as_it_is,
    ) -> None:
        self._seal = seal
        self._broker = broker
        self._settings = settings
        self._stopping = stopping
        self._server = now()
        self._asked = monotonic()
        self._due = dict.fromkeys(schedules, float("-inf"))  # by the server's clock
        self._before: dict[Schedule, float] = {}  # the tick that was proposed last

    def now(self) -> float:
        """The server's clock: what it showed when it was asked last, and what has passed since then."""
        return self._server + monotonic() - self._asked

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
        """Propose what is due; returns the seconds until the next look."""
        for schedule in list(self._due):
            if self._due[schedule] <= self.now():
                self._due[schedule] = await self._propose(schedule)
        return max(0.0, min(self._due.values(), default=0.0) - self.now())

    async def _propose(self, schedule: Schedule) -> float:
        """Propose the last tick of a schedule; returns when to look again."""
        now = self.now()
        at = schedule.previous(now)
        body = b""
        if schedule.missed == "last" or now - at <= LATE:
            settings = self._settings
            job = self._seal(schedule.tick(at))
            body = codec.pack(job, max_bytes=settings.max_job_bytes, key_ttl=settings.key_ttl).body
        job = schedule.job
        tick = CronTick(job.queue, job.level, schedule.key, at, body, schedule.name, self._before.get(schedule), now)
        answer = await self._broker.offer_tick(tick)
        self._set(answer.now)
        if answer.added:
            log.info("cron_tick", schedule=schedule.name, kind=job.kind, queue=job.queue)
        if answer.early > 0:  # our clock was wrong: now it is known by how much
            return answer.now + min(max(answer.early, AGAIN), 1.0)
        self._before[schedule] = at
        # From the tick, not from now: one that came meanwhile is due at once. Ticks are whole seconds apart, so that a
        # schedule is proposed once a second at most, whatever it says.
        look = max(LOOK, float(len(self._due))) * random.uniform(0.9, 1.0)  # noqa: S311 - spreads load
        return max(min(schedule.next(at), answer.now + look), float(int(answer.now) + 1))

    def _set(self, server: float) -> None:
        """The server's clock shows this now. Where it was set, all waits stay as long as they are."""
        moved = server - self.now()
        self._due = {schedule: due + moved for schedule, due in self._due.items()}
        self._server, self._asked = server, monotonic()


class ScheduleLoop:
    """Offers the ticks of schedules that are kept as data, until stopped: one timer, whatever their number.

    Args:
        store: where they are.
        queues: whose; ``None`` for all.
        settings: how large a job may be.
        stopping: ends the loop.
        process: names this process among all that look.
        seal: makes of a tick's job what is stored.
    """

    def __init__(
        self,
        store: ScheduleStore,
        queues: Sequence[str] | None,
        settings: Settings,
        stopping: anyio.Event,
        process: str,
        *,
        seal: Callable[[Job], Job] = _as_it_is,
    ) -> None:
        self._seal = seal
        self._store, self._queues, self._settings = store, queues, settings
        self._stopping, self._process = stopping, process
        self._loop = LookLoop(stopping)

    async def run(self) -> None:
        """Offer until stopped; an error is logged and followed by a pause."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._store.listen, self._loop.wake)
            group.start_soon(self._wake_at_the_end)
            await self._loop.run(self.step, lambda error: log.error("schedules_failed", error=str(error)))
            group.cancel_scope.cancel()

    async def _wake_at_the_end(self) -> None:
        await self._stopping.wait()
        self._loop.wake()

    async def step(self) -> float:
        """Offer what is due; returns the seconds until the next look."""
        waits = [LOOK]
        for queue in await self._store.queues():
            if self._queues is None or queue in self._queues:
                look = await self._store.look(queue, self._process)
                if look.due:
                    ticks = [self._tick(entry, look.now) for entry in look.due]
                    added = await self._store.tick(queue, ticks)
                    log.info("schedules_ticked", queue=queue, schedules=len(ticks), jobs=sum(added))
                if look.wait is not None:
                    waits.append(look.wait)
        return min(waits)

    def _tick(self, entry: ScheduleEntry, now: float) -> ScheduleTick:
        """The tick of a schedule that is due: of those it missed, the last."""
        try:
            stored = stored_schedule(entry)
            schedule = stored.schedule()
            at = max(entry.next or 0.0, schedule.previous(now))
            body = b""
            if schedule.missed == "last" or now - at <= LATE:
                settings = self._settings
                job = self._seal(schedule.tick(at))
                body = codec.pack(job, max_bytes=settings.max_job_bytes, key_ttl=settings.key_ttl).body
            return ScheduleTick(entry, stored.level, body, schedule.next(at), at)
        except (StreamworkerError, StopIteration) as error:
            # Another process may know the zone, or allow a larger job: until then it must not hold up the others.
            log.error("schedule_not_understood", schedule=entry.name, queue=entry.queue, error=str(error))
            return ScheduleTick(entry, "normal", b"", now + LOOK, None)


class DelayedPromoter:
    """Calls `Broker.promote` when it is needed.

    Args:
        broker: whose `promote` is called.
        stopping: ends the loop; call `wake` with it.
    """

    def __init__(self, broker: Broker, stopping: anyio.Event) -> None:
        self._broker = broker
        self._loop = LookLoop(stopping)
        self._next = 0.0

    def parked(self, at: float) -> None:
        """A job is due at ``at`` (epoch seconds): no later than that the due set is looked at."""
        if at < self._next:
            self.wake()

    def wake(self) -> None:
        """Look now."""
        self._loop.wake()

    async def run(self) -> None:
        """Tick until stopped; an error is logged and followed by a pause."""
        await self._loop.run(self._promote, lambda error: log.error("tick_failed", error=str(error)))

    async def _promote(self) -> float:
        self._next = float("inf")
        seconds = await self._broker.promote()
        self._next = time() + seconds
        return seconds
