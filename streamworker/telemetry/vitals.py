"""What a worker's parts tell of themselves, and what follows for probes: alive, ready, and if not, why.

Pure: no clock, no I/O. A worker that is not *alive* is helped by a restart, and by nothing else: so a server that is
away does not make it dead, or every worker would be restarted, and what runs be cut off, because Redis restarts.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

LEAST_SILENCE: Final = 5.0
"""Seconds the event loop may stand still in any case, however short the lease is."""
LEAST_WAIT: Final = 30.0
"""Seconds claims may fail in any case before that is no passing trouble."""

Phase: TypeAlias = Literal["starting", "working", "draining"]


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """One worker at one moment.

    Attributes:
        phase: before its groups are joined, after that, after it was told to stop.
        lease: seconds.
        loop_silent: seconds since the event loop last answered.
        asking: seconds since the first of the claims that were made and have not succeeded; 0 without one.
        claim_trouble: why the last claim failed, or ``None``.
        renewed: seconds since the lease thread last reached the server; ``None`` before its first success.
        renewal_trouble: why its last call failed, or ``None``.
        away: one sentence per other server that does not answer.
        stuck: what will not end although it was told to, in a sentence.
    """

    phase: Phase
    lease: float
    loop_silent: float = 0.0
    asking: float = 0.0
    claim_trouble: str | None = None
    renewed: float | None = None
    renewal_trouble: str | None = None
    away: tuple[str, ...] = ()
    stuck: str | None = None


def not_alive(vitals: Vitals) -> str | None:
    """Why a restart would help; ``None`` while the loop turns and claims succeed, or fail for want of a server.

    Args:
        vitals: the worker, now.
    """
    if vitals.stuck is not None:
        return vitals.stuck
    if vitals.loop_silent > max(LEAST_SILENCE, vitals.lease):
        return f"the event loop has not turned for {vitals.loop_silent:.0f} s: a handler blocks it"
    if vitals.phase != "working" or vitals.asking <= max(LEAST_WAIT, 2 * vitals.lease):
        return None
    if vitals.renewal_trouble is not None or not _recent(vitals):
        return None  # the lease thread has a connection of its own: it is the server that is away
    trouble = f": {vitals.claim_trouble}" if vitals.claim_trouble else ""
    return f"no claim has succeeded for {vitals.asking:.0f} s although Redis answers{trouble}"


def not_ready(vitals: Vitals) -> str | None:
    """Why this worker cannot take jobs right now, or ``None``.

    Args:
        vitals: the worker, now.
    """
    if vitals.phase == "starting":
        return "starting: its groups are not joined yet"
    if vitals.phase == "draining":
        return "draining: it takes no more jobs"
    if (trouble := vitals.renewal_trouble or vitals.claim_trouble) is not None:
        return trouble
    if not _recent(vitals):
        return f"Redis has not answered for {vitals.renewed:.0f} s" if vitals.renewed is not None else "no lease yet"
    return vitals.away[0] if vitals.away else not_alive(vitals)


def _recent(vitals: Vitals) -> bool:
    return vitals.renewed is not None and vitals.renewed <= vitals.lease
