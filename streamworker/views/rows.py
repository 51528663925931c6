"""Rows, one type a listing, and numbers and foreign text as people read them.

The fields of a row in this order are what ``--json`` prints; `PendingEntry` is a row as it is.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import msgspec

from streamworker import codec
from streamworker.broker import StoredJob, WorkerInfo
from streamworker.encryption import hidden
from streamworker.errors import InvalidJob
from streamworker.job import UNTIL, Depth, Level
from streamworker.postgres import Attempt, JobRecord, StepRow
from streamworker.redact import redact


class QueueRow(msgspec.Struct, frozen=True):
    """Depth of a queue; ``oldest_age_s`` is the age in seconds of the oldest ready job.

    ``paused`` says that nothing is claimed from it; ``inactive``, that PostgreSQL says so and not an operator. Jobs
    that are ``waiting`` stand behind others with their order key; ``halted`` order keys do so behind dead jobs.
    """

    queue: str
    ready: int
    running: int
    delayed: int
    dead: int
    oldest_age_s: float | None
    paused: bool
    inactive: bool = False
    waiting: int = 0
    halted: int = 0


class DelayedRow(msgspec.Struct, frozen=True):
    """A parked job; ``due_in_s`` is negative for one that is overdue."""

    queue: str
    level: Level
    entry_id: str
    job_id: str | None
    kind: str | None
    due_at: str
    due_in_s: float


class DeadRow(msgspec.Struct, frozen=True):
    """A dead letter: why, after how many attempts and deliveries, on which worker, how long ago."""

    queue: str
    level: Level
    entry_id: str
    job_id: str | None
    kind: str | None
    reason: str
    error: str
    attempts: int
    deliveries: int
    worker_id: str
    failed_at: str
    age_s: float


class SpinningRow(msgspec.Struct, frozen=True):
    """A job that keeps coming back at once and uncharged: ``turns`` times in a row, each ``wait_s`` seconds now."""

    queue: str
    kind: str
    job_id: str
    turns: int
    wait_s: float


class LongestRow(msgspec.Struct, frozen=True):
    """The job that has run longest on a worker, or the one that blocks its event loop (``blocks``)."""

    queue: str
    kind: str
    job_id: str
    running_s: float
    blocks: bool

    @property
    def text(self) -> str:
        """In a few words."""
        return f"{self.kind or '?'} {self.job_id} for {age(self.running_s)}"


class WorkerRow(msgspec.Struct, frozen=True):
    """A worker's last heartbeat, and how many jobs are pending under its name; ``None`` where nothing beats."""

    worker_id: str
    alive: bool
    hostname: str | None
    pid: int | None
    queues: list[str]
    running: int | None
    pending: int
    done: int | None
    failed: int | None
    uptime_s: float | None
    rss_bytes: int | None
    loop_lag_s: float | None
    spinning: SpinningRow | None = None
    notice: str | None = None
    longest: LongestRow | None = None


def queue_row(depth: Depth) -> QueueRow:
    """The row of a queue."""
    oldest = None if depth.oldest_age is None else round(depth.oldest_age, 3)
    counts = (depth.ready, depth.running, depth.delayed, depth.dead)
    return QueueRow(depth.queue, *counts, oldest, depth.paused, depth.inactive, depth.waiting, depth.halted)


def delayed_row(job: StoredJob, now: float) -> DelayedRow:
    """The row of a parked job.

    Args:
        job: the job.
        now: epoch seconds.
    """
    wait = round(job.at_ms / 1000 - now, 3)
    return DelayedRow(job.queue, job.level, job.handle, job.job_id, job.kind, moment(job.at_ms), wait)


def dead_row(job: StoredJob, now: float) -> DeadRow:
    """The row of a dead letter.

    Args:
        job: the letter.
        now: epoch seconds.
    """
    told = job.details
    return DeadRow(
        queue=job.queue,
        level=job.level,
        entry_id=job.handle,
        job_id=job.job_id,
        kind=job.kind,
        reason=redact(told.get("reason", "")),
        error=redact(hidden(told.get("error", ""))),
        attempts=_whole(told.get("attempts")) or 0,
        deliveries=_whole(told.get("deliveries")) or 0,
        worker_id=told.get("worker", ""),
        failed_at=told.get("failed_at") or moment(job.at_ms),
        age_s=round(max(0.0, now - job.at_ms / 1000), 3),
    )


def worker_row(info: WorkerInfo, now: float) -> WorkerRow:
    """The row of a worker.

    Args:
        info: its heartbeat, and what the groups say.
        now: epoch seconds.
    """
    told = info.report
    started = _number(told.get("started"))
    return WorkerRow(
        worker_id=info.worker_id,
        alive=info.alive,
        hostname=told.get("hostname"),
        pid=_whole(told.get("pid")),
        queues=info.queues,
        running=_whole(told.get("running")),
        pending=info.pending,
        done=_whole(told.get("done")),
        failed=_whole(told.get("failed")),
        uptime_s=None if started is None else round(max(0.0, now - started), 1),
        rss_bytes=_whole(told.get("rss")),
        loop_lag_s=_number(told.get("loop_lag")),
        spinning=_spinning(told.get("spinning")),
        notice=told.get("notice") or None,
        longest=_longest(told.get("longest")),
    )


def _longest(text: str | None) -> LongestRow | None:
    try:
        return LongestRow(*msgspec.json.decode(text or "", type=tuple[str, str, str, float, bool]))
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return None


def _spinning(text: str | None) -> SpinningRow | None:
    try:
        queue, kind, job_id, turns, wait = msgspec.json.decode(text or "", type=tuple[str, str, str, int, float])
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return None
    return SpinningRow(queue, kind, job_id, turns, wait)


def _number(text: str | None) -> float | None:
    """Heartbeats are text, and anybody can write them."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e18 else None  # neither is infinity a number here, nor nan


def _whole(text: str | None) -> int | None:
    value = _number(text)
    return None if value is None else int(value)


class JobRow(msgspec.Struct, frozen=True):
    """A job of the ledger; moments are ISO 8601 in UTC."""

    job_id: str
    queue: str
    kind: str
    level: str
    status: str
    attempts: int
    max_attempts: int | None
    hop: int
    deliveries: int
    created_at: str
    run_at: str | None
    started_at: str | None
    finished_at: str | None
    took_s: float | None
    age_s: float
    worker_id: str | None
    error: str | None
    expires_at: str | None
    waits_for: str | None


class RecordedStep(msgspec.Struct, frozen=True):
    """A step of a job, without its value; moments are ISO 8601 in UTC.

    ``kind`` is step, sleep, wait or cursor, ``state`` is done, waiting or timed out, ``until`` when its time comes.
    """

    kind: str
    name: str
    state: str
    recorded_at: str
    took_s: float | None
    until: str | None
    worker_id: str | None


class AttemptRow(msgspec.Struct, frozen=True):
    """One run of a job; ``took_s`` is empty if its handler never began."""

    hop: int
    deliveries: int
    attempt: int
    outcome: str
    started_at: str | None
    finished_at: str | None
    took_s: float | None
    worker_id: str | None
    error: str | None


def job_row(job: JobRecord, now: float) -> JobRow:
    """The row of a job.

    Args:
        job: the job.
        now: epoch seconds.
    """
    return JobRow(
        job.id,
        job.queue,
        job.kind,
        job.level,
        job.status,
        job.attempts,
        job.max_attempts,
        job.hop,
        job.deliveries,
        _moment(job.created_at) or "",
        _moment(job.run_at),
        _moment(job.started_at),
        _moment(job.finished_at),
        _took(job.started_at, job.finished_at),
        round(max(0.0, now - job.created_at.timestamp()), 3),
        job.worker_id,
        job.error and redact(hidden(job.error)),
        _moment(job.expires_at),
        job.waits_for,
    )


def step_row(step: StepRow) -> RecordedStep:
    """The row of a step."""
    return RecordedStep(
        step.kind,
        step.name,
        step.state,
        _moment(step.recorded_at) or "",
        _took(step.started_at, step.recorded_at) if step.kind == "step" else None,
        _moment(step.until),
        step.worker_id,
    )


def attempt_row(attempt: Attempt) -> AttemptRow:
    """The row of an attempt."""
    return AttemptRow(
        attempt.hop,
        attempt.deliveries,
        attempt.attempt,
        attempt.outcome,
        _moment(attempt.started_at),
        _moment(attempt.finished_at),
        _took(attempt.started_at, attempt.finished_at),
        attempt.worker_id,
        attempt.error and redact(hidden(attempt.error)),
    )


def _moment(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _took(begin: datetime | None, end: datetime | None) -> Any:
    return None if begin is None or end is None else round((end - begin).total_seconds(), 6)


def age(seconds: float | None) -> str:
    """Seconds in two units at most: ``0.3s``, ``42s``, ``5m 03s``, ``3h 20m``, ``2d 04h``; empty for ``None``.

    Infinity and its like, which anybody may have written to the server, are shown as they are.
    """
    if seconds is None:
        return ""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 0:
        return f"-{age(-seconds)}"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"


def moment(epoch_ms: float) -> str:
    """Milliseconds since the epoch in ISO 8601, UTC; empty for a time no calendar has."""
    try:
        return datetime.fromtimestamp(epoch_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return ""


def size(count: int | None) -> str:
    """Bytes as ``84 MB``; empty for ``None`` and 0."""
    if not count:
        return ""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def document_facts(body: bytes | None) -> dict[str, Any]:
    """What a document says besides its payload and headers, and how long it is."""
    if body is None:
        return {"bytes": None, "unreadable": "there is no document"}
    try:
        document = codec.read(body)
    except InvalidJob as error:
        return {"bytes": len(body), "unreadable": str(error)}
    return {
        "bytes": len(body),
        "attempt_count": document.attempt_count or 0,
        "max_attempts": document.max_attempts,
        "hop": document.hop or 0,
        "run_at": None if document.run_at is None else document.run_at.isoformat(),
        "expires_at": None if document.expires_at is None else document.expires_at.isoformat(),
        "key": document.key if isinstance(document.key, str) else None,
        "unique": document.unique if document.unique in UNTIL else None,
    }
