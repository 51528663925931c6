"""The stage between claiming and running, where there is a ledger: is this job known to have ended already?

Asked in batches: while one question is on its way the next gathers, and jobs that were asked about before run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio

from streamworker.bookkeeping.later import SUPERSEDED, LaterHops, hop_of, outrank
from streamworker.bookkeeping.outage import Outage
from streamworker.errors import StreamworkerError
from streamworker.execute import Executor
from streamworker.holdings import Counts
from streamworker.job import Cancelled, Dead, Recorded, ReleaseAt, RetryAt
from streamworker.pause import Pause
from streamworker.policy import DONE
from streamworker.postgres import FINAL, JobKey, Known, Ledger
from streamworker.run import Run
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")


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
        put: Callable[[Run], None],
        *,
        later: LaterHops,
        counts: Counts,
        outage: Outage,
    ) -> None:
        self._ledger = ledger
        self._executor = executor
        self._put = put
        self._later = later
        self._counts = counts
        self._outage = outage
        self._waiting: list[Run] = []
        self._asking: list[Run] = []
        self._doubts: list[tuple[Run, Known]] = []
        self._doubted = asyncio.Event()
        self._wake = asyncio.Event()
        self._stop = anyio.Event()

    def put(self, run: Run) -> None:
        """Take a run in."""
        if run.outcome is None:
            self._executor.prepare(run)
        if run.reading is None:  # nobody can say which job it is
            self._put(run)
            return
        self._waiting.append(run)
        self._wake.set()

    def abandon(self) -> list[Run]:
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

    def _judged(self, batch: list[Run], known: dict[JobKey, Known]) -> list[tuple[Run, Known]]:
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

    def _apply(self, run: Run, recorded: Recorded | None) -> None:
        if recorded is None or (isinstance(run.outcome, Cancelled) and recorded.why != SUPERSEDED):
            return
        run.outcome = recorded
        if recorded.verdict is DONE:
            self._counts.skipped += 1
        log.info("job_known", job_id=run.job_id, kind=run.kind, queue=run.claim.queue, reason=recorded.why)


def verdict_of(known: Known, run: Run) -> Recorded | None:
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


def _first(doubt: tuple[Run, Known]) -> Run:
    return doubt[0]
