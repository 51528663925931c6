"""What lies between claiming, running and settling: nothing, or the stages of a worker that has a ledger.

With a ledger jobs are looked up before they run, and recorded before they are settled. Without one a run goes straight
from the claim loop to its task and from there to the settle loop, as if these stages did not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from time import monotonic, time
from typing import Final, Protocol

import anyio

from streamworker.errors import StreamworkerError, Unreachable
from streamworker.execution import Execution
from streamworker.job import Cancelled, Dead, Recorded, ReleaseAt, RetryAt
from streamworker.loops import Pause
from streamworker.policy import DONE
from streamworker.postgres import FINAL, Effect, JobKey, Known, Ledger
from streamworker.relay import Dispatcher
from streamworker.telemetry.logs import get_logger
from streamworker.worker.batching import each_of
from streamworker.worker.executor import Executor
from streamworker.worker.inflight import Counts, InFlight
from streamworker.worker.recorder import SUPERSEDED, LaterHops, LedgerOutage, Recorder, begun, decided, hop_of, outrank
from streamworker.worker.settler import Settler
from streamworker.worker.tasks import JobTasks

log = get_logger("streamworker.worker")

LONG: Final = 1.0
"""Seconds after which a run is noted as running."""
INTERVAL: Final = 0.5
TIDY_PAUSE: Final = 30.0
"""Seconds before tidying is tried again after an error."""


class RunningMarker:
    """Ticks until closed.

    Args:
        ledger: told.
        running: the runs whose handlers are at work.
    """

    def __init__(self, ledger: Ledger, running: Callable[[], Collection[Execution]]) -> None:
        self._ledger = ledger
        self._running = running
        self._noted: set[Execution] = set()
        self._stop = anyio.Event()
        self._logged = ""
        self._tidy_at = monotonic() + INTERVAL

    def close(self) -> None:
        """End the loop."""
        self._stop.set()

    async def run(self) -> None:
        """Note and tidy; what goes wrong here is tried again, and disturbs nobody."""
        while not self._stop.is_set():
            with anyio.move_on_after(INTERVAL):
                await self._stop.wait()
                return
            try:
                await self._note()
                self._logged = ""
            except Unreachable:
                continue  # the recorder and the lookup say so
            except Exception as error:  # noqa: BLE001 - a main loop never crashes
                if str(error) != self._logged:
                    log.error("noting_failed", error=str(error))
                self._logged = str(error)
            await self._tidy()

    async def _note(self) -> None:
        running = self._running()
        self._noted.intersection_update(running)
        long_ago = monotonic() - LONG
        # A run in its own transaction holds its record: waiting for that would only hold up the others.
        new = [
            run
            for run in running
            if run.started is not None
            and run.started < long_ago
            and run not in self._noted
            and (run.context is None or run.context.effect is not Effect.OPEN)
        ]
        if new:
            begun_at = time() - monotonic()
            for run in new:
                run.new = False  # whatever comes of this
            await self._ledger.running([begun(run, begun_at) for run in new])
            self._noted.update(new)

    async def _tidy(self) -> None:
        if monotonic() < self._tidy_at:
            return
        try:
            seconds = await self._ledger.tick()
        except Unreachable:
            seconds = TIDY_PAUSE
        except Exception as error:  # noqa: BLE001 - pruning is never urgent
            log.error("pruning_failed", error=str(error))
            seconds = TIDY_PAUSE
        self._tidy_at = monotonic() + seconds


TOGETHER: Final = 100
"""Jobs that make a good batch."""


class Stages(Protocol):
    """What a worker knows of them.

    Attributes:
        put: takes a claimed run on its way to its task.
        finish: takes a run that has its outcome.
        closed: whether nothing may be claimed right now; ``None`` if that never happens.
    """

    put: Callable[[Execution], None]
    finish: Callable[[Execution], None]
    closed: Callable[[], bool] | None

    def most(self, limit: int) -> int:
        """Most jobs of one claim: what all stages get through best."""

    def abandon_waiting(self) -> list[Execution]:
        """Runs that were not started yet; they do not wait any more afterwards."""

    async def run(self) -> None:
        """Run until closed."""

    async def close(self, within: float) -> None:
        """End them; what cannot be recorded ``within`` seconds is handed back."""


def stages(
    record: tuple[Ledger, Dispatcher] | None,
    executor: Executor,
    executions: JobTasks,
    settler: Settler,
    holdings: InFlight,
) -> Stages:
    """The stages of a worker.

    Args:
        record: the ledger, if there is one, and what looks for the jobs that it knows.
        executor: prepares runs.
        executions: where runs go that may run.
        settler: where runs go that have ended.
        holdings: what is held.
    """
    if record is None:
        return Straight(executions, settler)
    return Bookkeeping(*record, executor, executions, settler, holdings)


class Straight:
    """No ledger."""

    def __init__(self, executions: JobTasks, settler: Settler) -> None:
        self.put: Callable[[Execution], None] = executions.put
        self.finish: Callable[[Execution], None] = settler.add
        self.closed: Callable[[], bool] | None = None

    def most(self, limit: int) -> int:
        """Half of what may run, so that Redis fetches while Python runs what came before."""
        return max(1, limit // 2)

    def abandon_waiting(self) -> list[Execution]:
        """See `Stages.abandon_waiting`."""
        return []

    async def run(self) -> None:
        """See `Stages.run`."""

    async def close(self, within: float) -> None:
        """See `Stages.close`."""


class Bookkeeping:
    """Lookup before running, record before settling, and the slow loop beside them."""

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        executor: Executor,
        executions: JobTasks,
        settler: Settler,
        holdings: InFlight,
    ) -> None:
        self._ledger = ledger
        outage, later = LedgerOutage(), LaterHops(ledger, dispatcher)
        self._lookup = Lookup(ledger, executor, executions.put, later=later, counts=holdings.counts, outage=outage)
        self._recorder = Recorder(ledger, settler, holdings, outage, later)
        self._noting = RunningMarker(ledger, lambda: list(each_of(executions.running)))
        self.put: Callable[[Execution], None] = self._lookup.put
        self.finish: Callable[[Execution], None] = self._recorder.add
        self.closed: Callable[[], bool] | None = outage.is_on
        settler.judge = decided

    def most(self, limit: int) -> int:
        """More where few may run: what is claimed together is looked up together, and records go on meanwhile."""
        return max(min(limit, TOGETHER), limit // 2)

    def abandon_waiting(self) -> list[Execution]:
        """See `Stages.abandon_waiting`."""
        return self._lookup.abandon()

    async def run(self) -> None:
        """See `Stages.run`."""
        async with anyio.create_task_group() as loops:
            loops.start_soon(self._lookup.run)
            loops.start_soon(self._lookup.weigh)
            loops.start_soon(self._recorder.run)
            loops.start_soon(self._noting.run)

    async def close(self, within: float) -> None:
        """See `Stages.close`."""
        self._lookup.close()
        self._noting.close()
        with anyio.move_on_after(within):
            await self._recorder.close(within)
        self._ledger.abandon()
        await self._recorder.ended.wait()


class Lookup:
    """Prepares claimed runs and looks them up before they run.

    Args:
        ledger: what is asked.
        executor: prepares runs: their ids and hops stand in their documents.
        put: starts a run; one that need not run has its outcome.
        later: looks for later hops.
        counts: what operators see.
        outage: told whether there was an answer.
    """

    def __init__(
        self,
        ledger: Ledger,
        executor: Executor,
        put: Callable[[Execution], None],
        *,
        later: LaterHops,
        counts: Counts,
        outage: LedgerOutage,
    ) -> None:
        self._ledger = ledger
        self._executor = executor
        self._put = put
        self._later = later
        self._counts = counts
        self._outage = outage
        self._waiting: list[Execution] = []
        self._asking: list[Execution] = []
        self._doubts: list[tuple[Execution, Known]] = []
        self._doubted = asyncio.Event()
        self._wake = asyncio.Event()
        self._stop = anyio.Event()

    def put(self, run: Execution) -> None:
        """Take a run in."""
        if run.outcome is None:
            self._executor.prepare(run)
        if run.reading is None:  # nobody can say which job it is
            self._put(run)
            return
        self._waiting.append(run)
        self._wake.set()

    def abandon(self) -> list[Execution]:
        """Runs that were not started; they do not wait any more afterwards."""
        waiting = self._asking + self._waiting + [run for run, _ in self._doubts]
        self._asking, self._waiting, self._doubts = [], [], []
        return waiting

    def close(self) -> None:
        """End the loop."""
        self._stop.set()
        self._wake.set()
        self._doubted.set()

    async def run(self) -> None:
        """Ask until closed; an error is followed by a pause, and the question asked again."""
        pause = Pause(longest=5.0)
        while not self._stop.is_set():
            if not self._waiting:
                await self._wake.wait()
                self._wake.clear()
                continue
            batch, self._waiting = self._waiting, []
            self._asking = batch
            try:
                known = await self._ledger.lookup([(run.claim.queue, run.job_id) for run in batch])
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; what it holds is tried again
                if isinstance(error, StreamworkerError):
                    self._outage.began("lookup", error)
                else:
                    log.error("lookup_failed", jobs=len(batch), error=str(error))
                self._waiting, self._asking = self._asking + self._waiting, []
                await pause.wait(self._stop)
                continue
            self._outage.over("lookup")
            pause.reset()
            batch, self._asking = self._asking, []  # empty if they were given back meanwhile
            doubts = self._judged(batch, known) if known else []
            if doubts:
                self._doubts += doubts
                self._doubted.set()
                doubtful = {run for run, _ in doubts}
                batch = [run for run in batch if run not in doubtful]
            elif not known:
                for run in batch:
                    run.new = True
            for run in batch:
                self._put(run)

    def _judged(self, batch: list[Execution], known: dict[JobKey, Known]) -> list[tuple[Execution, Known]]:
        """Apply what is known; those of which it has to be seen whether they go on elsewhere."""
        doubts = []
        for run in batch:
            found = known.get((run.claim.queue, run.job_id))
            if found is None:
                run.new = True
            elif found.status not in FINAL and found.hop > hop_of(run):
                doubts.append((run, found))
            else:
                self._apply(run, verdict_of(found, run))
        return doubts

    async def weigh(self) -> None:
        """Look for later hops until closed, beside the others: most jobs need none of it, and must not wait for it."""
        pause = Pause(longest=5.0)
        while not self._stop.is_set():
            if not self._doubts:
                await self._doubted.wait()
                self._doubted.clear()
                continue
            doubts = list(self._doubts)
            try:
                answers = await self._later.elsewhere(doubts)
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; what it holds is tried again
                log.error("later_hops_unknown", jobs=len(doubts), error=str(error))
                await pause.wait(self._stop)
                continue
            pause.reset()
            held, self._doubts = set(map(_first, self._doubts)), self._doubts[len(doubts) :]
            for (run, _), why in zip(doubts, answers, strict=True):
                if run in held:  # not given back meanwhile
                    self._apply(run, Recorded(DONE, why) if why else None)
                    self._put(run)

    def _apply(self, run: Execution, recorded: Recorded | None) -> None:
        if recorded is None or (isinstance(run.outcome, Cancelled) and recorded.why != SUPERSEDED):
            return
        run.outcome = recorded
        if recorded.verdict is DONE:
            self._counts.skipped += 1
        log.info("job_known", job_id=run.job_id, kind=run.kind, queue=run.claim.queue, reason=recorded.why)


def verdict_of(known: Known, run: Execution) -> Recorded | None:
    """What the record says about a claim, instead of running it; ``None`` if it may run.

    Args:
        known: the record, of no later hop; if it is above the run all the same, and the run may go on, it is outranked.
        run: prepared.
    """
    if known.status in FINAL:
        return Recorded(DONE, known.status)
    if known.hop < hop_of(run):
        return None
    # A verdict was recorded for this hop, and its worker died before it could settle.
    attempts = run.reading.attempt_count or 0 if run.reading is not None else 0
    charged = known.attempts > attempts
    if known.status == "retrying" and known.run_at is not None:
        verdict = RetryAt(known.run_at, known.error) if charged else ReleaseAt(known.run_at, known.error)
        return Recorded(verdict, "retrying")
    if known.status == "dead" and known.deliveries < run.deliveries:
        # Not above: then it is no second delivery, but somebody enqueued the job anew, and it may run.
        reason, _, error = known.error.partition(": ")
        return Recorded(Dead(reason, error, charged=charged), "dead")
    if known.deliveries > run.deliveries:  # an id that is used anew, or a server that counts from an earlier state
        outrank(run, known)
    return None


def _first(doubt: tuple[Execution, Known]) -> Execution:
    return doubt[0]
