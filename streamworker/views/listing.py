"""The jobs that an operator selected, read in pages; the actions on them, and the rate of many actions."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final, Generic, Literal, NamedTuple, TypeAlias

import anyio
import msgspec
from typing_extensions import TypeVar

from streamworker.broker import Operator, Page, PendingEntry, StoredJob
from streamworker.errors import StreamworkerError, UsageError
from streamworker.views.groups import group_of
from streamworker.views.rows import QueueRow, queue_row

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


_ENTRY_ID: Final = re.compile(r"[0-9]{13,20}-[0-9]{1,20}")  # as servers make them; job ids may look like 2024-117


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs: every condition given must hold.

    Attributes:
        queue: in this queue; ``None`` for all queues.
        ids: entry ids or job ids; empty for all.
        worker: held by this worker.
        min_idle: not renewed for this many seconds.
        kind: of this kind.
        reason: dead for a reason that contains this text.
        group: dead letters of this group (`streamworker.views.groups`).
        text: this text is in id, kind, reason or error, in upper or lower case.
    """

    queue: str | None = None
    ids: frozenset[str] = frozenset()
    worker: str | None = None
    min_idle: float = 0.0
    kind: str | None = None
    reason: str | None = None
    group: str | None = None
    text: str | None = None

    @property
    def narrows(self) -> bool:
        """Whether anything but a queue is asked for."""
        return any(getattr(self, name) for name in self.__struct_fields__ if name != "queue")

    def fits(self, job_id: str | None, entry_id: str, kind: str | None) -> bool:
        """Whether ids and kind are those asked for."""
        return (not self.ids or entry_id in self.ids or job_id in self.ids) and self.kind in (None, kind)

    def fits_stored(self, job: StoredJob) -> bool:
        """Whether a delayed job or a dead letter is one of those asked for."""
        if not self.fits(job.job_id, job.handle, job.kind):
            return False
        reason, error = job.details.get("reason", ""), job.details.get("error", "")
        if self.reason is not None and self.reason not in reason:
            return False
        stored = job.details.get("stored_error", error)
        if self.group is not None and self.group != group_of(job.queue, job.kind or "", stored, reason):
            return False
        if self.text is None:
            return True
        wanted = self.text.casefold()
        return any(wanted in (word or "").casefold() for word in (job.job_id, job.handle, job.kind, reason, error))

    @property
    def direct(self) -> list[str | None]:
        """Entry ids that are found without reading all others; ``[None]`` if all must be read."""
        if self.ids and all(_ENTRY_ID.fullmatch(name) for name in self.ids):
            return list(self.ids)
        return [None]

    async def queues(self, operator: Operator) -> list[str]:
        """The queue asked for, else all that exist."""
        return [self.queue] if self.queue is not None else await operator.queues()


class JobListing(NamedTuple, Generic[T]):
    """Jobs in one state, read page by page, queue by queue.

    Attributes:
        state: its name.
        column: what a `QueueRow` calls their number.
        page: reads one, of (operator, selection, queue, where it begins, the only entry id or ``None``).
        fits: whether a job is one of the selection.
        direct: an entry is found by its id without reading the others.
    """

    state: Literal["pending", "ready", "delayed", "dead"]
    column: Literal["running", "ready", "delayed", "dead"]
    page: Callable[[Operator, Selection, str, str, str | None], Awaitable[Page[T]]]
    fits: Callable[[Selection, T], bool]
    direct: bool = True

    async def chosen(self, operator: Operator, selection: Selection) -> AsyncIterator[T]:
        """All jobs that fit."""
        for queue in await selection.queues(operator):
            for only in selection.direct if self.direct else [None]:
                after: str | None = ""
                while after is not None:
                    page = await self.page(operator, selection, queue, after, only)
                    for row in page.rows:
                        if self.fits(selection, row):
                            yield row
                    after = page.after

    async def slice(
        self,
        operator: Operator,
        queues: list[str],
        selection: Selection,
        after: str = "",
        size: int = 50,
        budget: float = BUDGET,
    ) -> Slice[T]:
        """Some of the jobs that fit, for a page that people look at.

        Args:
            operator: the server.
            queues: the queues that exist; the selection's own goes before.
            selection: which.
            after: where the slice before ended.
            size: rows at most, about.
            budget: seconds after which the slice ends with what it has.

        Raises:
            UsageError: no slice begins there.
        """
        walk = _walk(queues, selection, after)
        rows: list[T] = []
        looked, deadline = 0, time.monotonic() + budget
        for index, (queue, begin) in enumerate(walk):
            cursor: str | None = begin
            while cursor is not None:
                page = await self.page(operator, selection, queue, cursor, None)
                looked += page.looked
                rows += [row for row in page.rows if self.fits(selection, row)]
                cursor = page.after
                if len(rows) >= size or time.monotonic() > deadline:
                    if cursor is not None:
                        return Slice(rows, f"{queue}|{cursor}", looked)
                    left = walk[index + 1 :]
                    return Slice(rows, f"{left[0][0]}|" if left else None, looked)
        return Slice(rows, None, looked)


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


PENDING: Final[JobListing[PendingEntry]] = JobListing(
    "pending",
    "running",
    lambda operator, wanted, queue, after, only: operator.pending(
        queue, after, consumer=wanted.worker, min_idle=wanted.min_idle, only=only
    ),
    lambda wanted, entry: wanted.fits(entry.job_id, entry.entry_id, entry.kind),
)
"""Oldest entry first within a queue's level."""
DELAYED: Final[JobListing[StoredJob]] = JobListing(
    "delayed",
    "delayed",
    lambda operator, _, queue, after, __: operator.delayed(queue, after),
    Selection.fits_stored,
    direct=False,
)
"""Soonest first within a queue."""
READY: Final[JobListing[StoredJob]] = JobListing(
    "ready",
    "ready",
    lambda operator, _, queue, after, __: operator.ready(queue, after),
    Selection.fits_stored,
    direct=False,
)
"""The next to be claimed first within a queue; those that are claimed are not among them."""
DEAD: Final[JobListing[StoredJob]] = JobListing(
    "dead",
    "dead",
    lambda operator, _, queue, after, only: operator.dead(queue, after, only=only),
    Selection.fits_stored,
)
"""Newest first within a queue."""


class Pace:
    """Jobs that left each queue per second, between two looks."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, int]] = {}

    def rate(self, queue: str, departed: int | None, now: float) -> float | None:
        """Jobs per second since the last look; ``None`` at the first, and where the server does not count.

        Args:
            queue: whose.
            departed: how many ever left it.
            now: seconds of a clock that never goes back.
        """
        if departed is None:
            return None
        before, self._before[queue] = self._before.get(queue), (now, departed)
        if before is None or now <= before[0]:
            return None
        return max(0.0, (departed - before[1]) / (now - before[0]))


async def overview(
    operator: Operator, queues: Sequence[str], pace: Pace | None = None
) -> list[tuple[QueueRow, float | None]]:
    """(row, jobs per second) of each queue; the rate needs a ``pace`` that was here before."""
    rows = [queue_row(depth) for depth in await operator.depth(queues)]
    if pace is None:
        return [(row, None) for row in rows]
    departed, now = await operator.departed(queues), time.monotonic()
    return [(row, pace.rate(row.queue, count, now)) for row, count in zip(rows, departed, strict=True)]


StoredAction: TypeAlias = Literal["replay", "erase", "hasten", "forget"]
"""On a dead letter, or on a delayed job."""
PendingAction: TypeAlias = Literal["release", "bury", "drop"]
"""On a job that a worker holds."""


def stored_action(operator: Operator, name: StoredAction) -> Callable[[StoredJob], Awaitable[bool]]:
    """What does it; False if the job has moved on."""
    return {
        "replay": operator.replay,
        "erase": operator.erase,
        "hasten": operator.run_now,
        "forget": operator.forget,
    }[name]


def pending_action(operator: Operator, name: PendingAction, reason: str) -> Callable[[PendingEntry], Awaitable[bool]]:
    """What does it; False if the job has moved on. ``reason`` is read in the dead letter of one that is buried."""
    if name == "bury":
        return lambda entry: operator.bury(entry, reason)
    return operator.release if name == "release" else operator.drop


async def outcome_of(change: Awaitable[bool]) -> tuple[Literal["done", "gone", "refused"], str]:
    """What one of many changes did: done, gone (the job had moved on), or refused, and why.

    Raises:
        StreamworkerError: it concerns them all: the server is away, or a setting is wrong.
    """
    try:
        return ("done" if await change else "gone"), ""
    except StreamworkerError as error:
        if error.exit_code != StreamworkerError.exit_code:
            raise
        return "refused", str(error)


class Throttle:
    """Spaces turns evenly; who comes late does not make up for it in a burst.

    Args:
        rate: turns a second; ``None`` for as fast as it goes.
    """

    def __init__(self, rate: float | None) -> None:
        self._gap = 1 / rate if rate else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        """Wait for the next turn."""
        if not self._gap:
            return
        now = time.monotonic()
        # A tenth of a second is made up for: sleeps overrun, and the rate shall hold on average.
        self._next = max(self._next + self._gap, now - 0.1)
        if self._next > now:
            await anyio.sleep(self._next - now)
