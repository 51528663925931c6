"""What was seen in the last while: numbers for charts, and how fast they grow. Kept in the process, bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from streamworker.views.rows import QueueRow

POINTS: Final = 900
"""Looks that are kept: half an hour at one every 2 s."""
QUEUES: Final = 200
"""Queues with a history of their own; the sum of all is kept in any case."""
WINDOW: Final = 300.0
"""Seconds over which dead letters are said to grow."""


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One look, of one queue or of all: ``rate`` is jobs that left per second, ``oldest`` the age of the oldest."""

    at: float
    ready: int
    running: int
    delayed: int
    dead: int
    rate: float | None
    oldest: float | None


class History:
    """Points by queue; the name ``""`` stands for all together."""

    def __init__(self) -> None:
        self._points: dict[str, deque[Point]] = {"": deque(maxlen=POINTS)}

    def add(self, at: float, rows: Iterable[tuple[QueueRow, float | None]]) -> Point:
        """Remember one look at all queues; returns the point of all together.

        Args:
            at: epoch seconds.
            rows: (row, jobs per second).
        """
        pairs = list(rows)
        for row, rate in pairs:
            if row.queue in self._points or len(self._points) <= QUEUES:
                points = self._points.setdefault(row.queue, deque(maxlen=POINTS))
                points.append(Point(at, row.ready, row.running, row.delayed, row.dead, rate, row.oldest_age_s))
        rates = [rate for _, rate in pairs if rate is not None]
        ages = [row.oldest_age_s for row, _ in pairs if row.oldest_age_s is not None]
        seen = [row for row, _ in pairs]
        point = Point(
            at,
            sum(row.ready for row in seen),
            sum(row.running for row in seen),
            sum(row.delayed for row in seen),
            sum(row.dead for row in seen),
            sum(rates) if rates else None,
            max(ages, default=None),
        )
        self._points[""].append(point)
        for name in self._points.keys() - {""} - {row.queue for row, _ in pairs}:
            del self._points[name]
        return point

    def of(self, queue: str = "") -> Sequence[Point]:
        """The points of a queue, the oldest first."""
        return list(self._points.get(queue, ()))

    def died(self, queue: str) -> int:
        """Dead letters that came within the last few minutes, as far as anybody looked."""
        points = self._points.get(queue)
        if not points:
            return 0
        last = points[-1]
        before = next((point for point in points if point.at >= last.at - WINDOW), last)
        return max(0, last.dead - before.dead)
