"""The claim loop: never more than the free slots, orphans and new jobs as the broker orders them, suspects alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from time import monotonic
from typing import Final

import anyio

from streamworker import codec
from streamworker.broker import Consumer
from streamworker.codec import trace_id
from streamworker.errors import ConfigurationError, InvalidJob, StreamworkerError
from streamworker.execution import Execution
from streamworker.job import Claim
from streamworker.loops import Pause
from streamworker.policy import SUSPECT_DELIVERIES
from streamworker.telemetry.logs import get_logger
from streamworker.worker.inflight import InFlight

log = get_logger("streamworker.worker")

BLOCK: Final = 5.0
"""Seconds one claim waits for jobs."""
REFUSALS: Final = 3
"""Times in a row a password or a permission may be refused: somebody may be changing it right now."""
SAY_AGAIN: Final = 60.0
"""Seconds before it is said again that suspects run here."""
SETTLES: Final = 1.0
"""Most seconds after a suspect's run in which nothing is claimed because it is not settled yet."""
UNSETTLED: Final = 1000
"""Finished runs of a queue that may wait to be settled before no more of it is claimed."""


class Fetcher:
    """Claims until told to stop.

    Args:
        broker: whose `claim` is called.
        holdings: what this worker holds.
        put: hands a run to the slots.
        concurrency: slots.
        most: jobs of one claim, whatever room there is.
        max_deliveries: a suspect beyond them does not run any more, and need not wait to run alone.
        caps: most jobs of a queue that run here at once.
        stopping: set when nothing more shall be claimed.
        burst: set ``stopping`` when nothing is ready any more.
        unsent: whether due jobs are still on their way from the ledger; a burst waits for them.
        fatal: told when the server keeps refusing us for good.
        closed: whether nothing may be claimed right now.
    """

    def __init__(
        self,
        broker: Consumer,
        holdings: InFlight,
        put: Callable[[Execution], None],
        *,
        concurrency: int,
        most: int,
        max_deliveries: int,
        caps: Mapping[str, int],
        stopping: anyio.Event,
        burst: bool,
        unsent: Callable[[], Awaitable[bool]],
        fatal: Callable[[ConfigurationError], None],
        closed: Callable[[], bool] | None = None,
    ) -> None:
        self._broker = broker
        self._holdings = holdings
        self._put = put
        self._concurrency = concurrency
        self._most = most
        self._max_deliveries = max_deliveries
        self._caps = caps
        self._stopping = stopping
        self._burst = burst
        self._unsent = unsent
        self._fatal = fatal
        self._closed = closed
        self._quiet = False
        self._suspects: deque[Execution] = deque()
        self._capped: list[Execution] = []
        self._alone: Execution | None = None
        self._say_at: dict[str, float] = {}
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
                    self._fatal(error)
                    break
                await pause.wait(self._stopping)
        self.ended.set()

    def may_run(self, run: Execution) -> bool:
        """Asked by a slot about a suspect; not now means that the claim loop will run it alone."""
        if run is self._alone:
            return True
        self._suspects.append(run)
        self._holdings.stir()
        return False

    @property
    def notice(self) -> str:
        """Why fewer jobs run here than could, in a sentence for operators; empty if there is no reason."""
        if self._alone is not None and self._alone.outcome is None:
            deaths = self._alone.deliveries - 1
            return f"a job with which {deaths} workers died runs alone, and nothing else is claimed here until it ends"
        if self._suspects:
            return f"{len(self._suspects)} jobs with which several workers died wait to run alone"
        group = self._group()
        if group:
            return f"{group} jobs with which two workers died run here, in at most half of the slots"
        return ""

    def _group(self) -> int:
        return sum(run.claim.count >= SUSPECT_DELIVERIES and run.outcome is None for run in self._holdings.snapshot())

    def _say_suspects(self, event: str, **facts: int | str) -> None:
        """Say that suspects run here, and how, once a minute."""
        if monotonic() >= self._say_at.get(event, 0.0):
            self._say_at[event] = monotonic() + SAY_AGAIN
            log.warning(event, **facts)

    def abandon_waiting(self) -> list[Execution]:
        """Suspects that wait to run alone and runs that wait for their cap; they do not wait any more afterwards."""
        waiting = [*self._suspects, *self._capped]
        self._suspects, self._capped = deque(), []
        return waiting

    async def _turn(self) -> None:
        holdings = self._holdings
        if self._capped:
            self._start_capped()
        if self._suspects:
            self.asking_since = None
            await self._run_alone()
            return
        self.asking_since = self.asking_since or monotonic()
        self.shut = self._closed is not None and self._closed()
        if self.shut:
            self.asking_since = None
            await holdings.changed(0.5)
            return
        room = self._concurrency - holdings.busy
        if room <= 0:
            self.asking_since = None
            await holdings.changed()
            return
        claims = await self._claim(min(room, self._most))
        self.asking_since = None
        self._admit(claims)
        if claims:
            self._quiet = False
        if self._burst and not claims:
            await self._look_for_the_end()

    async def _claim(self, limit: int) -> list[Claim]:
        """Claim; an ending of a queue at its cap ends the wait, because there is room for one more of it."""
        wait, holdings, shut = 0.0 if self._burst else BLOCK, self._holdings, self._shut_queues()
        if not self._caps:
            return await self._broker.claim(limit, wait, holdings, shut=shut)
        held = Counter(run.claim.queue for run in holdings.snapshot() if run.outcome is None)
        full = {queue for queue, cap in self._caps.items() if held[queue] >= cap}
        if not full or not wait:
            return await self._broker.claim(limit, wait, holdings, holdings.ended, shut)
        claims: list[Claim] = []
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch_for_room, full)
            try:
                claims = await self._broker.claim(limit, wait, holdings, holdings.ended, shut)
            except Exception as error:  # noqa: BLE001 - raised below, outside of the group that would wrap it
                failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return claims

    def _shut_queues(self) -> frozenset[str]:
        """Queues of which too many endings wait to be settled: nothing more of them is claimed, all others go on."""
        holdings, most = self._holdings, UNSETTLED + self._concurrency
        if len(holdings) - holdings.busy <= most:
            return frozenset()
        unsettled = Counter(run.claim.queue for run in holdings.snapshot() if run.outcome is not None)
        return frozenset(queue for queue, count in unsettled.items() if count > most)

    async def _watch_for_room(self, full: Collection[str]) -> None:
        """Tell the waiting claim that a queue which was at its cap has room again; until cancelled."""
        while True:
            await self._holdings.changed()
            running = self._running()
            if any(running[queue] < self._caps[queue] for queue in full):
                with suppress(StreamworkerError):  # then the wait ends by itself
                    await self._broker.look_again()

    async def _look_for_the_end(self) -> None:
        """In a burst: stop once nothing is held, nothing on its way, nothing due, and nothing ready."""
        if self._holdings:
            self._quiet = False
            await self._holdings.changed(0.1)
        elif self._quiet:
            self._stopping.set()
        elif await self._unsent():
            await self._holdings.changed(0.02)
        else:
            self._quiet = True  # what is due by now may come from this; one more claim will tell
            await self._broker.promote()

    def _admit(self, claims: list[Claim]) -> None:
        holdings, put = self._holdings, self._put
        for claim in claims:
            run = holdings.admit(claim)
            if run is None:
                continue
            if claim.count > 1:
                holdings.counts.recovered += 1
                tell_recovered(claim)
            if claim.count >= SUSPECT_DELIVERIES and not claim.suspect:
                hint = "two workers died with them; they fill at most half of the slots, and fresh jobs go on beside"
                self._say_suspects("suspects_running", queue=claim.queue, jobs=self._group(), hint=hint)
            if claim.suspect and claim.count < self._max_deliveries:
                self._suspects.append(run)
            elif claim.queue in self._caps:
                self._capped.append(run)
            else:
                put(run)
        if self._capped:
            self._start_capped()

    def _start_capped(self) -> None:
        """Start what the caps allow: a blocking read may bring one job a level, and the rest waits its turn."""
        running, waiting = self._running(), self._capped
        self._capped = []
        for run in waiting:
            queue = run.claim.queue
            if run.outcome is None and running[queue] >= self._caps[queue]:
                self._capped.append(run)
            else:
                running[queue] += 1
                self._put(run)

    def _running(self) -> Counter[str]:
        """How many jobs of each queue run; those that wait for their cap do not."""
        running = Counter(run.claim.queue for run in self._holdings.snapshot() if run.outcome is None)
        running.subtract(run.claim.queue for run in self._capped if run.outcome is None)
        return running

    async def _run_alone(self) -> None:
        """Let everything else finish, then run one suspect by itself: it shall not take its neighbours along."""
        holdings = self._holdings
        while holdings.busy > len(self._suspects):
            if self._stopping.is_set():
                return
            await holdings.changed(1.0)
            self._start_capped()
        run = self._suspects.popleft()
        if run.claim.suspect and not await self._confirmed(run):
            holdings.finished()
            holdings.forget(run)
            return
        self._alone = run
        hint = "its workers died again and again; fresh jobs go on on other workers, and here when it has ended"
        self._say_suspects("suspect_alone", queue=run.claim.queue, deliveries=run.claim.count, hint=hint)
        self._put(run)
        while run.outcome is None and not self._stopping.is_set():
            await holdings.changed(1.0)
        # Settled, too: who holds something is not idle, and would leave the next suspect to others for a while.
        with anyio.move_on_after(SETTLES):
            while holdings.find(run.claim) is run and not self._stopping.is_set():
                await holdings.changed()

    async def _confirmed(self, run: Execution) -> bool:
        """Count the delivery of a reserved suspect; False if it is not ours any more."""
        run.settling = True  # not renewed while its delivery count changes, or the thread would report it lost
        try:
            claim = await self._broker.confirm(run.claim)
        except Exception:
            # Counted or not, nobody knows: let go of it; the next claim finds it with the count it has.
            self._holdings.finished()
            self._holdings.forget(run)
            raise
        if claim is None:
            return False
        run.claim, run.settling = claim, False
        return True


def tell_recovered(claim: Claim) -> None:
    """Log that a job came from a worker that died, or vanished with it."""
    try:
        reading = codec.read(claim.body or b"")
    except InvalidJob:  # it has no id to be told by
        log.info("job_recovered", queue=claim.queue, entry=claim.entry.decode(), deliveries=claim.count)
        return
    trace = trace_id(reading.headers)
    log.info(
        "job_recovered",
        job_id=codec.job_id(reading, claim),
        kind=reading.kind or "",
        queue=claim.queue,
        attempt=(reading.attempt_count or 0) + 1,
        entry=claim.entry.decode(),
        deliveries=claim.count + codec.state_of(reading, claim.secret).deliveries,
        **({"trace_id": trace} if trace is not None else {}),
    )
