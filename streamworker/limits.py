"""Limits of kinds: how many jobs of a kind run in the whole fleet, and the permits that brokers grant for that."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from streamworker.job import Claim

_RATE: Final = re.compile(r"\s*(\d+)\s*/\s*(\d+(?:\.\d+)?)?\s*(s|sec|second|m|min|minute|h|hour|d|day)\s*")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MOST: Final = 100_000
"""Most starts a second, and most jobs at once: above this a limit is a mistake."""


class Quota(msgspec.Struct, frozen=True):
    """The limit of a handler's kind in the whole fleet.

    Attributes:
        concurrency: most jobs that run at once; 0 for any number.
        gap: seconds between two starts; 0 for none.
        burst: starts that may come at once.
        limit_by: the payload's field of whose values each has a limit of its own; empty for one limit for all.
    """

    concurrency: int = 0
    gap: float = 0.0
    burst: int = 1
    limit_by: str = ""


def quota(
    concurrency: int | None = None, rate: str | None = None, burst: int | None = None, limit_by: str | None = None
) -> Quota | None:
    """The quota that a handler's options describe; ``None`` without any.

    Args:
        concurrency: most jobs that run at once.
        rate: starts in a time, ``"100/s"``, ``"600/min"``, ``"5/10s"``.
        burst: starts that may come at once; a tenth of a second's worth, at least 1, unless given.
        limit_by: a field of the payload.

    Raises:
        ValueError: the options are wrong.
    """
    if concurrency is None and rate is None:
        if burst is not None or limit_by is not None:
            raise ValueError("burst and limit_by say nothing without concurrency= or rate=")
        return None
    if concurrency is not None and (isinstance(concurrency, bool) or not 1 <= concurrency <= _MOST):
        raise ValueError(f"concurrency={concurrency!r} must be from 1 to {_MOST}")
    gap = _gap(rate) if rate is not None else 0.0
    if burst is not None and (rate is None or isinstance(burst, bool) or not 1 <= burst <= _MOST):
        raise ValueError(f"burst={burst!r} must be from 1 to {_MOST}, and needs rate=")
    if limit_by is not None and not limit_by:
        raise ValueError("limit_by must name a field of the payload")
    return Quota(concurrency or 0, gap, burst or max(1, int(0.1 / gap) if gap else 1), limit_by or "")


def _gap(rate: str) -> float:
    """Seconds between starts."""
    match = _RATE.fullmatch(rate)
    count = int(match[1]) if match else 0
    seconds = float(match[2] or 1) * _SECONDS[match[3][0]] if match else 0.0
    if not count or not seconds or not 1 / _MOST <= seconds / count <= 86_400:
        raise ValueError(f"rate={rate!r} must be a number of starts in a time: '100/s', '600/min', '5/10s', '10/h'")
    return seconds / count


class Limit(msgspec.Struct, frozen=True):
    """The limit of a kind, or of one value of its payload.

    Attributes:
        queue: the jobs' queue.
        name: the kind, and the value.
        concurrency: most that run at once; 0 for any number.
        gap: seconds between two starts; 0 for none.
        burst: starts that may come at once after a while without any.
    """

    queue: str
    name: str
    concurrency: int = 0
    gap: float = 0.0
    burst: int = 1


class AcquireRequest(msgspec.Struct, frozen=True):
    """The request for a permit: a claimed job of a kind with a limit.

    Attributes:
        claim: the job.
        limit: which.
        job_id: the job's id.
        mark: eight hexadecimal digits that distinguish it from others of its id while it waits.
        turn: its turn from the last answer; empty the first time.
    """

    claim: Claim
    limit: Limit
    job_id: str
    mark: str
    turn: str = ""


class Permit(msgspec.Struct, frozen=True):
    """One place of a limit, held by a running job until it ends."""

    limit: Limit
    token: str


class AcquireResult(msgspec.Struct, frozen=True):
    """The answer to an `AcquireRequest`.

    Attributes:
        hold: the permit; ``None``: not yet.
        wait: seconds after which it asks again, unless a release wakes it sooner.
        turn: to be sent along then.
        member: its member in the due set meanwhile.
    """

    hold: Permit | None
    wait: float = 0.0
    turn: str = ""
    member: str = ""
