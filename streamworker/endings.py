"""Outcome of a run to the ending a broker settles: the verdict, and the job's next form. Pure."""

from __future__ import annotations

from typing import Any

from streamworker import codec, notes
from streamworker.broker import Ending
from streamworker.errors import InvalidJob
from streamworker.execute import OK
from streamworker.job import Dead, Deferred, Done, Drop, Ok, ReleaseAt, RetryAt
from streamworker.limits import TURN_HEADER
from streamworker.policy import DONE, judge
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
            headers: dict[str, str | None] = {codec.DELIVERIES_HEADER: None, TURN_HEADER: None}
            body = _next_form(run, {"attempt_count": attempts + 1}, headers)
        case ReleaseAt():
            deaths = run.deliveries - 1
            headers = {codec.DELIVERIES_HEADER: str(deaths) if deaths > 0 else None}
            if isinstance(outcome, Deferred):
                headers[TURN_HEADER] = outcome.turn
                member = outcome.member
            elif run.started is not None:
                headers[TURN_HEADER] = None  # it had its turn
            if verdict.unknown_since is not None:
                headers[codec.UNKNOWN_HEADER] = str(int(verdict.unknown_since))
            body = _next_form(run, {}, headers)
    return Ending(run.claim, verdict, body, run.job_id, run.kind, attempts, member)


def keeping(run: Run) -> float | None:
    """Seconds for which its end is kept in Redis, if its handler says so."""
    return None if run.facts is None else run.facts.limits.result_ttl


def _next_form(run: Run, patch: dict[str, Any], headers: dict[str, str | None]) -> bytes | None:
    """The document for the next hop; ``None`` (bytes as they are) where there is nothing readable to patch."""
    if run.reading is None or run.claim.body is None:
        return None
    known = {**(run.reading.headers or {}), **codec.charges(run.reading)}
    changed = {name: value for name, value in headers.items() if value is not None or name in known}
    try:
        return codec.rewrite(run.claim.body, {"id": run.job_id, "hop": (run.reading.hop or 0) + 1, **patch}, changed)
    except InvalidJob:
        return None
