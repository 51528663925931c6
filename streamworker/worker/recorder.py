"""Recorder: judges finished jobs and records them in the ledger before they are settled. Only with a ledger.

Group commit, as in the settler: while one batch is recorded the next gathers, and recorded runs are settled meanwhile.
Under load a second batch does not wait for the first: the database's disk would hold up everything. Settling follows
the ledger's answer: a job that had ended before is done, whatever its run's outcome. After an error nothing is dropped:
runs stay held, under lease, until they are recorded, or are handed back at shutdown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic, time
from typing import Any, Final, Literal, TypeAlias

import anyio

from streamworker import results
from streamworker.broker import SettleRequest
from streamworker.errors import StreamworkerError
from streamworker.execution import OK, Execution
from streamworker.job import (
    Dead,
    Deferred,
    Done,
    Drop,
    Expire,
    Interrupted,
    Ok,
    Park,
    Postponed,
    Raised,
    Recorded,
    ReleaseAt,
    RetryAt,
)
from streamworker.loops import Pause
from streamworker.policy import DONE, word_of
from streamworker.postgres import (
    FINAL,
    LANES,
    Effect,
    Known,
    Ledger,
    RunRecord,
    Status,
    Stored,
    run_record,
    unread_record,
)
from streamworker.redact import describe
from streamworker.relay import Dispatcher
from streamworker.telemetry.logs import get_logger
from streamworker.worker.inflight import InFlight
from streamworker.worker.job_logs import LogBuffer
from streamworker.worker.settler import Settler, finished, in_order, judged

log = get_logger("streamworker.worker")

SUPERSEDED: Final = "superseded"
"""A later hop of the job is recorded and exists, or is on its way: this one ends, and the other goes on."""
SENT_BY_LEDGER: Final[tuple[Status, ...]] = ("queued", "dispatching", "waiting")
"""The later hop is on its way out of the ledger, or waits there: Redis cannot have lost it."""
WAITING: Final = "waiting"
"""A later hop of the job waits in the ledger."""
PARKED: Final = Park("", None)
_HIGHEST: Final = 2**63 - 2


class LaterHops:
    """Finds out whether the later hop of a job that the ledger knows exists, or was lost by Redis.

    Args:
        ledger: asked again after the look.
        dispatcher: looks into queues.
    """

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher) -> None:
        self._ledger = ledger
        self._dispatcher = dispatcher

    async def elsewhere(self, doubts: Sequence[tuple[Execution, Known]]) -> list[str]:
        """Why each run ends, in a word; empty for one that goes on: from here on it outranks the record of its job.

        Args:
            doubts: runs, and the later hop that is recorded of their jobs.
        """
        if not doubts:
            return []
        hops: dict[str, dict[str, int]] = {}
        for run, known in doubts:
            if known.status not in (*SENT_BY_LEDGER, "dead"):
                queue = hops.setdefault(run.claim.queue, {})
                queue[run.job_id] = min(hop_of(run), queue.get(run.job_id, _HIGHEST))
        there = {queue: await self._dispatcher.later(queue, ids) for queue, ids in hops.items()}
        # A later hop leaves Redis only after its end was recorded: a missing one may have ended before the look.
        now = await self._ledger.lookup([(run.claim.queue, run.job_id) for run, _ in doubts])
        answers = []
        for run, known in doubts:
            found = now.get((run.claim.queue, run.job_id), known)
            if found.status in FINAL:
                answers.append(str(found.status))
            elif found.status == WAITING:
                answers.append(WAITING)
            elif found != known or known.status in SENT_BY_LEDGER or run.job_id in there.get(run.claim.queue, ()):
                answers.append(SUPERSEDED)
            else:
                outrank(run, known)
                answers.append("")
        return answers


def hop_of(run: Execution) -> int:
    """The hop of a run; 0 if its document says none."""
    return 0 if run.reading is None else run.reading.hop or 0


def outrank(run: Execution, known: Known) -> None:
    """Raise the hop of a run above the record of its job, so that its outcome counts."""
    if run.reading is not None:
        log.info(
            "job_outranks", job_id=run.job_id, kind=run.kind, queue=run.claim.queue, status=known.status,
            hop=hop_of(run), known_hop=known.hop,
        )  # fmt: skip
        run.reading.hop = min(known.hop, _HIGHEST) + 1


LedgerCall: TypeAlias = Literal["lookup", "record"]
"""A database that answers lookups may still refuse records: a standby, a full disk."""


class LedgerOutage:
    """Whether the ledger failed one worker's last calls: nothing is claimed meanwhile."""

    def __init__(self) -> None:
        self._since = 0.0
        self._failing: set[LedgerCall] = set()

    def is_on(self) -> bool:
        """Whether the last lookup or the last record failed."""
        return bool(self._failing)

    def began(self, call: LedgerCall, error: Exception) -> None:
        """A call failed, for no fault of a single row."""
        if not self._failing:
            self._since = monotonic()
            log.error(
                "ledger_down",
                error=str(error),
                hint="nothing is claimed until PostgreSQL records again; finished jobs are kept until then",
            )
        self._failing.add(call)

    def over(self, call: LedgerCall) -> None:
        """A call succeeded."""
        if call in self._failing:
            self._failing.discard(call)
            if not self._failing:
                log.info("ledger_back", seconds=round(monotonic() - self._since, 1))


class WorkerLedger:
    """The ledger as one worker uses it.

    Args:
        ledger: the record.
        dispatcher: looks for the ledger's jobs in Redis.
    """

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher) -> None:
        self.ledger: Final = ledger
        self.later_hops: Final = LaterHops(ledger, dispatcher)
        self.outage: Final = LedgerOutage()


MOST: Final = 500
"""Most runs of one statement."""
WORTH_IT: Final = 100
"""Runs that are worth a second batch beside one under way."""
PAUSE: Final = 0.2
"""Seconds to wait at least after an error."""
BUSY_PAUSE: Final = 1.0
"""Seconds before a run is recorded again whose row was locked."""
AGAIN_AFTER: Final = 2.0
"""Seconds before a job runs again that could not take its row, or lost PostgreSQL."""
GOES_ON: Final = Recorded(DONE, "superseded")
"""Outcome of a run that was done, and of whose job a later hop goes on."""
HANDED_BACK: Final = Interrupted("PostgreSQL was down when the worker shut down")


class Recorder:
    """Records finished runs and passes them to the settler.

    Args:
        record: where they are recorded.
        settler: the next stage.
        in_flight: what this worker holds.
        logs: what its handlers log, if it is kept.
    """

    def __init__(
        self, record: WorkerLedger, settler: Settler, in_flight: InFlight, *, logs: LogBuffer | None = None
    ) -> None:
        self._logs = logs
        self._ledger = record.ledger
        self._settler = settler
        self._in_flight = in_flight
        self._outage = record.outage
        self._later_hops = record.later_hops
        self._finished: list[Execution] = []
        self._under_way = 0
        self._busy: list[Execution] = []
        self._busy_until = 0.0
        self._wake = asyncio.Event()
        self._closing = anyio.Event()
        self._give_up_at = float("inf")
        self.ended: Final = anyio.Event()

    def add(self, run: Execution) -> None:
        """Record this run with the next batch."""
        run.finished = time()
        self._finished.append(run)
        if self._wanted():
            self._wake.set()

    async def close(self, within: float) -> None:
        """End the loop when all is recorded; what cannot be within ``within`` seconds goes back to its queue."""
        self._give_up_at = anyio.current_time() + within
        self._closing.set()
        self._wake.set()
        await self.ended.wait()

    async def run(self) -> None:
        """Record until closed."""
        try:
            async with anyio.create_task_group() as lanes:
                for _ in range(LANES):
                    lanes.start_soon(self._lane)
            self._hand_back()
        finally:
            self.ended.set()

    async def _lane(self) -> None:
        pause = Pause(longest=5.0)
        while await self._gather():
            batch, self._finished = self._finished[:MOST], self._finished[MOST:]
            self._under_way += 1
            try:
                await self._record(batch)
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; the batch is tried again
                self._finished = [run for run in batch if run.ending is None] + self._finished
                if self._finished and isinstance(error, StreamworkerError):
                    self._outage.began("record", error)
                else:
                    log.error("record_failed", jobs=len(batch), error=str(error))
                await pause.wait(self._closing, least=PAUSE)
            else:
                self._outage.over("record")
                pause.reset()
            self._under_way -= 1
            if anyio.current_time() > self._give_up_at:
                break

    async def _gather(self) -> bool:
        """Wait for something to record; False when closed and nothing is left."""
        while True:
            if self._busy and (anyio.current_time() >= self._busy_until or self._closing.is_set()):
                self._finished, self._busy = self._finished + self._busy, []
            if self._finished and self._wanted():
                return True
            if self._closing.is_set():
                return False
            with anyio.move_on_after(BUSY_PAUSE if self._busy else None):
                await self._wake.wait()
            self._wake.clear()

    def _wanted(self) -> bool:
        """Whether the finished runs are worth a batch right now."""
        return not self._under_way or len(self._finished) >= WORTH_IT

    async def _record(self, batch: Sequence[Execution]) -> None:
        now = time()
        begun_at = now - monotonic()
        runs: list[Execution] = []
        endings: list[SettleRequest] = []
        records: list[RunRecord] = []
        doubtful: list[Execution] = []
        parked: list[tuple[Execution, SettleRequest, RunRecord]] = []
        for run in batch:
            effect = None if run.context is None else run.context.effect
            if effect is Effect.SUPERSEDED and not isinstance(run.outcome, Recorded):
                doubtful.append(run)
                continue
            if effect is not None:
                self._correct(run, effect, now)
            ending = judged(run, now)
            record = record_of(run, ending, begun_at)
            if record is None:
                self._pass_on(run, ending)
            elif isinstance(ending.verdict, Park):
                parked.append((run, ending, record))
            else:
                runs.append(run)
                endings.append(ending)
                records.append(record)
        if records:
            answers = await self._ledger.record(records)
            if self._logs is not None:
                await self._logs.keep(records, runs, answers)
            doubtful += self._answered(runs, endings, answers)
        if parked:
            runs, endings, records = (list(each) for each in zip(*parked, strict=True))
            answers = await self._ledger.park(records)
            if self._logs is not None:
                await self._logs.keep(records, runs, answers)
            doubtful += self._answered(runs, endings, answers)
        if doubtful:
            await self._weigh(doubtful)

    def _answered(
        self, runs: Sequence[Execution], endings: Sequence[SettleRequest], answers: Sequence[Stored]
    ) -> list[Execution]:
        """Pass on what is recorded; returns the runs of which a later hop is recorded."""
        doubtful = []
        for run, ending, answer in zip(runs, endings, answers, strict=True):
            if answer is Stored.STORED:
                run.ending = ending
                self._settler.add(run)
            elif answer is Stored.BUSY:
                self._busy.append(run)
                self._busy_until = anyio.current_time() + BUSY_PAUSE
            elif answer is Stored.SUPERSEDED and not isinstance(ending.verdict, Done | Drop):
                doubtful.append(run)
            else:
                self._overruled(run, ending, answer)
        return doubtful

    async def _weigh(self, runs: Sequence[Execution]) -> None:
        """A later hop or delivery of these jobs is recorded: end those that do go on elsewhere."""
        try:
            found = await self._ledger.lookup([(run.claim.queue, run.job_id) for run in runs])
            doubts = []
            for run in runs:
                known = found.get((run.claim.queue, run.job_id))
                if known is None:  # forgotten meanwhile
                    self._go_on(run)
                elif known.status in FINAL or known.hop <= hop_of(run):  # or claimed again: the fence decides
                    self._end_here(run, known.status if known.status in FINAL else SUPERSEDED)
                else:
                    doubts.append((run, known))
            for (run, _), why in zip(doubts, await self._later_hops.elsewhere(doubts), strict=True):
                if why:
                    self._end_here(run, why)
                else:
                    self._go_on(run)
        except Exception as error:  # noqa: BLE001 - they stay held, and are recorded again
            log.error("later_hops_unknown", jobs=len(runs), error=str(error))
            await anyio.sleep(PAUSE)
            self._busy += [run for run in runs if run.ending is None and run not in self._finished]
            self._busy_until = anyio.current_time() + BUSY_PAUSE

    def _go_on(self, run: Execution) -> None:
        """The later hop was lost: record this run again, or release it if its transaction was refused."""
        if run.context is not None and run.context.effect is Effect.SUPERSEDED:
            run.outcome = Recorded(ReleaseAt(time(), "a later hop of this job was lost"), "superseded")
            self._pass_on(run, judged(run, time()))
        else:
            self._finished.append(run)

    def _end_here(self, run: Execution, why: str) -> None:
        log.info("run_overruled", job_id=run.job_id, kind=run.kind, queue=run.claim.queue, reason=why)
        self._in_flight.counts.skipped += 1
        if why == WAITING:
            self._pass_on(run, in_order(run, SettleRequest(run.claim, PARKED)))
        else:
            self._pass_on(run, finished(run) if why in FINAL else SettleRequest(run.claim, DONE))

    def _pass_on(self, run: Execution, ending: SettleRequest) -> None:
        run.ending = ending
        self._settler.add(run)

    def _overruled(self, run: Execution, ending: SettleRequest, answer: Stored) -> None:
        """The job has ended, here or before: only the claim is left to settle."""
        if isinstance(ending.verdict, Drop) and answer is Stored.ENDED:
            self._pass_on(run, ending)  # as it should be; and its mark goes
            return
        if not isinstance(ending.verdict, Done):
            log.info("run_overruled", job_id=run.job_id, kind=run.kind, queue=run.claim.queue, reason=answer.value)
        elif answer is Stored.SUPERSEDED:
            self._in_flight.counts.skipped += 1
            run.outcome = GOES_ON
        self._pass_on(run, finished(run) if answer is Stored.ENDED else SettleRequest(run.claim, DONE))

    def _correct(self, run: Execution, effect: Effect, now: float) -> None:
        """Correct the outcome by the run's transaction, which decides whatever the handler did after it."""
        if isinstance(run.outcome, Recorded):
            return
        if effect is Effect.COMMITTED:
            if run.outcome is not None and not isinstance(run.outcome, Ok):
                error = run.outcome.error if isinstance(run.outcome, Raised) else None
                log.warning(
                    "failed_after_commit", job_id=run.job_id, kind=run.kind, queue=run.claim.queue,
                    outcome=word_of(run.outcome), error=describe(error) if error is not None else None, exc_info=error,
                )  # fmt: skip
                run.outcome = Ok()
        elif effect is Effect.ENDED:
            run.outcome = Recorded(DONE, "ended", ended=True)
            self._in_flight.counts.skipped += 1
        elif effect is Effect.BUSY:
            run.outcome = Recorded(ReleaseAt(now + AGAIN_AFTER, "another run of this job was at work"), "busy")
        elif effect is Effect.LOST:
            run.outcome = Recorded(ReleaseAt(now + AGAIN_AFTER, "PostgreSQL was lost"), "lost")

    def _hand_back(self) -> None:
        """Release what could not be recorded, uncharged: it runs again where it can be recorded."""
        left, self._finished, self._busy = self._finished + self._busy, [], []
        if left:
            log.warning("unrecorded_handed_back", jobs=len(left))
        for run in left:
            if run.context is None or run.context.effect is not Effect.COMMITTED:
                run.outcome = HANDED_BACK
            self._pass_on(run, judged(run, time()))


def record_of(run: Execution, ending: SettleRequest, begun_at: float) -> RunRecord | None:
    """The record of a run; ``None`` if there is nothing to record.

    Args:
        run: with its outcome.
        ending: its ending.
        begun_at: epoch seconds of the monotonic clock's zero.
    """
    outcome, verdict = run.outcome, ending.verdict
    if type(outcome) is not Ok:
        unbegun = isinstance(outcome, Interrupted) and run.started is None
        if unbegun or isinstance(outcome, Recorded | Postponed | Deferred):
            return None  # recorded before, or nothing has happened
    record = begun(run, begun_at)
    record.finished = run.finished
    record.outcome = word_of(outcome)
    record.new = run.new and (run.context is None or not run.context.booked)
    if type(verdict) is Done:
        record.status = "completed"
        if outcome is not OK and isinstance(outcome, Ok) and outcome.value is not None:
            _keep_result(record, outcome.value)
    elif isinstance(verdict, Park):
        record.status, record.waits_for, record.run_at = "waiting", verdict.signal or None, verdict.until
    elif isinstance(verdict, Drop):
        record.status = "cancelled"
    elif isinstance(verdict, Expire):
        record.status, record.error = "expired", verdict.error or None
        record.attempts += verdict.charged
    elif isinstance(verdict, RetryAt):
        record.status, record.run_at, record.error = "retrying", verdict.at, verdict.error
        record.attempts += 1
    elif isinstance(verdict, Dead):
        record.status = "dead"
        record.error = f"{verdict.reason}: {verdict.error}" if verdict.error else verdict.reason
        record.attempts += verdict.charged
    elif isinstance(verdict, ReleaseAt):
        record.error = verdict.reason
        if verdict.at is None:
            record.status = "dispatched"
        else:
            record.status, record.run_at = "retrying", verdict.at
    return record


def begun(run: Execution, begun_at: float) -> RunRecord:
    """The record of a run that has no outcome yet.

    Args:
        run: prepared.
        begun_at: epoch seconds of the monotonic clock's zero.
    """
    if run.reading is None:
        return unread_record(run.claim)
    started = None if run.started is None else begun_at + run.started
    record = run_record(run.claim, run.reading, kind=run.kind, started=started)
    if run.facts is not None and run.context is not None and run.context.steps is not None:
        record.attempts = run.facts.attempts  # they start anew after progress
    return record


def _keep_result(record: RunRecord, value: Any) -> None:
    try:
        record.result = results.result_json(value)
    except ValueError as error:  # the job is done all the same
        record.error = str(error)
