"""What workers and operators need of a ledger: the durable record of jobs and their runs. No SQL words in here.

The rule of the record: ``completed`` and ``cancelled`` are final; otherwise a run is recorded only if its (hop,
deliveries) are not below what is stored. A run is recorded before its claim is settled; settling follows the answer.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Final, Literal, Protocol, TypeAlias

import msgspec

from streamworker import codec
from streamworker.codec import Reading, deliveries_of
from streamworker.errors import RunEnded
from streamworker.job import Claim, Level

Status: TypeAlias = Literal[
    "queued", "dispatching", "dispatched", "running", "retrying", "completed", "dead", "cancelled"
]
JobKey: TypeAlias = tuple[str, str]
"""What names a job in the ledger: its queue, and its id within that."""
LANES: Final = 2
"""Batches that one worker records at once."""
FINAL: tuple[Status, Status] = ("completed", "cancelled")
"""What no run changes any more."""


class RunRecord(msgspec.Struct, gc=False):
    """What is told of one run of a job. Times are epoch seconds.

    Attributes:
        job_id: the job's id.
        queue: the queue it came from.
        kind: its kind; empty if nobody said.
        level: high, normal or low.
        hop: of the entry that ran.
        deliveries: of this run, deaths of workers on earlier entries included.
        attempt: which attempt this run is, from 1.
        attempts: failed attempts, this run included.
        max_attempts: how many the document allows; ``None`` leaves it to the handler.
        epoch: identity of the place it was claimed from.
        body: the whole document.
        payload: the payload's JSON; ``None`` if the document cannot be read.
        headers: the document's.
        started: when the handler began; ``None`` if it never did.
        created: when the producer made the job, if it said so.
        status: what the job is after this run.
        outcome: one word for the attempt's log.
        finished: when the run ended.
        run_at: when it runs again, for jobs that do.
        error: what went wrong.
        result: what the handler returned, as JSON.
        new: nothing was known of the job before it ran, and nothing has been written since: it is recorded without
            looking for its row first. A guess; if it is wrong, that only costs time.
    """

    job_id: str
    queue: str
    kind: str
    level: str
    hop: int
    deliveries: int
    attempt: int
    attempts: int
    max_attempts: int | None
    epoch: bytes
    body: bytes | None
    payload: msgspec.Raw | None
    headers: dict[str, Any] | None
    started: float | None
    created: float | None = None
    status: Status = "running"
    outcome: str = ""
    finished: float | None = None
    run_at: float | None = None
    error: str | None = None
    result: bytes | None = None
    new: bool = False


class Stored(enum.Enum):
    """The answer to one record."""

    STORED = "stored"
    ENDED = "ended"  # completed or cancelled before: nothing was changed
    SUPERSEDED = "superseded"  # a later hop or delivery of the job is known: nothing was changed
    BUSY = "busy"  # somebody works on the job's record right now: tell it again later


class Known(msgspec.Struct, frozen=True):
    """What is known of a job before it runs.

    Attributes:
        status: what it is.
        hop: of the last record.
        deliveries: of the last record.
        attempts: failed attempts.
        run_at: when it runs again, epoch seconds.
        error: what went wrong last.
    """

    status: Status
    hop: int
    deliveries: int
    attempts: int
    run_at: float | None
    error: str


class Effect(enum.Enum):
    """What became of a run's transaction."""

    OPEN = "open"
    COMMITTED = "committed"  # the writes and "this job is done" are stored
    UNDONE = "undone"  # nothing of it is stored
    ENDED = "ended"  # the job had ended before: nothing may be done
    SUPERSEDED = "superseded"  # a later hop or delivery of the job is known: whether it is really there is not
    BUSY = "busy"  # another run of the job holds its record
    LOST = "lost"  # PostgreSQL went away: nothing is known to be stored


def refusal(error: RunEnded) -> Effect:
    """What became of a transaction that a run was refused."""
    if error.busy:
        return Effect.BUSY
    return Effect.SUPERSEDED if error.superseded else Effect.ENDED


class Transaction(AbstractAsyncContextManager[Any], Protocol):
    """A database transaction in which the handler's writes and "this job is done" commit together."""

    effect: Effect


class Ledger(Protocol):
    """The record of one worker. Every method raises `Unreachable` while no database answers."""

    async def lookup(self, jobs: Collection[JobKey]) -> dict[JobKey, Known]:
        """What is known of claimed jobs; of a job that is not in the answer, nothing. It may hold jobs besides."""

    async def record(self, runs: Sequence[RunRecord]) -> list[Stored]:
        """Record finished runs; answers in order. Recording a run again changes nothing."""

    async def running(self, runs: Sequence[RunRecord]) -> None:
        """Note that these have been running for a while."""

    def transaction(self, run: RunRecord, deadline: float | None) -> Transaction:
        """The transaction of a run.

        Args:
            run: which.
            deadline: monotonic seconds at which the run times out.
        """

    async def complete(self, run: RunRecord, connection: Any) -> None:
        """Mark the job done in the caller's own transaction.

        Raises:
            UsageError: the connection is in no transaction.
        """

    def abandon(self) -> None:
        """Break off whatever is under way: it fails at once, whether or not the server got it."""

    async def tick(self) -> float:
        """Forget some of what is older than its queue's retention; returns the seconds until the next need."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the ledger remembers it.

    Attributes:
        id: the job's id.
        queue: the queue's name.
        kind: the kind; empty if nobody named one.
        level: high, normal or low.
        status: what it is.
        attempts: failed attempts so far.
        max_attempts: attempts the job itself allows; ``None`` leaves it to the handler.
        hop: how often it was put on a stream again.
        deliveries: of its last run.
        created_at: when it was made, as far as is known.
        run_at: not before this moment.
        started_at: when its last run began.
        finished_at: when it was completed, cancelled, or died.
        worker_id: where it ran last.
        error: what went wrong last, or why its result is missing.
        result: what the handler returned.
        payload: the payload's JSON text, undecoded; ``None`` if it was not asked for, or is only there as ``document``.
        headers: what travels with the job besides its payload.
        document: the whole document, where the database cannot hold its parts.
    """

    id: str
    queue: str
    kind: str
    level: Level
    status: Status
    attempts: int
    max_attempts: int | None
    hop: int
    deliveries: int
    created_at: datetime
    run_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    worker_id: str | None
    error: str | None
    result: Any = None
    payload: msgspec.Raw | None = None
    headers: dict[str, Any] | None = None
    document: bytes | None = None


class Attempt(msgspec.Struct, frozen=True):
    """One run of a job.

    Attributes:
        hop: of the entry that ran.
        deliveries: of this run.
        attempt: which attempt it was, from 1.
        worker_id: where it ran.
        started_at: when the handler began; ``None`` if it never did.
        finished_at: when it ended.
        outcome: one word: ok, raised, timed_out, interrupted, snoozed, discarded, undecodable, unknown_kind, abandoned,
            cancelled.
        error: what went wrong.
    """

    hop: int
    deliveries: int
    attempt: int
    worker_id: str | None
    started_at: datetime | None
    finished_at: datetime | None
    outcome: str
    error: str | None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs of the ledger; what is not said does not matter.

    Attributes:
        queue: of this queue.
        kind: of this kind.
        statuses: with one of these.
        since: made at this moment or later.
        ids: these.
        after: behind this one, given as (made at, id, queue), in the order of `Archive.jobs`.
    """

    queue: str | None = None
    kind: str | None = None
    statuses: tuple[Status, ...] = ()
    since: datetime | None = None
    ids: frozenset[str] = frozenset()
    after: tuple[datetime, str, str] | None = None


class Archive(Protocol):
    """What people ask the ledger, and do to it. Every method raises `Unreachable` while no database answers."""

    def jobs(self, wanted: Wanted, *, payload: bool = False) -> AsyncIterator[JobRecord]:
        """Jobs, newest first, in pages of bounded cost.

        Args:
            wanted: which.
            payload: with payload and document.
        """

    async def find(self, job_id: str, queue: str | None = None) -> JobRecord | None:
        """One job with everything that is known of it.

        Args:
            job_id: its id.
            queue: its queue; needed only where several queues have a job with this id.

        Raises:
            UsageError: several queues have one, and it is not said which is meant.
        """

    async def attempts(self, queue: str, job_id: str) -> list[Attempt]:
        """The runs of a job, oldest first."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """Cancel a job that does not run: it never will; False if it runs, has ended, or is not there."""

    async def free_keys(self, queue: str, ids: Sequence[str]) -> int:
        """Forget the deduplication keys of jobs; returns how many there were."""

    async def retry(self, queue: str, job_id: str) -> bool:
        """Queue a job anew that has ended, with all its attempts before it; False if it has not, or is not there."""

    async def prunable(self, queue: str | None = None, *, older: float | None = None) -> int:
        """How many jobs `prune` would forget.

        Args:
            queue: of this queue; all of them otherwise.
            older: that ended this many seconds ago; the queue's own retention otherwise.
        """

    async def prune(self, queue: str | None = None, *, older: float | None = None) -> int:
        """Forget a batch of completed and cancelled jobs, as `prunable`; returns how many: 0 when none is left."""


def run_record(claim: Claim, reading: Reading, *, kind: str, started: float | None) -> RunRecord:
    """The record of a run that has begun.

    Args:
        claim: what runs.
        reading: its document.
        kind: the handler's kind, or the document's.
        started: epoch seconds.
    """
    attempts = reading.attempt_count or 0
    return RunRecord(
        codec.job_id(reading, claim),
        claim.queue,
        kind,
        claim.level,
        reading.hop or 0,
        deliveries_of(claim, reading),
        attempts + 1,
        attempts,
        reading.max_attempts,
        claim.epoch,
        claim.body,
        reading.payload,
        reading.headers,
        started,
        codec.made_at(reading),
    )


def unread_record(claim: Claim) -> RunRecord:
    """The record of a claim whose document cannot be read: of the job that it names, if it names one."""
    told, hop = codec.told_of(claim.body)
    job_id = told or codec.derived_id(claim.place, claim.epoch, claim.entry)
    deliveries = deliveries_of(claim, None)
    return RunRecord(
        job_id, claim.queue, "", claim.level, hop, deliveries, 1, 0, None, claim.epoch, claim.body, None, None, None,
        None if claim.body is None else codec.made_at(claim.body),
    )  # fmt: skip
