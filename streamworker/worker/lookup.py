"""LedgerLookup and RunningMarker: what a worker with a ledger does before jobs run and while they run.

Without a ledger neither exists. Recording follows the run, see `recorder`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic, time
from typing import Final

import anyio

from streamworker.errors import StreamworkerError, Unreachable
from streamworker.execution import Execution
from streamworker.job import Cancelled, Dead, Recorded, ReleaseAt, RetryAt
from streamworker.loops import Pause
from streamworker.policy import DONE
from streamworker.postgres import FINAL, Effect, JobKey, Known, Ledger
from streamworker.telemetry.logs import get_logger
from streamworker.worker.admission import Admission
from streamworker.worker.batching import each_of
from streamworker.worker.inflight import WorkerCounts
from streamworker.worker.recorder import PARKED, SUPERSEDED, WAITING, WorkerLedger, begun, hop_of, outrank
from streamworker.worker.tasks import JobTasks

log = get_logger("streamworker.worker")

LONG: Final = 1.0
"""Seconds after which a run is recorded as running."""
INTERVAL: Final = 0.5
TIDY_PAUSE: Final = 30.0
"""Seconds before pruning is tried again after an error."""


class RunningMarker:
    """Records long runs as running, and prunes the ledger now and then.

    Args:
        ledger: where they are recorded.
        tasks: run the jobs.
    """

    def __init__(self, ledger: Ledger, tasks: JobTasks) -> None:
        self._ledger = ledger
        self._tasks = tasks
        self._marked: set[Execution] = set()
        self._stop = anyio.Event()
        self._logged = ""
        self._tidy_at = monotonic() + INTERVAL

    def close(self) -> None:
        """End the loop."""
        self._stop.set()

    async def run(self) -> None:
        """Mark and prune until closed; errors are logged, and the next turn tries again."""
        while not self._stop.is_set():
            with anyio.move_on_after(INTERVAL):
                await self._stop.wait()
                return
            try:
                await self._mark()
                self._logged = ""
            except Unreachable:
                continue  # the recorder and the lookup log it
            except Exception as error:  # noqa: BLE001 - a main loop never crashes
                if str(error) != self._logged:
                    log.error("noting_failed", error=str(error))
                self._logged = str(error)
            await self._tidy()

    async def _mark(self) -> None:
        running = list(each_of(self._tasks.running))
        self._marked.intersection_update(running)
        long_ago = monotonic() - LONG
        # A run in its own transaction has locked its record: waiting for that would hold up the others.
        new = [
            run
            for run in running
            if run.started is not None
            and run.started < long_ago
            and run not in self._marked
            and (run.context is None or run.context.effect is not Effect.OPEN)
        ]
        if new:
            begun_at = time() - monotonic()
            for run in new:
                run.new = False  # even if this fails
            await self._ledger.running([begun(run, begun_at) for run in new])
            self._marked.update(new)

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


class LedgerLookup:
    """Looks prepared runs up in the ledger before they run: one that has ended before does not run again.

    Args:
        record: asked.
        admission: the next stage.
        counts: what operators see.
    """

    def __init__(self, record: WorkerLedger, admission: Admission, counts: WorkerCounts) -> None:
        self._ledger = record.ledger
        self._admission = admission
        self._later_hops = record.later_hops
        self._counts = counts
        self._outage = record.outage
        self._waiting: list[Execution] = []
        self._asking: list[Execution] = []
        self._doubts: list[tuple[Execution, Known]] = []
        self._doubted = asyncio.Event()
        self._wake = asyncio.Event()
        self._stop = anyio.Event()

    def put_all(self, runs: Sequence[Execution]) -> None:
        """Take prepared runs in."""
        read = [run for run in runs if run.reading is not None]
        if len(read) < len(runs):  # a document that cannot be read has no id to be looked up
            self._admission.put_all([run for run in runs if run.reading is None])
        self._waiting += read
        self._wake.set()

    def put(self, run: Execution) -> None:
        """Take a prepared run in."""
        self.put_all((run,))

    def abandon_waiting(self) -> list[Execution]:
        """Remove and return the runs that wait for an answer."""
        waiting = self._asking + self._waiting + [run for run, _ in self._doubts]
        self._asking, self._waiting, self._doubts = [], [], []
        return waiting

    def close(self) -> None:
        """End the loop."""
        self._stop.set()
        self._wake.set()
        self._doubted.set()

    async def run(self) -> None:
        """Ask until closed; an error is followed by a pause, and the request repeated."""
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
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; the request is repeated
                if isinstance(error, StreamworkerError):
                    self._outage.began("lookup", error)
                else:
                    log.error("lookup_failed", jobs=len(batch), error=str(error))
                self._waiting, self._asking = self._asking + self._waiting, []
                await pause.wait(self._stop)
                continue
            self._outage.over("lookup")
            pause.reset()
            batch, self._asking = self._asking, []  # empty if they were handed back meanwhile
            doubts = self._compared(batch, known) if known else []
            if doubts:
                self._doubts += doubts
                self._doubted.set()
                doubtful = {run for run, _ in doubts}
                batch = [run for run in batch if run not in doubtful]
            elif not known:
                for run in batch:
                    run.new = True
            self._admission.put_all(batch)

    def _compared(self, batch: list[Execution], known: dict[JobKey, Known]) -> list[tuple[Execution, Known]]:
        """Apply the records; returns the runs of which a later hop is recorded."""
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

    async def look_for_later_hops(self) -> None:
        """Look for later hops until closed. Most jobs need no such look: they do not wait for this loop."""
        pause = Pause(longest=5.0)
        while not self._stop.is_set():
            if not self._doubts:
                await self._doubted.wait()
                self._doubted.clear()
                continue
            doubts = list(self._doubts)
            try:
                answers = await self._later_hops.elsewhere(doubts)
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; the request is repeated
                log.error("later_hops_unknown", jobs=len(doubts), error=str(error))
                await pause.wait(self._stop)
                continue
            pause.reset()
            held, self._doubts = set(map(_first, self._doubts)), self._doubts[len(doubts) :]
            for (run, _), why in zip(doubts, answers, strict=True):
                if run in held:  # not handed back meanwhile
                    verdict = PARKED if why == WAITING else DONE
                    self._apply(run, Recorded(verdict, why, ended=why in FINAL) if why else None)
                    self._admission.put(run)

    def _apply(self, run: Execution, recorded: Recorded | None) -> None:
        if recorded is None or (isinstance(run.outcome, Cancelled) and recorded.why not in (SUPERSEDED, WAITING)):
            return
        run.outcome = recorded
        if recorded.verdict is DONE:
            self._counts.skipped += 1
        log.info("job_known", job_id=run.job_id, kind=run.kind, queue=run.claim.queue, reason=recorded.why)


def verdict_of(known: Known, run: Execution) -> Recorded | None:
    """The recorded outcome of a claim, instead of running it; ``None`` if it may run.

    Args:
        known: the record, of no later hop. If its deliveries are above the run's all the same, the run outranks it.
        run: prepared.
    """
    if known.status in FINAL:
        return Recorded(DONE, known.status, ended=True)
    if known.hop < hop_of(run):
        return None
    # A verdict was recorded for this hop, and its worker died before it could settle.
    attempts = run.reading.attempt_count or 0 if run.reading is not None else 0
    charged = known.attempts > attempts
    if known.status == "retrying" and known.run_at is not None:
        verdict = RetryAt(known.run_at, known.error) if charged else ReleaseAt(known.run_at, known.error)
        return Recorded(verdict, "retrying")
    if known.status == "dead" and known.deliveries < run.deliveries:
        # Not above: then it is no second delivery; the job was enqueued anew, and may run.
        reason, _, error = known.error.partition(": ")
        return Recorded(Dead(reason, error, charged=charged), "dead")
    if known.deliveries > run.deliveries:  # an id that is used anew, or a server that counts from an earlier state
        outrank(run, known)
    return None


def _first(doubt: tuple[Execution, Known]) -> Execution:
    return doubt[0]
