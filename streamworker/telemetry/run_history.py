"""History of runs: how many started, were done, failed and were retried, and how long they ran and waited.

One `RunTally` for each queue, kind and span of time: minutes for two days, hours and days for sixty days. Times are
counted in buckets of equal ratio, twenty a decade, so that tallies of several workers and spans are added exactly and a
percentile is right to 6 %. PostgreSQL keeps them where there is a ledger, else Redis: both are a `HistoryWriter`, for
workers, and a `HistoryReader`, for the command line and the dashboard.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86_400
KEPT: Final = {MINUTE: 2 * DAY, HOUR: 60 * DAY, DAY: 60 * DAY}
"""Seconds of a span to the seconds for which its tallies are kept."""
PER_DECADE: Final = 20
BUCKETS: Final = 200
"""From 0.1 ms, whatever is shorter included, to 11 days, whatever is longer included."""
FIRST: Final = 80
"""The bucket that begins at one second."""

Counts = dict[int, int]
"""Bucket to how many."""


BOUNDS: Final = tuple(10 ** ((bucket - FIRST) / PER_DECADE) for bucket in range(1, BUCKETS))
"""Where each bucket ends, the last one aside. The bucket of a time is ``bisect(BOUNDS, seconds)``."""


def bucket_of(seconds: float) -> int:
    """The bucket of a time."""
    return bisect(BOUNDS, seconds)


def seconds_of(bucket: int) -> float:
    """The middle of a bucket, in seconds."""
    return float(10 ** ((bucket + 0.5 - FIRST) / PER_DECADE))


def add_counts(counts: Counts, more: Mapping[int, int]) -> None:
    """Add ``more`` to ``counts``."""
    for bucket, count in more.items():
        counts[bucket] = counts.get(bucket, 0) + count


def percentiles(counts: Mapping[int, int], shares: Sequence[float]) -> list[float | None]:
    """The times, in seconds, below which these shares (rising, 0 to 1) of all are; ``None`` if nothing was counted."""
    total = sum(counts.values())
    found: list[float | None] = []
    below, buckets = 0, iter(sorted(counts))
    bucket = -1
    for share in shares:
        while total and below < share * total:
            bucket = next(buckets)
            below += counts[bucket]
        found.append(seconds_of(bucket) if total else None)
    return found


class RunTally(msgspec.Struct):
    """Numbers of the runs of one queue and kind.

    Attributes:
        started: handlers that were called.
        done: runs after which the job was done.
        failed: runs that ended in a retry or a dead letter.
        retried: those of them that are tried again.
        run: how long handlers ran.
        wait: from the moment at which jobs were ready until their handlers were called.
    """

    started: int = 0
    done: int = 0
    failed: int = 0
    retried: int = 0
    run: Counts = msgspec.field(default_factory=dict)
    wait: Counts = msgspec.field(default_factory=dict)

    def add(self, other: RunTally) -> None:
        """Add the numbers of another."""
        self.started += other.started
        self.done += other.done
        self.failed += other.failed
        self.retried += other.retried
        add_counts(self.run, other.run)
        add_counts(self.wait, other.wait)

    def __bool__(self) -> bool:
        return bool(self.started or self.done or self.failed or self.run)


class HistoryRow(msgspec.Struct, frozen=True):
    """The tally of a queue and kind in the span that begins at ``at`` (epoch seconds)."""

    at: float
    queue: str
    kind: str
    tally: RunTally


class HistoryQuery(msgspec.Struct, frozen=True):
    """What is read.

    Attributes:
        span: `MINUTE`, `HOUR` or `DAY`.
        since: epoch seconds at which it begins.
        until: and ends.
        step: seconds of which the tallies are added up, a multiple of the span.
        queue: only of this queue.
        kind: only of this kind.
        kinds: the tally of each kind over the whole time is wanted; else `HistorySums.kinds` is empty.
    """

    span: int
    since: float
    until: float
    step: int
    queue: str | None = None
    kind: str | None = None
    kinds: bool = True


Place = tuple[str, str]
"""(queue, kind)."""
StepCounts = tuple[int, int, int, int]
"""How many started, were done, failed and were retried."""


class HistorySums(msgspec.Struct):
    """Tallies of a query, added up in the ways in which they are shown.

    Attributes:
        steps: begin of a step to the tally of all kinds together.
        kinds: the tally of each kind over the whole time.
        counts: the counts of each kind by step.
    """

    steps: dict[float, RunTally] = msgspec.field(default_factory=dict)
    kinds: dict[Place, RunTally] = msgspec.field(default_factory=dict)
    counts: dict[Place, dict[float, StepCounts]] = msgspec.field(default_factory=dict)

    def add(self, at: float, place: Place, tally: RunTally) -> None:
        """Add the tally of a kind in the step that begins at ``at``."""
        self.steps.setdefault(at, RunTally()).add(tally)
        self.kinds.setdefault(place, RunTally()).add(tally)
        by_step = self.counts.setdefault(place, {})
        one, two, three, four = by_step.get(at, (0, 0, 0, 0))
        by_step[at] = (one + tally.started, two + tally.done, three + tally.failed, four + tally.retried)


class HistoryWriter(Protocol):
    """Keeps tallies. Every method raises a `StreamworkerError` when the server does not answer or refuses."""

    async def add(self, rows: Sequence[HistoryRow]) -> float:
        """Add tallies of minutes to those that are there, of other workers, too; returns the server's time."""

    async def clock(self, queue: str) -> float:
        """The server's time, in epoch seconds; ``queue`` is one whose tallies are added."""


class HistoryReader(Protocol):
    """Reads tallies. Every method raises a `StreamworkerError` when the server does not answer."""

    async def read(self, query: HistoryQuery) -> HistorySums:
        """The tallies of a query."""

    async def now(self) -> float:
        """The server's time, in epoch seconds."""
