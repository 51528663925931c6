"""What an operator should look at first, worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from streamworker.views.rows import QueueRow, SpinningRow, WorkerRow
from streamworker.views.words import age

Severity: TypeAlias = Literal["bad", "warn", "note"]

LATE: Final = 60.0
"""Seconds the oldest ready job of a queue may wait before it is worth a word."""
VERY_LATE: Final = 600.0
LAG: Final = 1.0
"""Seconds an event loop may be late."""
_ORDER: Final[dict[Severity, int]] = {"bad": 0, "warn": 1, "note": 2}


class Stuck(msgspec.Struct, frozen=True):
    """Pending jobs of a queue that nobody renews.

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
        severity: ``bad`` keeps jobs from being done, ``warn`` soon may, ``note`` is as somebody wanted it.
        place: which listing shows more.
        sentence: what is so.
        queue: whose queue it is about.
        worker: whom it is about.
    """

    severity: Severity
    place: Literal["queues", "pending", "dead", "workers"]
    sentence: str
    queue: str | None = None
    worker: str | None = None


def attention(
    queues: Sequence[QueueRow], workers: Sequence[WorkerRow], stuck: Mapping[str, Stuck], died: Mapping[str, int]
) -> list[Notice]:
    """What needs attention, worst first.

    Args:
        queues: all queues.
        workers: all workers.
        stuck: by queue.
        died: by queue, how many dead letters came since somebody began to look.
    """
    living = [worker for worker in workers if worker.alive]
    found = [notice for worker in workers for notice in _of_worker(worker)]
    found += _of_spinning(living)
    for row in queues:
        served = any(row.queue in worker.queues for worker in living)
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
        sentence = f"{worker.worker_id} is late by {age(worker.loop_lag_s)}: a handler blocks its event loop"
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
