"""Everything at a glance: queues, workers, what needs attention, how it changes. One look costs the server little."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from streamworker.broker import Operator
from streamworker.views.groups import DeadGroup, DeadGroups
from streamworker.views.listing import Pace, overview
from streamworker.views.rows import QueueRow, SpinningRow, WorkerRow, age, worker_row

NAMES_EVERY: Final = 15.0
"""Seconds between walks over the key space, which finds queues that are new and workers that hold nothing."""


class Look(msgspec.Struct, frozen=True):
    """What was seen.

    Attributes:
        at: when, in epoch seconds by the server's clock.
        queues: (row, jobs that left per second).
        workers: the living first.
        notices: what needs attention, worst first.
        total: all queues together.
        groups: dead letters that failed alike, as far as they were read.
        refusal: why the server refuses writes; ``None`` if it takes them.
        silent: heartbeats cannot be written, or could not be within the last lease: a worker without one may live.
    """

    at: float
    queues: list[tuple[QueueRow, float | None]]
    workers: list[WorkerRow]
    notices: list[Notice]
    total: Point
    refusal: str | None = None
    silent: bool = False
    groups: list[DeadGroup] = []

    @property
    def rates(self) -> dict[str, float | None]:
        """Jobs that left each queue per second."""
        return {row.queue: rate for row, rate in self.queues}

    def count(self, state: Literal["running", "ready", "delayed", "dead"], queue: str | None) -> int:
        """Jobs in a state, of a queue or (``None``) of all."""
        return sum(getattr(row, state) for row, _ in self.queues if queue in (None, row.queue))


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
        self._refused_at = float("-inf")
        self.history: Final = History()
        self.groups: Final = DeadGroups(operator)

    async def look(self) -> Look:
        """Look.

        Raises:
            Unreachable: no server answers.
        """
        now, at = time.monotonic(), await self._operator.now()
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
        refusal = await self._operator.refusal(self._names)
        if refusal is not None:
            self._refused_at = now
        silent = now - self._refused_at < self._lease
        notices = attention([row for row, _ in rated], workers, stuck, died, silent=silent)
        for row, _ in rated:
            await self.groups.update(row.queue, row.dead, GROUPS)
        groups = self.groups.of([row.queue for row, _ in rated])
        notices += [notice_of(group, at) for group in groups if group.is_new(at)]
        if refusal is not None:
            notices = [Notice("bad", "queues", refusal), *notices]
        return Look(at, rated, workers, notices, total, refusal, silent, groups)

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


Severity: TypeAlias = Literal["bad", "warn", "note"]

LATE: Final = 60.0
"""Seconds the oldest ready job of a queue may wait before it is worth a word."""
VERY_LATE: Final = 600.0
LAG: Final = 1.0
"""Seconds an event loop may be late."""
_ORDER: Final[dict[Severity, int]] = {"bad": 0, "warn": 1, "note": 2}


class Stuck(msgspec.Struct, frozen=True):
    """Pending jobs of a queue whose leases no worker renews.

    Attributes:
        count: how many of the oldest were not renewed for a lease.
        more: there may be more of them: only the oldest were looked at.
        idle_s: seconds since the most neglected one was renewed.
    """

    count: int
    more: bool
    idle_s: float


class Notice(msgspec.Struct, frozen=True):
    """One thing that needs attention.

    Attributes:
        severity: ``bad`` keeps jobs from being done, ``warn`` soon may, ``note`` is as an operator wanted it.
        place: which listing shows more.
        sentence: what is so.
        queue: whose queue it is about.
        worker: whom it is about.
    """

    severity: Severity
    place: Literal["queues", "pending", "dead", "groups", "workers"]
    sentence: str
    queue: str | None = None
    worker: str | None = None


def attention(
    queues: Sequence[QueueRow],
    workers: Sequence[WorkerRow],
    stuck: Mapping[str, Stuck],
    died: Mapping[str, int],
    *,
    silent: bool = False,
) -> list[Notice]:
    """What needs attention, worst first.

    Args:
        queues: all queues.
        workers: all workers.
        stuck: by queue.
        died: by queue, how many dead letters came since the first look.
        silent: no heartbeat could be written lately, so that none tells who lives.
    """
    living = [worker for worker in workers if worker.alive or silent]
    found = [notice for worker in workers for notice in _of_worker(worker) if worker.alive or not silent]
    found += _of_spinning(living)
    for row in queues:
        served = silent or any(row.queue in worker.queues for worker in living)
        found += _of_queue(row, served=served, stuck=stuck.get(row.queue), died=died.get(row.queue, 0))
    return sorted(found, key=lambda notice: _ORDER[notice.severity])


def _of_worker(worker: WorkerRow) -> list[Notice]:
    if not worker.alive and worker.pending:
        jobs = f"{worker.pending:,} job{'' if worker.pending == 1 else 's'}"
        sentence = f"{worker.worker_id} vanished and still holds {jobs}; others take them over after the lease"
        return [Notice("warn", "pending", sentence, worker=worker.worker_id)]
    if worker.alive and worker.notice:
        return [Notice("warn", "workers", f"{worker.worker_id}: {worker.notice}", worker=worker.worker_id)]
    if worker.alive and (worker.loop_lag_s or 0) > LAG:
        job = worker.longest
        who = f"the job {job.job_id} ({job.kind})" if job is not None and job.blocks else "a handler"
        sentence = f"{worker.worker_id} is late by {age(worker.loop_lag_s)}: {who} blocks its event loop"
        return [Notice("warn", "workers", sentence, worker=worker.worker_id)]
    return []


def _of_spinning(workers: Sequence[WorkerRow]) -> list[Notice]:
    """A job goes from worker to worker: the last one that saw it counted furthest."""
    worst: dict[tuple[str, str], SpinningRow] = {}
    for job in (worker.spinning for worker in workers if worker.spinning is not None):
        known = worst.get((job.queue, job.job_id))
        if known is None or job.turns > known.turns:
            worst[job.queue, job.job_id] = job
    return [
        Notice(
            "warn",
            "queues",
            f"{job.queue}: the job {job.job_id} ({job.kind}) came back {job.turns:,} times in a row at once and "
            f"uncharged, and waits for {age(job.wait_s)} each time now: let it snooze for longer, or cancel it",
            job.queue,
        )
        for job in worst.values()
    ]


def _of_queue(row: QueueRow, *, served: bool, stuck: Stuck | None, died: int) -> list[Notice]:
    name, found = row.queue, []
    if stuck is not None:
        count = f"{stuck.count}{'+' if stuck.more else ''} pending job{'' if stuck.count == 1 else 's'}"
        sentence = f"{name}: {count} not renewed for {age(stuck.idle_s)}, longer than a lease"
        found.append(Notice("bad", "pending", sentence, name))
    if died:
        letters = f"{died:,} more dead letter{'' if died == 1 else 's'} in the last minutes"
        found.append(Notice("bad", "dead", f"{name}: {letters}, {row.dead:,} in all", name))
    waited = row.oldest_age_s or 0
    if row.paused:
        by = "inactive in PostgreSQL" if row.inactive else "paused"
        waiting = f", {row.ready:,} wait" if row.ready else ""
        found.append(Notice("note", "queues", f"{name} is {by}{waiting}", name))
    elif row.ready and not served:
        sentence = f"{name}: {row.ready:,} wait, the oldest for {age(waited)}, and no worker serves it"
        found.append(Notice("bad", "queues", sentence, name))
    elif row.ready and waited > LATE:
        severity: Severity = "bad" if waited > VERY_LATE else "warn"
        found.append(Notice(severity, "queues", f"{name}: the oldest ready job waits for {age(waited)}", name))
    return found


GROUPS: Final = 0.2
"""Seconds of one look for the dead letters of a queue; the next look goes on."""


def notice_of(group: DeadGroup, now: float) -> Notice:
    """A group of dead letters that is new."""
    jobs = f"{group.count:,} dead letter{'' if group.count == 1 else 's'}"
    what = f"{jobs} of {group.kind or 'no kind'}: {group.error}"
    return Notice("bad", "groups", f"{group.queue}: a new error since {age(now - group.first_s)}, {what}", group.queue)


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
