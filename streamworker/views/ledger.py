"""Rows of the ledger. Their fields in this order are what ``--json`` prints."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import msgspec

from streamworker.postgres import Attempt, JobRecord
from streamworker.redact import redact


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


def job_row(job: JobRecord) -> JobRow:
    """The row of a job."""
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
        round(time.time() - job.created_at.timestamp(), 3),
        job.worker_id,
        job.error and redact(job.error),
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
        attempt.error and redact(attempt.error),
    )


def _moment(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _took(begin: datetime | None, end: datetime | None) -> Any:
    return None if begin is None or end is None else round((end - begin).total_seconds(), 6)
