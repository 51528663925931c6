"""Settler: judges finished jobs and settles their claims, in group commits.

While one flush is under way the next gathers: no timer, no batch size to tune. After an error nothing is dropped: the
batch stays held, its leases are renewed, and it is sent again. The fence makes that safe: a claim that the first try
settled is LOST to the second.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final, Protocol

import anyio
import msgspec

from streamworker import codec, results
from streamworker.broker import Broker, SettleRequest
from streamworker.codec import NOTHING, State, trace_id
from streamworker.errors import ConfigurationError, InvalidJob, Unreachable
from streamworker.execution import OK, Execution
from streamworker.job import (
    Dead,
    Deferred,
    Done,
    Drop,
    Expire,
    Interrupted,
    Ok,
    OutOfTurn,
    Park,
    Raised,
    Recorded,
    ReleaseAt,
    RetryAt,
    Settled,
    Undecodable,
)
from streamworker.loops import Pause
from streamworker.policy import DONE, RAPID, judge, least_wait, within
from streamworker.redact import describe
from streamworker.telemetry.logs import get_logger
from streamworker.worker.emission import OutputBuffer
from streamworker.worker.inflight import InFlight, SpinningJob
from streamworker.worker.observers import ObserverDispatch

log = get_logger("streamworker.worker")

_PLACE: Final = re.compile(r"at `(\$[^`]*)`")
SETTLED: Final = Settled.SETTLED
REFUSED_PAUSE: Final = 1.0
"""Seconds before endings that the server refused to store are offered again; longer each time, up to the next one."""
LONGEST_PAUSE: Final = 30.0
PROBE: Final = 10
"""Refused endings of a queue that are offered again at once, to see whether the server stores them by now."""
LOG_AGAIN: Final = 60.0
"""Seconds between two log lines about a queue's refused endings."""


class RefusedRuns:
    """Runs of one queue whose endings the server refuses to store: kept under lease, offered again after pauses."""

    def __init__(self) -> None:
        self.runs: list[Execution] = []
        self.at = 0.0
        self.pause = 0.0
        self.logged: tuple[str, float] = ("", 0.0)


class SettledBatches(Protocol):
    """A stage that gets every settled batch."""

    def settled(
        self, runs: Sequence[Execution], items: Sequence[SettleRequest], results: Sequence[Settled], plain: bool, /
    ) -> None:
        """A batch was settled; ``plain``: every run of it is done, and the broker settled it."""


class Settler:
    """Settles finished runs.

    Args:
        broker: whose `settle` is called.
        in_flight: what this worker holds; settled runs leave it.
        parked: called with the epoch seconds at which a job of this worker is due again.
        observers: called with every settled batch, if there are any.
        buffers: what handlers have emitted and logged; sent before their jobs are settled.
        counts: get every settled batch: the history, if it is recorded; what deletes stored payloads.
    """

    def __init__(
        self,
        broker: Broker,
        in_flight: InFlight,
        *,
        parked: Callable[[float], None],
        observers: ObserverDispatch | None = None,
        buffers: Sequence[OutputBuffer] = (),
        counts: Sequence[SettledBatches] = (),
    ) -> None:
        self._broker = broker
        self._counts = counts
        self._buffers = buffers
        self._in_flight = in_flight
        self._parked = parked
        self._observers = observers
        self._finished: list[Execution] = []
        self._refused: dict[str, RefusedRuns] = {}
        self._uncertain: set[Execution] = set()
        self._wake = asyncio.Event()
        self._closing = anyio.Event()
        self._give_up_at = float("inf")

    def add(self, run: Execution) -> None:
        """Settle this run with the next flush."""
        if not self._finished:
            self._wake.set()
        self._finished.append(run)

    def close(self, within: float) -> None:
        """End the loop when all is settled, at the latest in ``within`` seconds."""
        self._give_up_at = anyio.current_time() + within
        self._closing.set()
        self._wake.set()

    async def run(self) -> None:
        """Flush until closed."""
        pause = Pause()
        while True:
            if not self._finished and not await self._gather():
                return
            batch, self._finished = self._finished + self._offer_again(), []
            try:
                await self._flush(batch)
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; the batch is sent again
                self._keep(batch)
                log.error("settle_failed", jobs=len(batch), error=str(error))
                await pause.wait(self._closing, least=0.2)
            else:
                pause.reset()
            if anyio.current_time() > self._give_up_at:
                return

    async def _gather(self) -> bool:
        """Wait for something to settle; False when closed and nothing is left."""
        while not self._finished:
            if self._closing.is_set() and not self._refused:
                return False
            soonest = min((each.at for each in self._refused.values()), default=None)
            with anyio.move_on_after(None if soonest is None else max(0.01, soonest - anyio.current_time())):
                await self._wake.wait()
            self._wake.clear()
            self._finished += self._offer_again()
        return True

    @property
    def refused(self) -> dict[str, int]:
        """Queues whose endings the server refuses to store, and how many of them."""
        return {queue: len(each.runs) for queue, each in self._refused.items() if each.runs}

    def _offer_again(self) -> list[Execution]:
        """Some refused runs whose pause is over; under load too, or they would starve."""
        again: list[Execution] = []
        for each in self._refused.values():
            if anyio.current_time() >= each.at:
                most = len(each.runs) if self._closing.is_set() else PROBE
                again += each.runs[:most]
                del each.runs[:most]
                each.at = float("inf")  # until it is known how that went
        return again

    async def _flush(self, batch: list[Execution]) -> None:
        now = time.time()
        for run in batch:
            run.settling = True  # out of the renewal set before the claim can end, or the thread would report it lost
        items = [run.ending or judged(run, now) for run in batch]
        buffers = [each for each in self._buffers if each.runs]
        for each in buffers:
            await each.flush_of([run.claim for run in batch])
            items = [
                with_output(run, item) if each.holds(run.claim) else item
                for run, item in zip(batch, items, strict=True)
            ]
        results = await self._settled(items)
        plain = [item.verdict for item in items].count(DONE) == results.count(SETTLED) == len(batch)
        self._told(batch, items, results, now, plain)
        if plain and not self._refused:
            self._in_flight.forget(*batch)  # nearly all
            self._in_flight.counts.done += len(batch)
            self._uncertain.difference_update(batch)
        else:
            self._forget_each(batch, items, results)
        for each in buffers:
            each.forget(
                item.claim for item, result in zip(items, results, strict=True) if result is not Settled.REFUSED
            )

    def _forget_each(self, batch: list[Execution], items: list[SettleRequest], results: list[Settled]) -> None:
        counts, forget, uncertain = self._in_flight.counts, self._in_flight.forget, self._uncertain
        refused: dict[str, list[Execution]] = {}
        for run, item, result in zip(batch, items, results, strict=True):
            if result is SETTLED:
                forget(run)
                if item.verdict is DONE:
                    counts.done += 1
                else:
                    self._count(run, item)
            elif result is Settled.REFUSED:
                run.settling = False
                uncertain.add(run)  # a node that went away may have done it
                refused.setdefault(run.claim.queue, []).append(run)
                continue
            else:
                forget(run)
                if run not in uncertain:
                    counts.lost += 1
                    log.info("settle_lost", **facts_of(run))
            uncertain.discard(run)
        if refused or self._refused:
            self._set_aside(refused, {run.claim.queue for run in batch})

    def _told(
        self, batch: list[Execution], items: list[SettleRequest], results: list[Settled], began: float, plain: bool
    ) -> None:
        if self._observers is not None:
            self._observers.settled(batch, items, results, began)
        for each in self._counts:
            each.settled(batch, items, results, plain)

    def _set_aside(self, refused: dict[str, list[Execution]], queues: set[str]) -> None:
        """Keep refused runs, and set when they are offered again: at once if the server stored others of the queue."""
        now = anyio.current_time()
        for queue, runs in refused.items():
            self._refused.setdefault(queue, RefusedRuns()).runs += runs
        for queue in queues & self._refused.keys():
            each = self._refused[queue]
            if queue not in refused:
                each.at, each.pause = now, 0.0
            elif each.at > now + LONGEST_PAUSE or each.at <= now:  # it was offered again, or is new
                longest = REFUSED_PAUSE if self._closing.is_set() else LONGEST_PAUSE
                each.pause = min(longest, max(REFUSED_PAUSE, 2 * each.pause))
                each.at = now + (each.pause if not self._closing.is_set() else 0.2)
            if not each.runs:
                del self._refused[queue]
            elif queue in refused:
                self._log_refused(queue, each, now)

    def _log_refused(self, queue: str, refused: RefusedRuns, now: float) -> None:
        why = self._broker.refusals.get(queue)
        error = why.error if why is not None else "it cannot be judged"
        if refused.logged[0] != error or now > refused.logged[1]:
            refused.logged = (error, now + LOG_AGAIN)
            hint = why.cure if why is not None else "see the lines before this one"
            log.error("settle_refused", queue=queue, jobs=len(refused.runs), error=error, hint=hint)

    async def _settled(self, items: list[SettleRequest]) -> list[Settled]:
        """Settle; if one item breaks the call, settle one by one, so that it blocks only itself."""
        try:
            return await self._broker.settle(items)
        except (Unreachable, ConfigurationError):
            raise
        except Exception as error:
            if len(items) == 1:
                raise
            log.error("settle_split", jobs=len(items), error=str(error))
        results: list[Settled] = []
        for item in items:
            try:
                results += await self._broker.settle([item])
            except (Unreachable, ConfigurationError):
                raise
            except Exception as error:  # noqa: BLE001 - it is about this item: keep it and try again
                log.error("settle_failed", jobs=1, job_id=item.job_id, kind=item.kind, error=str(error))
                results.append(Settled.REFUSED)
        return results

    def _keep(self, batch: list[Execution]) -> None:
        held = [run for run in batch if self._in_flight.find(run.claim) is run]
        for run in held:
            run.settling = False
        self._uncertain.update(held)
        self._finished = held + self._finished

    def _count(self, run: Execution, item: SettleRequest) -> None:
        """Count and log one ending that is not a plain success."""
        counts = self._in_flight.counts
        facts = facts_of(run)
        match item.verdict:
            case RetryAt(at=at, error=error):
                counts.retried += 1
                self._parked(at)
                log.info("job_retry", **facts, error=error, delay=round(at - time.time(), 1))
            case Dead(reason=reason, error=error):
                counts.dead += 1
                exc = run.outcome.error if isinstance(run.outcome, Raised) else None
                if isinstance(run.outcome, Undecodable) and reason == "undecodable":
                    error = _where(error)
                log.warning("job_dead", **facts, reason=reason, error=error, exc_info=exc)
            case ReleaseAt(at=at, reason=reason, turns=turns):
                counts.released += 1
                if at is not None:
                    self._parked(at)
                if turns and at is not None:
                    wait = round(at - time.time(), 1)
                    self._in_flight.spun(SpinningJob(run.claim.queue, item.kind, item.job_id, turns, wait))
                    log.warning("job_spinning", **facts, reason=reason, turns=turns, delay=wait)
                # A kind with a limit releases all the time: that is its ordinary way.
                (log.debug if isinstance(run.outcome, Deferred | OutOfTurn) else log.info)(
                    "job_released", **facts, reason=reason
                )
            case Park(signal=signal, until=until):
                counts.released += 1
                log.info("job_waiting", **facts, signal=signal or None, until=until)
            case Drop():
                counts.cancelled += 1
                log.info("job_cancelled", **facts)
            case Expire(error=error):
                counts.expired += 1
                log.info("job_expired", **facts, **({"error": error} if error else {}))
            case Done():
                counts.done += 1


def with_output(run: Execution, item: SettleRequest) -> SettleRequest:
    """The ending of a job that has emitted: a final one is noted for as long as its output can be read."""
    if isinstance(item.verdict, RetryAt | ReleaseAt | Park):
        return item
    note = results.COMPLETED if item.note is None and isinstance(item.verdict, Done) else item.note
    return msgspec.structs.replace(item, job_id=run.job_id, note=note, keep=max(item.keep, results.LIFE))


def facts_of(run: Execution) -> dict[str, str | int]:
    """The fields of every log line about a run; the worker's id is bound to all of its lines."""
    facts: dict[str, str | int] = {"job_id": run.job_id, "kind": run.kind, "queue": run.claim.queue}
    if run.facts is not None:
        facts["attempt"] = run.facts.attempts + 1
    trace = run.seen.trace_id if run.seen is not None else trace_id(run.reading.headers if run.reading else None)
    if trace is not None:
        facts["trace_id"] = trace
    return facts


def judged(run: Execution, now: float) -> SettleRequest:
    """The ending of a run. One that cannot be judged is dead: it would block everything behind it."""
    facts = run.facts
    if run.outcome is OK and facts is not None and facts.limits.result_ttl is None and not facts.key:
        if not facts.order:
            return SettleRequest(run.claim, DONE)  # nearly all
        return SettleRequest(run.claim, DONE, job_id=run.job_id, order=facts.order)
    try:
        return in_order(run, ending(run, now=now, jitter=random.random()))  # noqa: S311 - spreads load
    except BaseException as error:  # noqa: BLE001 - a hostile document or error object; its bytes are kept
        log.error("ending_failed", kind=run.kind, queue=run.claim.queue, error=describe(error))
        return SettleRequest(run.claim, Dead("undecidable", describe(error)), kind=run.kind)


def in_order(run: Execution, item: SettleRequest) -> SettleRequest:
    """The ending of a job with an order key: where the job has ended for good, its key is passed on."""
    facts = run.facts
    if facts is None or not facts.order or isinstance(item.verdict, RetryAt | ReleaseAt):
        return item
    if isinstance(item.verdict, Park):  # it keeps its key, although it is nowhere in Redis
        return msgspec.structs.replace(item, order=facts.order)
    if isinstance(item.verdict, Done) and isinstance(run.outcome, Recorded) and not run.outcome.ended:
        return item  # a later hop of the job goes on, and has the key
    return msgspec.structs.replace(item, job_id=run.job_id, order=facts.order, halts=facts.halts)


def _where(error: str) -> str:
    """Where a document is wrong, without the value there: logs hold no payloads, dead letters do."""
    found = _PLACE.search(error)
    return f"the document does not fit at {found.group(1)}" if found else "the document does not fit"


def ending(run: Execution, *, now: float, jitter: float) -> SettleRequest:
    """Judge a run that has an outcome.

    Args:
        run: prepared, with its outcome.
        now: epoch seconds.
        jitter: 0 to 1, where in the backoff's band a wait falls.
    """
    outcome = run.outcome
    if outcome is OK or isinstance(outcome, Ok):
        if (keep := keeping(run)) is None:
            return _done(run)
        note, key = results.completed(outcome.value), run.facts.key if run.facts is not None else ""
        return SettleRequest(run.claim, DONE, None, run.job_id, run.kind, note=note, keep=keep, key=key)
    if outcome is None or run.facts is None:
        raise AssertionError("a run is judged after its outcome")
    verdict = judge(outcome, run.facts, now=now, jitter=jitter)
    if run.facts.expires is not None and not isinstance(outcome, Recorded):
        verdict = within(verdict, now=now, left=run.facts.expires - monotonic())
    attempts, member = run.facts.attempts, ""
    match verdict:
        case Done():
            known_end = isinstance(outcome, Recorded) and outcome.ended
            return _done(run) if known_end else SettleRequest(run.claim, verdict)
        case Drop() | Park():
            return SettleRequest(run.claim, verdict, None, run.job_id, run.kind, keep=keeping(run) or 0.0)
        case Expire() | Dead():
            charged, keep = attempts + verdict.charged, keeping(run) or 0.0
            return SettleRequest(run.claim, verdict, None, run.job_id, run.kind, charged, keep=keep)
        case RetryAt():
            body = _next_form(run, {"attempt_count": attempts + 1}, NOTHING)
        case ReleaseAt():
            state = _state(run, verdict)
            if (ran := _ran(run)) is not None:
                verdict, state = _slowed(verdict, state, now, ran)
            body = _next_form(run, {}, state)
            if isinstance(outcome, Deferred):
                member = outcome.member
    return SettleRequest(run.claim, verdict, body, run.job_id, run.kind, attempts, member)


def finished(run: Execution) -> SettleRequest:
    """The ending of a job that is done, here or before: keys that it holds until then are free."""
    return in_order(run, _done(run))


def _done(run: Execution) -> SettleRequest:
    if run.facts is None or not run.facts.key:
        return SettleRequest(run.claim, DONE)
    return SettleRequest(run.claim, DONE, None, run.job_id, run.kind, note=results.COMPLETED, key=run.facts.key)


def keeping(run: Execution) -> float | None:
    """Seconds for which its result is kept in Redis, if its handler has a ``result_ttl``."""
    return None if run.facts is None else run.facts.limits.result_ttl


def _state(run: Execution, verdict: ReleaseAt) -> State:
    """The state that a job carries to its next hop when it is released uncharged."""
    before = NOTHING if run.reading is None else codec.state_of(run.reading, run.claim.secret)
    turn, since = before.turn, before.unknown_since
    if isinstance(run.outcome, Deferred):
        turn = run.outcome.turn
    elif run.started is not None:
        turn = ""  # it had its turn
    if verdict.unknown_since is not None:
        since = int(verdict.unknown_since)
    return State(max(0, run.deliveries - 1), turn, since, before.returns, before.rapid)


def _ran(run: Execution) -> float | None:
    """Seconds that a run took which may come back again and again; ``None`` for one that waits for something."""
    if isinstance(run.outcome, OutOfTurn):  # a line that takes no such job, for whatever reason, gives it back at once
        return 0.0
    if run.started is None or not isinstance(run.outcome, Raised | Interrupted):
        return None
    return monotonic() - run.started


def _slowed(verdict: ReleaseAt, state: State, now: float, ran: float) -> tuple[ReleaseAt, State]:
    """The release of a job that ran for ``ran`` seconds: later, if it is released again and again."""
    wait = 0.0 if verdict.at is None else verdict.at - now
    rapid = state.rapid + 1 if wait + ran < RAPID else 0
    state = msgspec.structs.replace(state, returns=state.returns + 1, rapid=rapid)
    least = least_wait(rapid)
    return (ReleaseAt(now + least, verdict.reason, turns=state.returns) if least > wait else verdict), state


def _next_form(run: Execution, patch: dict[str, Any], state: State) -> bytes | None:
    """The document for the next hop; ``None`` (bytes as they are) where there is nothing readable to patch."""
    if run.reading is None or run.claim.body is None:
        return None
    patch = {"id": run.job_id, "hop": codec.written_hop((run.reading.hop or 0) + 1), **patch}
    try:
        return codec.rewrite(run.claim.body, patch, state=state, secret=run.claim.secret)
    except InvalidJob:
        return None
