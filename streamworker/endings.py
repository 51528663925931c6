"""Outcome of a run to the ending a broker settles: verdict, and the job's next form. Pure, but for how long it ran."""

from __future__ import annotations

from time import monotonic
from typing import Any

import msgspec

from streamworker import codec, notes
from streamworker.broker import Ending
from streamworker.errors import InvalidJob
from streamworker.execute import OK
from streamworker.job import Dead, Deferred, Done, Drop, Interrupted, Ok, Raised, ReleaseAt, RetryAt
from streamworker.marks import NOTHING, State
from streamworker.policy import DONE, RAPID, judge, least_wait
from streamworker.run import Run


def ending(run: Run, *, now: float, jitter: float) -> Ending:
    """Judge a run that has an outcome.

    Args:
        run: prepared, with its outcome.
        now: epoch seconds.
        jitter: 0 to 1, where in the backoff's band a wait falls.
    """
    outcome = run.outcome
    if outcome is OK or isinstance(outcome, Ok):
        if (keep := keeping(run)) is None:
            return Ending(run.claim, DONE)
        note = notes.completed(outcome.value)
        return Ending(run.claim, DONE, None, run.job_id, run.kind, note=note, keep=keep)
    if outcome is None or run.facts is None:
        raise AssertionError("a run is judged after its outcome")
    verdict = judge(outcome, run.facts, now=now, jitter=jitter)
    attempts, member = run.facts.attempts, ""
    match verdict:
        case Done():
            return Ending(run.claim, verdict)
        case Drop():
            return Ending(run.claim, verdict, None, run.job_id, run.kind, keep=keeping(run) or 0.0)
        case Dead():
            charged, keep = attempts + verdict.charged, keeping(run) or 0.0
            return Ending(run.claim, verdict, None, run.job_id, run.kind, charged, keep=keep)
        case RetryAt():
            body = _next_form(run, {"attempt_count": attempts + 1}, NOTHING)
        case ReleaseAt():
            state = _state(run, verdict)
            if run.started is not None and isinstance(outcome, Raised | Interrupted):
                verdict, state = _slowed(verdict, state, now, monotonic() - run.started)
            body = _next_form(run, {}, state)
            if isinstance(outcome, Deferred):
                member = outcome.member
    return Ending(run.claim, verdict, body, run.job_id, run.kind, attempts, member)


def keeping(run: Run) -> float | None:
    """Seconds for which its end is kept in Redis, if its handler says so."""
    return None if run.facts is None else run.facts.limits.result_ttl


def _state(run: Run, verdict: ReleaseAt) -> State:
    """What is remembered of a job that goes back uncharged."""
    before = NOTHING if run.reading is None else codec.state_of(run.reading, run.claim.secret)
    turn, since = before.turn, before.unknown_since
    if isinstance(run.outcome, Deferred):
        turn = run.outcome.turn
    elif run.started is not None:
        turn = ""  # it had its turn
    if verdict.unknown_since is not None:
        since = int(verdict.unknown_since)
    return State(max(0, run.deliveries - 1), turn, since, before.returns, before.rapid)


def _slowed(verdict: ReleaseAt, state: State, now: float, ran: float) -> tuple[ReleaseAt, State]:
    """A job that ran for ``ran`` seconds and goes back uncharged: later, where it does little else."""
    wait = 0.0 if verdict.at is None else verdict.at - now
    rapid = state.rapid + 1 if wait + ran < RAPID else 0
    state = msgspec.structs.replace(state, returns=state.returns + 1, rapid=rapid)
    least = least_wait(rapid)
    return (ReleaseAt(now + least, verdict.reason, turns=state.returns) if least > wait else verdict), state


def _next_form(run: Run, patch: dict[str, Any], state: State) -> bytes | None:
    """The document for the next hop; ``None`` (bytes as they are) where there is nothing readable to patch."""
    if run.reading is None or run.claim.body is None:
        return None
    patch = {"id": run.job_id, "hop": codec.written_hop((run.reading.hop or 0) + 1), **patch}
    try:
        return codec.rewrite(run.claim.body, patch, state=state, secret=run.claim.secret)
    except InvalidJob:
        return None
