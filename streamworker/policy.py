"""Policy: the verdict of each outcome, and no other rule.

Pure: no I/O, no clock, no randomness; the caller passes ``now`` (epoch seconds) and ``jitter`` (0 to 1).

The rules, in order:

1. Ok is Done.
2. A job whose workers died more than ``max_deliveries`` times is Dead before user code runs.
3. Retry, Snooze and Discard, which handlers raise, are obeyed; only Retry charges an attempt.
4. Raised and TimedOut charge an attempt: RetryAt while attempts remain, then Dead.
5. Interrupted, Postponed and Deferred are ReleaseAt: shutdown, a limit, or a task that other code cancelled is no
   failed attempt.
6. UnknownKind and Unopened are ReleaseAt with growing delay, since another worker may know the kind or have the key,
   and Dead by age.
7. Undecodable is Dead at once; its bytes are kept.
8. Cancelled is Drop: no failure, no attempt, no dead letter.
9. Recorded is what the ledger says.
10. Parked, which ``ctx.wait_for()`` and ``ctx.sleep()`` raise, is Park: no attempt is charged.
11. Expired is Expire, as is a retry or release that would be due when the job has expired, see `within`.

Also, a job that ran and is released uncharged again and again waits longer each time, see `least_wait`.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

import msgspec

from streamworker.errors import LONGEST_WAIT, Discard, HandlerSignal, Parked, Retry, Snooze
from streamworker.job import (
    Abandoned,
    Cancelled,
    Dead,
    Deferred,
    Done,
    Drop,
    Expire,
    Expired,
    Interrupted,
    Ok,
    Outcome,
    OutOfTurn,
    Park,
    Postponed,
    Raised,
    Recorded,
    ReleaseAt,
    RetryAt,
    TimedOut,
    Undecodable,
    UnknownKind,
    Unopened,
    Verdict,
)
from streamworker.redact import describe, fit, text_of

SUSPECT_DELIVERIES: Final = 3
"""From this delivery on a job is a suspect: two workers died with it. Most suspects only ran beside the job that kills,
which is found by halving, see `group_sizes` and `half_of`."""


def group_sizes(max_deliveries: int, concurrency: int) -> tuple[int, ...]:
    """Most suspects that run together at their third delivery, the fourth, and so on until one runs alone.

    The first group fills at most half of the worker, and fresh jobs run beside it. Each later one is at most half as
    large, or smaller where fewer deliveries are left, has the worker to itself, and the last delivery is alone: no job
    dies for another one. After the last size every group is of one.

    Args:
        max_deliveries: how many deliveries are allowed.
        concurrency: how many jobs a worker runs.
    """
    left, sizes = max_deliveries - SUSPECT_DELIVERIES, [max(1, concurrency // 2)]
    if left <= 0:
        return (1,)
    while sizes[-1] > 1 or len(sizes) == 1:
        later = len(sizes)
        even = sizes[0] ** (max(0, left - later) / left)  # the same part of the group that died, each time
        sizes.append(max(1, min(math.ceil(even - 1e-9), math.ceil(sizes[-1] / 2))))
    return tuple(sizes)


def apart_from(sizes: tuple[int, ...]) -> int:
    """The delivery from which on a group of suspects has its worker to itself: a group died beside fresh jobs."""
    return SUSPECT_DELIVERIES + (len(sizes) > 1)


def half_of(entry: bytes, delivery: int) -> str:
    """The group of a suspect: suspects of one delivery run together if it is the same.

    Each delivery splits each group of the delivery before in two, by the entry's digest, so that every worker splits a
    group in the same way, knowing nothing but its entries. The scripts do the same (``half_of`` in lua/prelude.lua).
    """
    digits = hashlib.sha1(entry, usedforsecurity=False).hexdigest()[: max(0, delivery - SUSPECT_DELIVERIES + 1)]
    return "".join("1" if int(digit, 16) % 2 else "0" for digit in digits)


RAPID: Final = 1.0
"""Seconds from the start of a run to the next: a job that comes back uncharged sooner does so rapidly."""
FREE_RETURNS: Final = 10
"""Rapid returns in a row without a wait: a handler may wait a moment for something."""
LONGEST_LEAST_WAIT: Final = 60.0
DONE: Final = Done()
DROP: Final = Drop()
EXPIRE: Final = Expire()
_WORDS: Final[dict[type, str]] = {
    Ok: "ok",
    Raised: "raised",
    TimedOut: "timed_out",
    Interrupted: "interrupted",
    Cancelled: "cancelled",
    Expired: "expired",
    Deferred: "deferred",
    OutOfTurn: "out_of_turn",
    Undecodable: "undecodable",
    UnknownKind: "unknown_kind",
    Unopened: "unopened",
    Postponed: "postponed",
    Abandoned: "abandoned",
    Recorded: "recorded",
}


class Backoff(msgspec.Struct, frozen=True):
    """Exponential backoff: ``min(cap, base * 2**failures) * (1 ± jitter)`` seconds.

    Attributes:
        base: seconds; the first retry waits twice this long.
        cap: seconds, the longest wait before jitter.
        jitter: 0 to 1, how far a wait may be off, so that retries of one outage do not arrive together.
    """

    base: float = 1.0
    cap: float = 300.0
    jitter: float = 0.25

    def __post_init__(self) -> None:
        if not (0 <= self.base < float("inf") and 0 <= self.cap <= LONGEST_WAIT and 0 <= self.jitter <= 1):
            raise ValueError(f"{self!r} needs base and cap from 0 up, cap up to 100 years, and jitter from 0 to 1")

    def delay(self, failures: int, jitter: float) -> float:
        """Seconds to wait after the ``failures``-th failure; ``jitter`` from 0 to 1 picks the point in the band."""
        wait = min(self.cap, self.base * 2.0 ** min(failures, 64))
        return wait * (1 + self.jitter * (2 * jitter - 1))


class Limits(msgspec.Struct, frozen=True):
    """What a handler grants its jobs.

    Attributes:
        max_attempts: failed attempts after which a job is dead.
        timeout: seconds a run may take; ``None`` for no limit.
        backoff: how long to wait between attempts.
        result_ttl: seconds for which the end of a job and its result are kept in Redis; ``None`` keeps nothing.
        progress_runs: attempts start anew after a run that recorded a step or a cursor, until a job has had so many
            runs; 0 for never.
    """

    max_attempts: int = 20
    timeout: float | None = 300.0
    backoff: Backoff = Backoff()
    result_ttl: float | None = None
    progress_runs: int = 0

    def __post_init__(self) -> None:
        if self.progress_runs < 0:
            raise ValueError(f"progress_runs={self.progress_runs} must be 0 or more")
        if self.result_ttl is not None and not 0 < self.result_ttl <= LONGEST_WAIT:
            raise ValueError(f"result_ttl={self.result_ttl} must be seconds above 0, up to 100 years, or None")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts={self.max_attempts} must be 1 or more")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout={self.timeout} must be seconds above 0, or None for no limit")


class Facts(msgspec.Struct, frozen=True):
    """The inputs of a verdict beside the outcome.

    Attributes:
        attempts: failed attempts before this run.
        limits: the handler's, with the job's own ``max_attempts`` put in.
        unknown_kind_ttl: seconds an unknown kind may wait for a worker that knows it.
        expires: seconds of the worker's monotonic clock from which on the job must not start.
        order: the job's order key; empty without one.
        halts: a dead job keeps its order key.
        key: deduplication key that is held until the job has started or ended; empty for none.
    """

    attempts: int
    limits: Limits
    unknown_kind_ttl: float
    expires: float | None = None
    order: str = ""
    halts: bool = False
    key: str = ""


def abandoned(deliveries: int, max_deliveries: int) -> Abandoned | None:
    """The outcome of a job before it runs: too many workers died with it, or ``None``.

    Args:
        deliveries: how often it was delivered, this time included.
        max_deliveries: how many deliveries are allowed.
    """
    return Abandoned(deliveries - 1) if deliveries > max_deliveries else None


def judge(outcome: Outcome, facts: Facts, *, now: float, jitter: float) -> Verdict:  # noqa: C901, PLR0912 - a table
    """What to do about an outcome.

    Args:
        outcome: what happened.
        facts: the job's and the handler's side of it.
        now: epoch seconds.
        jitter: 0 to 1, where in the backoff's band the wait falls.
    """
    match outcome:
        case Ok():
            return DONE
        case Raised(error=Discard() as wish):
            return Dead("discarded", fit(text_of(wish, how=_reason)))
        case Raised(error=Parked() as wish):
            return Park(wish.signal, wish.until)
        case Raised(error=Snooze() as wish):
            return ReleaseAt(now + wish.after, "snoozed")
        case Raised(error=Retry(after=float() | int() as after) as wish):
            return _charge(facts, fit(text_of(wish)), now + after)
        case Raised(error=error):
            return _charge(facts, describe(error), now + _wait(facts, jitter))
        case TimedOut(sentence=sentence):
            return _charge(facts, fit(sentence), now + _wait(facts, jitter))
        case Interrupted(reason=reason, wait=wait):
            return ReleaseAt(now + wait if wait else None, reason)
        case Cancelled():
            return DROP
        case Expired():
            return EXPIRE
        case Postponed(until=until):
            return ReleaseAt(until, "not due yet")
        case Deferred(until=until):
            return ReleaseAt(until, "a limit of its kind")
        case OutOfTurn():
            return ReleaseAt(None, "not its turn", line=True)
        case UnknownKind(kind=kind, since=since):
            why = f"no handler for {kind!r} appeared within {facts.unknown_kind_ttl:g} s"
            return _wait_for_another(since, facts, now, "unknown kind", why)
        case Unopened(error=message, since=since, reason=reason):
            return _wait_for_another(since, facts, now, reason, message)
        case Undecodable(error=message, reason=reason):
            return Dead(reason, fit(message))
        case Abandoned(deaths=deaths):
            return Dead(f"worker died {deaths} times")
        case Recorded(verdict=verdict):
            return verdict


def within(verdict: Verdict, *, now: float, left: float) -> Verdict:
    """The verdict on a job that expires: one that would start too late ends at once, and does not wait for it.

    Args:
        verdict: what `judge` said.
        now: epoch seconds.
        left: seconds until it expires.
    """
    match verdict:
        case RetryAt(at=at, error=error) if at - now >= left:
            return Expire(error, charged=True)
        case ReleaseAt(at=at, reason=reason) if (now if at is None else at) - now >= left:
            return Expire(reason)
    return verdict


def wish_in(error: BaseException) -> BaseException:
    """The `HandlerSignal` inside the groups that task groups raise, if it is the only error; else the error."""
    inner = error
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner if isinstance(inner, HandlerSignal | Parked) else error


def least_wait(rapid: int) -> float:
    """Seconds that a job waits at least after so many rapid returns in a row: 0 for ten, then 0.2, 0.4 … up to 60.

    Returns that charge nothing have no end of their own: without this one job of ``Snooze(0)`` keeps a worker busy.
    """
    return min(LONGEST_LEAST_WAIT, 0.1 * 2.0 ** min(rapid - FREE_RETURNS, 20)) if rapid > FREE_RETURNS else 0.0


def word_of(outcome: Outcome | None) -> str:
    """An outcome in a word, for labels and for the ledger; ``recorded`` where the ledger had decided before."""
    if type(outcome) is Ok:
        return "ok"
    if isinstance(outcome, Raised):
        if isinstance(outcome.error, Snooze):
            return "snoozed"
        if isinstance(outcome.error, Discard):
            return "discarded"
        if isinstance(outcome.error, Parked):
            return "waiting"
    return _WORDS.get(type(outcome), "raised")


def _reason(wish: Any) -> str:
    return str(wish.reason)


def _wait(facts: Facts, jitter: float) -> float:
    return facts.limits.backoff.delay(facts.attempts + 1, jitter)


def _charge(facts: Facts, error: str, at: float) -> Verdict:
    failures = facts.attempts + 1
    if failures < facts.limits.max_attempts:
        return RetryAt(at, error)
    return Dead(f"failed {failures} of {facts.limits.max_attempts} attempts", error, charged=True)


def _wait_for_another(since: float | None, facts: Facts, now: float, reason: str, error: str) -> Verdict:
    """The verdict on a job that this worker cannot run, and another one may."""
    since = now if since is None else min(since, now)
    age = now - since
    if age >= facts.unknown_kind_ttl:
        return Dead(reason, error)
    # Half its age again: soon enough in a rolling deploy, cheap for a kind without a handler, never past its end.
    wait = min(max(1.0, age / 2), 300.0, facts.unknown_kind_ttl - age)
    return ReleaseAt(now + wait, reason, unknown_since=since)
