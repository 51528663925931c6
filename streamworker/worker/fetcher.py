"""Fetcher: the claim loop. It claims as many jobs as may start, prepares them, and runs groups of suspects apart."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from time import monotonic
from typing import Final

import anyio
import anyio.lowlevel

from streamworker import codec
from streamworker.broker import Consumer
from streamworker.codec import trace_id
from streamworker.errors import ConfigurationError, StreamworkerError
from streamworker.execution import Execution
from streamworker.job import Claim
from streamworker.loops import Pause
from streamworker.policy import SUSPECT_DELIVERIES, apart_from, group_sizes, half_of
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger
from streamworker.worker.admission import Admission
from streamworker.worker.executor import Executor
from streamworker.worker.host import Relays
from streamworker.worker.inflight import InFlight
from streamworker.worker.lookup import LedgerLookup
from streamworker.worker.recorder import LedgerOutage
from streamworker.worker.tasks import TURN, TURNS_TO_START

log = get_logger("streamworker.worker")

BLOCK: Final = 5.0
"""Seconds one claim waits for jobs."""
REFUSALS: Final = 3
"""Times in a row a password or a permission may be refused: an operator may be changing it right now."""
HALVING: Final = "one half of them at a time, to find the one that kills"
LOG_AGAIN: Final = 60.0
"""Seconds between two log lines about suspects."""
SETTLES: Final = 1.0
"""Most seconds after a group of suspects ended for which its settlement is waited for before the next claim."""
PREPARED: Final = 20
"""Claims that are prepared between two looks at the time."""
AHEAD: Final = 0.003
"""Seconds. As many jobs as end within them are claimed ahead of free slots: no slot stays empty for a round trip.
Where jobs take long that is none."""
RATE_OVER: Final = 0.05
"""Least seconds over which it is counted how many jobs end."""
UNSETTLED: Final = 1000
"""Finished runs of a queue that may wait to be settled before no more of it is claimed."""


class Fetcher:
    """Claims jobs until stopped, prepares each of them once, and passes them on.

    Args:
        broker: whose `claim` is called.
        in_flight: what this worker holds.
        executor: prepares runs.
        successor: the lookup in a worker with a ledger, else admission.
        settings: concurrency, and the caps of queues.
        most: jobs of one claim; where more end within `AHEAD`, so many.
        relay: whether due jobs are still on their way from the ledger; a burst waits for them.
        outage: nothing is claimed while the ledger is away; ``None`` without a ledger.
        stopping: set when nothing more is to be claimed.
        burst: set ``stopping`` when nothing is ready any more.
        refused: called when the server refuses this worker for good.
    """

    def __init__(
        self,
        broker: Consumer,
        in_flight: InFlight,
        executor: Executor,
        successor: LedgerLookup | Admission,
        settings: Settings,
        *,
        most: int,
        relay: Relays,
        outage: LedgerOutage | None,
        stopping: anyio.Event,
        burst: bool,
        refused: Callable[[ConfigurationError], None],
    ) -> None:
        self._broker = broker
        self._in_flight = in_flight
        self._executor = executor
        self._successor = successor
        self._concurrency = settings.concurrency
        self._caps = {spec.name: spec.cap for spec in settings.queues if spec.cap is not None}
        self._most = most
        self._relay = relay
        self._outage = outage
        self._stopping = stopping
        self._burst = burst
        self._refused = refused
        self._quiet = False
        self._suspects: deque[Execution] = deque()
        self._capped: list[Execution] = []
        self._apart: list[Execution] = []
        self._groups = group_sizes(settings.max_deliveries, settings.concurrency)
        self._claimed = 0
        self._ended = 0
        self._counted_at = monotonic()
        self._ahead = 0
        self._log_at: dict[str, float] = {}
        self.ended: Final = anyio.Event()
        self.asking_since: float | None = None
        """When the claims began of which none has succeeded yet (time.monotonic); ``None`` while none is made."""
        self.trouble: str | None = None
        """Why the last turn failed."""
        self.shut = False
        """Nothing is claimed, because there is no ledger to record it in."""

    async def run(self) -> None:
        """Claim; an error is logged and followed by a pause."""
        pause, refusals = Pause(), 0
        while not self._stopping.is_set():
            try:
                await self._turn()
                pause.reset()
                refusals, self.trouble = 0, None
            except Exception as error:
                self.trouble = str(error) or type(error).__name__
                log.error("main_loop_error", error=str(error), type=type(error).__name__)
                log.debug("main_loop_error_traceback", exc_info=error)
                refusals = refusals + 1 if isinstance(error, ConfigurationError) else 0
                if isinstance(error, ConfigurationError) and refusals >= REFUSALS:
                    self._refused(error)
                    break
                await pause.wait(self._stopping)
        self.ended.set()

    @property
    def notice(self) -> str:
        """Why fewer jobs run here than could, in a sentence for operators; empty if there is no reason."""
        running = [run for run in self._apart if run.outcome is None]
        if running:
            jobs, deaths = _jobs(len(running)), running[0].deliveries - 1
            return f"{jobs} with which {deaths} workers died, run apart; nothing else is claimed here until they end"
        if self._suspects:
            return f"{_jobs(len(self._suspects))} with which several workers died, wait to run apart"
        group = self._group()
        if group:
            return (
                f"{_jobs(group)} with which two workers died, run here, in at most half of the concurrency; {HALVING}"
            )
        return ""

    def _group(self) -> int:
        return sum(run.claim.count >= SUSPECT_DELIVERIES and run.outcome is None for run in self._in_flight.snapshot())

    def _log_suspects(self, event: str, **facts: int | str) -> None:
        """Log once a minute that suspects run here, and how."""
        if monotonic() >= self._log_at.get(event, 0.0):
            self._log_at[event] = monotonic() + LOG_AGAIN
            log.warning(event, **facts)

    def abandon_waiting(self) -> list[Execution]:
        """Remove and return the suspects that wait to run apart and the runs of queues at their cap."""
        waiting = [*self._suspects, *self._capped]
        self._suspects, self._capped = deque(), []
        return waiting

    async def _turn(self) -> None:
        in_flight = self._in_flight
        if self._capped:
            self._start_capped()
        if self._suspects or any(run.outcome is None for run in self._apart):
            self.asking_since = None
            await self._run_apart()
            return
        self.asking_since = self.asking_since or monotonic()
        self.shut = self._outage is not None and self._outage.is_on()
        if self.shut:
            self.asking_since = None
            await in_flight.changed(0.5)
            return
        ahead = self._claimed_ahead()
        free = self._concurrency - in_flight.busy + ahead
        if free <= 0:
            self.asking_since = None
            await in_flight.changed()
            return
        limit = min(free, max(self._most, ahead))
        claims = await self._claim(limit)
        self.asking_since = None
        self._claimed += len(claims)
        await self._admit(claims)
        if claims:
            self._quiet = False
            if len(claims) < limit:  # no more are ready: what was claimed starts before the next look
                for _ in range(TURNS_TO_START):
                    await asyncio.sleep(0)  # a checkpoint of anyio takes ten times as long
        if self._burst and not claims:
            await self._look_for_the_end()

    def _claimed_ahead(self) -> int:
        """How many jobs may be claimed beyond the free slots: as many as are about to end, and at most as may run."""
        now = monotonic()
        if (over := now - self._counted_at) >= RATE_OVER:
            ended = self._claimed - self._in_flight.busy
            self._ahead = min(int((ended - self._ended) / over * AHEAD), self._concurrency)
            self._ended, self._counted_at = ended, now
        return self._ahead

    async def _claim(self, limit: int) -> list[Claim]:
        """Claim. When a queue that is at its cap or shut opens again the wait ends: more of it may be claimed."""
        wait, in_flight, shut = 0.0 if self._burst else BLOCK, self._in_flight, self._shut_queues()
        closed = shut | self._full_queues()
        if not closed or not wait:
            return await self._broker.claim(limit, wait, in_flight, in_flight.ended, shut)
        claims: list[Claim] = []
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch, closed)
            try:
                claims = await self._broker.claim(limit, wait, in_flight, in_flight.ended, shut)
            except Exception as error:  # noqa: BLE001 - raised below, outside of the group that would wrap it
                failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return claims

    def _full_queues(self) -> frozenset[str]:
        """Queues of which as many jobs run as their cap allows."""
        running = self._running() if self._caps else Counter[str]()
        return frozenset(queue for queue, cap in self._caps.items() if running[queue] >= cap)

    def _shut_queues(self) -> frozenset[str]:
        """Queues of which too many endings wait to be settled: nothing more of them is claimed."""
        in_flight, most = self._in_flight, UNSETTLED + self._concurrency
        if len(in_flight) - in_flight.busy <= most:
            return frozenset()
        unsettled = Counter(run.claim.queue for run in in_flight.snapshot() if run.outcome is not None)
        return frozenset(queue for queue, count in unsettled.items() if count > most)

    async def _watch(self, closed: frozenset[str]) -> None:
        """End the waiting claim when one of these queues is neither at its cap nor shut any more; until cancelled."""
        while True:
            await self._in_flight.changed()
            if closed - self._full_queues() - self._shut_queues():
                with suppress(StreamworkerError):  # then the wait ends by itself
                    await self._broker.look_again()

    async def _look_for_the_end(self) -> None:
        """In a burst: stop once nothing is in flight, on its way, due or ready."""
        if self._in_flight:
            self._quiet = False
            await self._in_flight.changed(0.1)
        elif self._quiet:
            self._stopping.set()
        elif await self._relay.unsent():
            await self._in_flight.changed(0.02)
        else:
            self._quiet = True  # that may make jobs ready: claim once more
            await self._broker.promote()

    async def _admit(self, claims: list[Claim]) -> None:
        """Take claims in; the event loop turns in between where preparing them takes long."""
        until = monotonic() + TURN
        for start in range(0, len(claims), PREPARED):
            if monotonic() > until:
                await anyio.lowlevel.checkpoint()
                until = monotonic() + TURN
            # In a copy: decoding runs users' code, and what it does to its context must not stay in this task's.
            copy_context().run(self._prepare, claims[start : start + PREPARED])
        if self._capped:
            self._start_capped()

    def _prepare(self, claims: list[Claim]) -> None:
        """Prepare these claims and pass them on."""
        prepare, caps, ready = self._executor.prepare, self._caps, []
        for run in self._in_flight.admit(claims):
            prepare(run)
            claim = run.claim
            if claim.count > 1:
                self._recovered(run)
            if run.suspect and run.outcome is None:
                self._suspects.append(run)
            elif caps and claim.queue in caps:
                self._capped.append(run)
            else:
                ready.append(run)
        self._successor.put_all(ready)

    def _recovered(self, run: Execution) -> None:
        """Count and log a job that was delivered before."""
        claim = run.claim
        self._in_flight.counts.recovered += 1
        log_recovered(run)
        if claim.count >= SUSPECT_DELIVERIES and not claim.suspect:
            hint = f"two workers died with them: {HALVING}; fresh jobs go on beside"
            self._log_suspects("suspects_running", queue=claim.queue, jobs=self._group(), hint=hint)

    def _start_capped(self) -> None:
        """Pass on what the caps allow. A blocking read may bring one job a level; the rest waits here."""
        running, waiting = self._running(), self._capped
        self._capped = []
        for run in waiting:
            queue = run.claim.queue
            if run.outcome is None and running[queue] >= self._caps[queue]:
                self._capped.append(run)
            else:
                running[queue] += 1
                self._successor.put(run)

    def _running(self) -> Counter[str]:
        """How many jobs of each queue run, without those that wait for their cap."""
        running = Counter(run.claim.queue for run in self._in_flight.snapshot() if run.outcome is None)
        running.subtract(run.claim.queue for run in self._capped if run.outcome is None)
        return running

    async def _run_apart(self) -> None:
        """Wait until everything else has ended, then run one group of suspects: it can take no other job along."""
        in_flight = self._in_flight
        while in_flight.busy > len(self._suspects):
            if self._stopping.is_set():
                return
            await in_flight.changed(1.0)
            self._start_capped()
        self._apart = []
        group = self._next_group()
        for run in group:
            self._suspects.remove(run)
            if run.claim.suspect and not await self._confirmed(run):
                in_flight.finished()
                in_flight.forget(run)
                continue
            self._apart.append(run)
            self._successor.put(run)
        if not self._apart:
            return
        first = self._apart[0]
        hint = f"their workers died again and again: {HALVING}; fresh jobs go on on other workers, and here afterwards"
        self._log_suspects(
            "suspects_apart", queue=first.claim.queue, jobs=len(self._apart), deliveries=first.deliveries, hint=hint
        )
        while any(run.outcome is None for run in self._apart) and not self._stopping.is_set():
            await in_flight.changed(1.0)
        # Settled, too: a worker that holds something is not idle, and leaves the next suspects to others for a while.
        with anyio.move_on_after(SETTLES):
            while any(in_flight.find(run.claim) is run for run in self._apart) and not self._stopping.is_set():
                await in_flight.changed()

    def _next_group(self) -> list[Execution]:
        """The suspects that run next: of one delivery and one half, and as many as that delivery may have."""
        if not self._suspects:
            return []
        first = self._suspects[0]
        at = first.deliveries - apart_from(self._groups) + (len(self._groups) > 1)
        most = self._groups[at] if at < len(self._groups) else 1
        half = half_of(first.claim.entry, first.deliveries)
        group = [
            run
            for run in self._suspects
            if run.deliveries == first.deliveries and half_of(run.claim.entry, run.deliveries) == half
        ]
        return group[:most]

    async def _confirmed(self, run: Execution) -> bool:
        """Count the delivery of a reserved suspect; False if the claim is lost."""
        run.settling = True  # not renewed while its delivery count changes, or the thread would report it lost
        try:
            claim = await self._broker.confirm(run.claim)
        except Exception:
            # Counted or not: drop it here; the next claim finds it with its count.
            self._in_flight.finished()
            self._in_flight.forget(run)
            raise
        if claim is None:
            return False
        run.claim, run.settling = claim, False
        return True


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def log_recovered(run: Execution) -> None:
    """Log that a job came from a worker that died, or that lost its claim."""
    claim, reading = run.claim, run.reading
    if reading is None:  # it has no id
        log.info("job_recovered", queue=claim.queue, entry=claim.entry.decode(), deliveries=claim.count)
        return
    trace = trace_id(reading.headers)
    log.info(
        "job_recovered",
        job_id=run.job_id,
        kind=reading.kind or "",
        queue=claim.queue,
        attempt=(reading.attempt_count or 0) + 1,
        entry=claim.entry.decode(),
        deliveries=claim.count + codec.state_of(reading, claim.secret).deliveries,
        **({"trace_id": trace} if trace is not None else {}),
    )
