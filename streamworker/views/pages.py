"""A page of a listing over several queues, at a bounded cost however few rows fit."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic

import msgspec
from typing_extensions import TypeVar

from streamworker.broker import Operator, Page, PendingEntry, StoredJob
from streamworker.errors import UsageError
from streamworker.views.select import Selection

T = TypeVar("T")

BUDGET: Final = 0.15
"""Seconds of looking for rows that fit; then the page ends, and the next one goes on from there."""


class Slice(msgspec.Struct, Generic[T], frozen=True):
    """Rows of a listing.

    Attributes:
        rows: what fits; may be fewer than asked for, or none, although more may follow.
        after: where the next slice begins; ``None`` if this is the last.
        looked: entries that were looked at.
    """

    rows: list[T]
    after: str | None
    looked: int


async def pending_slice(
    operator: Operator, queues: list[str], selection: Selection, after: str = "", size: int = 50, budget: float = BUDGET
) -> Slice[PendingEntry]:
    """Pending jobs that fit, in the order of the queues, oldest entry first within a level.

    Args:
        operator: the server.
        queues: the queues that exist; the selection's own goes before.
        selection: which.
        after: where the slice before ended.
        size: rows at most, about.
        budget: seconds after which the slice ends with what it has.
    """

    def ask(queue: str, position: str) -> Awaitable[Page[PendingEntry]]:
        return operator.pending(queue, position, consumer=selection.worker, min_idle=selection.min_idle)

    return await _slice(
        _walk(queues, selection, after),
        ask,
        lambda row: selection.fits(row.job_id, row.entry_id, row.kind),
        size,
        budget,
    )


async def dead_slice(
    operator: Operator, queues: list[str], selection: Selection, after: str = "", size: int = 50, budget: float = BUDGET
) -> Slice[StoredJob]:
    """Dead letters that fit, in the order of the queues, newest first. Arguments as of `pending_slice`."""
    return await _slice(_walk(queues, selection, after), operator.dead, selection.fits_stored, size, budget)


async def delayed_slice(
    operator: Operator, queues: list[str], selection: Selection, after: str = "", size: int = 50, budget: float = BUDGET
) -> Slice[StoredJob]:
    """Delayed jobs that fit, in the order of the queues, soonest first. Arguments as of `pending_slice`."""
    return await _slice(_walk(queues, selection, after), operator.delayed, selection.fits_stored, size, budget)


def _walk(queues: list[str], selection: Selection, after: str) -> list[tuple[str, str]]:
    """(queue, where to begin in it) of all that are left.

    Raises:
        UsageError: no slice begins there.
    """
    names = [selection.queue] if selection.queue is not None else queues
    if not after:
        return [(name, "") for name in names]
    queue, separator, position = after.partition("|")
    if queue not in names or not separator:
        raise UsageError(f"no page begins at {after[:100]!a}: begin at the first one")
    return [(queue, position), *((name, "") for name in names[names.index(queue) + 1 :])]


async def _slice(
    walk: list[tuple[str, str]],
    ask: Callable[[str, str], Awaitable[Page[T]]],
    fits: Callable[[T], bool],
    size: int,
    budget: float,
) -> Slice[T]:
    rows: list[T] = []
    looked, deadline = 0, time.monotonic() + budget
    for index, (queue, begin) in enumerate(walk):
        after: str | None = begin
        while after is not None:
            page = await ask(queue, after)
            looked += page.looked
            rows += [row for row in page.rows if fits(row)]
            after = page.after
            if len(rows) >= size or time.monotonic() > deadline:
                if after is not None:
                    return Slice(rows, f"{queue}|{after}", looked)
                left = walk[index + 1 :]
                return Slice(rows, f"{left[0][0]}|" if left else None, looked)
    return Slice(rows, None, looked)
