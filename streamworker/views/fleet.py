"""Everything at a glance: queues, workers, what needs attention, how it changes. One look costs the server little."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from streamworker.broker import Operator
from streamworker.views.attention import Notice, Stuck, attention
from streamworker.views.history import History, Point
from streamworker.views.rows import QueueRow, WorkerRow, worker_row
from streamworker.views.select import Pace, overview

NAMES_EVERY: Final = 15.0
"""Seconds between walks over the key space, which finds queues that are new and workers that hold nothing."""


class Look(msgspec.Struct, frozen=True):
    """What was seen.

    Attributes:
        at: when, in epoch seconds.
        queues: (row, jobs that left per second).
        workers: the living first.
        notices: what needs attention, worst first.
        total: all queues together.
    """

    at: float
    queues: list[tuple[QueueRow, float | None]]
    workers: list[WorkerRow]
    notices: list[Notice]
    total: Point

    @property
    def rates(self) -> dict[str, float | None]:
        """Jobs that left each queue per second."""
        return {row.queue: rate for row, rate in self.queues}


class Fleet:
    """Looks at everything, again and again.

    Args:
        operator: the server.
        lease: seconds after which an unrenewed claim is stuck.
        queue: only this one.
    """

    def __init__(self, operator: Operator, lease: float, queue: str | None = None) -> None:
        self._operator = operator
        self._lease = lease
        self._only = queue
        self._pace = Pace()
        self._names: list[str] = []
        self._named_at = float("-inf")
        self._idle: list[WorkerRow] = []
        self.history: Final = History()

    async def look(self) -> Look:
        """Look.

        Raises:
            Unreachable: no server answers.
        """
        now, at = time.monotonic(), time.time()
        walk = not self._names or now - self._named_at >= NAMES_EVERY
        if walk:
            self._names = [self._only] if self._only is not None else await self._operator.queues()
        rated = await overview(self._operator, self._names, self._pace)
        workers = await self._workers(at, walk)
        total = self.history.add(at, rated)
        stuck = {row.queue: found for row, _ in rated if row.running and (found := await self._stuck(row.queue))}
        died = {row.queue: self.history.died(row.queue) for row, _ in rated}
        if walk:
            self._named_at = now
        notices = attention([row for row, _ in rated], workers, stuck, died)
        return Look(at, rated, workers, notices, total)

    async def _workers(self, at: float, walk: bool) -> list[WorkerRow]:
        """Those that hold a name are looked at each time; the others are found by walking over the key space."""
        rows = [worker_row(info, at) for info in await self._operator.workers(self._names, everywhere=walk)]
        known = {row.worker_id for row in rows}
        if walk:
            self._idle = [row for row in rows if row.alive]
        return rows + [row for row in self._idle if row.worker_id not in known and not walk]

    async def _stuck(self, queue: str) -> Stuck | None:
        after: str | None = ""
        count, more, idle, pages = 0, False, 0, 0
        while after is not None and pages < 3:  # the oldest of each level
            page = await self._operator.pending(queue, after, min_idle=self._lease)
            count += len(page.rows)
            idle = max([idle, *(row.idle_ms for row in page.rows)])
            level = after.partition("/")[0] or "high"
            more = more or bool(page.rows and page.after and page.after.startswith(f"{level}/"))
            following = {"high": "normal/", "normal": "low/"}.get(level)
            after, pages = (following if page.after is not None else None), pages + 1
        return Stuck(count, more, idle / 1000) if count else None
