"""The relay of the transactional outbox: adds jobs that are queued in the ledger to Redis.

The order of its steps makes a crash harmless: a job is marked ``dispatching``, with its next hop, and committed; one
script adds it to its stream and remembers (id, hop), so that a repeat adds nothing; then it is marked ``dispatched``.
A relay that dies in between leaves a row that another one takes over, with the same hop. Every worker runs a relay;
they share the work by skipping rows that others have locked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from typing import Any, Final

import anyio

from streamworker.errors import StreamworkerError, Unreachable
from streamworker.loops import Pause
from streamworker.relay import Dispatch, Dispatcher, Outbox, Taken
from streamworker.relay.loss_detector import LossDetector
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.relay")

VALID: Final = 5.0
"""Seconds after a claim in which the jobs may be added to Redis; other relays take them over later than that."""
WAKE: Final = 1.0
"""Seconds between looks for jobs to be woken while there is always something to dispatch."""
RETAKE: Final = 5.0
"""Seconds between looks for rows that other relays left ``dispatching``."""
POLL: Final = (0.05, 0.5)
"""Shortest and longest pause between polls without notifications."""
LONGEST_PAUSE: Final = 5.0
"""Longest pause while notifications arrive."""
NOTE_AGAIN: Final = 1.0
"""Seconds until a job is marked again whose row a run had locked."""
MOST_UNNOTED: Final = 10_000
"""Most jobs that are marked later."""
LOOK: Final = (0.05, 5.0)
"""Seconds between looks at flows: after one that found something, and without a notification."""
YIELD: Final = (0.005, 0.25)
"""Shortest and longest pause of a relay that is notified and finds that others have taken the jobs."""

Listener = Callable[[Callable[[str], None], Callable[[bool], None]], Coroutine[Any, Any, None]]
"""Calls the first with every notification and the second with whether notifications arrive. Never returns."""


class Relay:
    """Dispatches queued jobs until it is stopped.

    Args:
        outbox: the ledger.
        dispatcher: Redis.
        stopping: ends it; call `wake` with it.
        listener: source of notifications; without one the relay polls.
        loss_detector: looks at queues that changed in the ledger, and bars the relay; none in tests of a relay alone.
    """

    def __init__(
        self,
        outbox: Outbox,
        dispatcher: Dispatcher,
        stopping: anyio.Event,
        *,
        listener: Listener | None = None,
        loss_detector: LossDetector | None = None,
    ) -> None:
        self._outbox = outbox
        self._dispatcher = dispatcher
        self._stopping = stopping
        self._listener = listener
        self._loss_detector = loss_detector
        self._wake = anyio.Event()
        self._notified = False
        self.listening = False
        """Whether notifications of commits arrive."""
        self._losses = 0
        self._idle = POLL[0]
        self._unsent: list[Taken] = []
        self._unnoted: list[tuple[Taken, str]] = []
        self._note_at = 0.0
        self._doubted: str | None = None
        self._until = 0.0
        self._retake_at = 0.0
        self._wake_at = 0.0
        self._met: set[str] = set()
        self._stepping = False
        self._look_at = 0.0
        self.dispatched = 0
        """Jobs this relay has dispatched."""

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    async def unsent(self) -> bool:
        """Whether due jobs have not reached their queues yet; wakes the relay if so."""
        due, waiting = await self._outbox.next_due()
        if (due is not None and due <= 0) or (waiting is not None and waiting <= 0):
            self.wake()
            return True
        return self._stepping  # claimed jobs are no longer queued, and perhaps not in Redis yet

    async def run(self) -> None:
        """Dispatch until stopped; an error is logged and followed by a pause."""
        async with anyio.create_task_group() as tasks:
            if self._listener is not None:
                tasks.start_soon(self._listener, self._on_message, self._on_state)
            await self._loop()
            tasks.cancel_scope.cancel()

    async def _loop(self) -> None:
        pause = Pause()
        while not self._stopping.is_set():
            # Reset before the step, not after it: a notification during the step must end the next wait.
            self._wake, notified, self._notified = anyio.Event(), self._notified, False
            self._stepping = True
            try:
                seconds = await self.step(notified=notified)
                pause.reset()
            except Exception as error:  # noqa: BLE001 - the relay goes on when the servers are back
                log.error("relay_failed", error=str(error), unsent=len(self._unsent))
                await pause.wait(self._stopping)
                continue
            finally:
                self._stepping = False
            if seconds > 0:
                with anyio.move_on_after(seconds):
                    await self._wake.wait()

    async def step(self, *, notified: bool = False) -> float:
        """Dispatch one batch, if there is one; returns the seconds until the next step."""
        if self._loss_detector is not None and self._loss_detector.barred:
            return LONGEST_PAUSE
        if self._doubted is not None:  # Redis did not answer: nothing more is claimed before it does
            await self._dispatcher.pulses([self._doubted])
            self._doubted = None
        if self._unnoted and monotonic() >= self._note_at:
            await self._note([])
        if self._unsent:
            await self._dispatch()
            return 0.0
        if notified and self._losses:
            # All relays are notified, and others have been faster lately: let them, one relay alone costs less.
            low, high = YIELD
            with anyio.move_on_after(min(high, low * 2**self._losses) * random.uniform(0.7, 1.3)):  # noqa: S311
                await self._stopping.wait()
        if monotonic() >= self._look_at:
            await self._look()
        taken = await self._take()
        if taken:
            self._losses, self._idle = 0, POLL[0]
            await self._dispatch()
            if monotonic() >= self._wake_at:  # under load it never rests
                self._wake_at = monotonic() + WAKE
                await self._outbox.wake()
            return 0.0
        if notified:
            self._losses = min(self._losses + 1, 10)
        return await self._rest()

    async def _look(self) -> None:
        """Look at nodes of flows whose predecessors ended at the same time; what is released is taken next."""
        again, idle = LOOK
        found = await self._outbox.look()
        if not found and not self.listening:
            again, idle = idle, POLL[1]
        self._look_at = monotonic() + (again if found else idle * random.uniform(0.8, 1.0))  # noqa: S311 - spreads load

    async def _take(self) -> list[Taken]:
        self._until = monotonic() + VALID
        if monotonic() >= self._retake_at:
            self._unsent = await self._outbox.retake()
            if self._unsent:  # there may be more
                return self._unsent
            self._retake_at = monotonic() + RETAKE * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load
            self._until = monotonic() + VALID
        self._unsent = await self._outbox.claim()
        return self._unsent

    async def _rest(self) -> float:
        due, waiting = await self._outbox.next_due()
        self._wake_at = monotonic() + WAKE
        if waiting is not None and waiting <= 0:
            if await self._outbox.wake():
                return 0.0
            waiting = self._idle = min(POLL[1], self._idle * 1.5)  # their rows are locked
        # Due now and not claimed by us: another relay is taking it.
        due = float("inf") if due is None else max(due, POLL[0])
        if waiting is not None:
            due = min(due, max(waiting, POLL[0]))
        due = min(due, max(0.0, self._look_at - monotonic()))
        if self._unnoted:
            due = min(due, max(POLL[0], self._note_at - monotonic()))
        if self.listening:
            return min(due, LONGEST_PAUSE * random.uniform(0.8, 1.0))  # noqa: S311 - spreads load
        self._idle = min(POLL[1], self._idle * 1.5)
        return min(due, self._idle * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load

    async def _dispatch(self) -> None:
        """Add the claimed jobs, queue by queue; a queue that refuses some does not hold up the others."""
        if monotonic() > self._until:  # too late: another relay may have taken them over, or will
            self._unsent = []
            return
        by_queue: dict[str, list[Taken]] = {}
        for job in self._unsent:
            by_queue.setdefault(job.queue, []).append(job)
        sent: list[tuple[Taken, str]] = []
        troubles: list[StreamworkerError] = []
        try:
            for queue, jobs in by_queue.items():
                try:
                    there, error = await self._send(queue, jobs)
                    sent += there
                    if error:
                        troubles.append(StreamworkerError(f"Redis refuses jobs of {queue}: {error}"))
                except Unreachable:
                    self._doubted = queue
                    raise
                except StreamworkerError as trouble:
                    troubles.append(trouble)
                self._unsent = [job for job in self._unsent if job.queue != queue]
        finally:
            await self._note(sent)
        if troubles:
            raise troubles[0]

    async def _send(self, queue: str, jobs: Sequence[Taken]) -> tuple[list[tuple[Taken, str]], str]:
        """(jobs that are in the queue now, each with the queue's epoch; why some are not)."""
        wire = [Dispatch(job.id, job.hop, job.level, job.body, job.epoch, job.key) for job in jobs]
        done = await self._dispatcher.dispatch(queue, wire, self._until)
        if done is None:
            log.info("relay_late", queue=queue, jobs=len(jobs), hint="they are taken over")
            return [], ""
        if queue not in self._met:
            await self._outbox.meet({queue: done.epoch})
            self._met.add(queue)
        if any(done.held):
            await self._outbox.put_off([job for job, held in zip(jobs, done.held, strict=True) if held])
        return [(job, done.epoch) for job, there in zip(jobs, done.there, strict=True) if there], done.error

    async def _note(self, sent: Sequence[tuple[Taken, str]]) -> None:
        self.dispatched += len(sent)
        noting, self._unnoted = [*self._unnoted, *sent], []
        if not noting:
            return
        try:
            locked = await self._outbox.note([job for job, _ in noting], [epoch for _, epoch in noting])
        except StreamworkerError:
            self._unnoted = noting
            raise
        # Redis remembers jobs until they are marked, so that a relay that takes them over does not add them again.
        self._unnoted = [(job, epoch) for job, epoch in noting if (job.queue, job.id) in locked][-MOST_UNNOTED:]
        self._note_at = monotonic() + NOTE_AGAIN
        by_queue: dict[str, list[Dispatch]] = {}
        for job, _ in noting:
            if (job.queue, job.id) not in locked:
                by_queue.setdefault(job.queue, []).append(Dispatch(job.id, job.hop, job.level, b""))
        for queue, jobs in by_queue.items():
            await self._dispatcher.forget(queue, jobs)

    # -- notifications

    def _on_message(self, message: str) -> None:
        if message == "queues":
            if self._loss_detector is not None:
                self._loss_detector.wake()
            return
        if message == "flows":
            self._look_at = 0.0
        self._notified = self._notified or message not in ("later", "flows")
        self._wake.set()

    def _on_state(self, listening: bool) -> None:
        self.listening = listening
        if self._loss_detector is not None:
            self._loss_detector.listen(listening)
        self._wake.set()  # for what was committed before LISTEN
