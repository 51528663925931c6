"""The ledger as protocols: `Ledger` for workers, `Archive` for operators, and the records they exchange. No SQL here.

The rule of the ledger: ``completed``, ``cancelled`` and ``expired`` are final; otherwise a run is recorded only if its
(hop, deliveries) are not below what is stored. A run is recorded before its claim is settled; settling follows the
answer.
"""
# ceiling: protocols and their values, read one by one; one split off would be looked for here

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import msgspec

from streamworker import codec
from streamworker.codec import DocumentFields, deliveries_of
from streamworker.encryption import Sealer
from streamworker.errors import RunEnded
from streamworker.job import Claim, Enqueued, FlowOfJob, FlowRecord, Job, KeyUse, Level, NodeRecord
from streamworker.payload import SweptStore
from streamworker.relay import ScheduleLedger
from streamworker.telemetry.run_history import HistoryReader, HistoryWriter

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Status: TypeAlias = Literal[
    "blocked",
    "queued",
    "dispatching",
    "dispatched",
    "running",
    "retrying",
    "waiting",
    "completed",
    "dead",
    "cancelled",
    "expired",
]
JobKey: TypeAlias = tuple[str, str]
"""The key of a job in the ledger: its queue, and its id within the queue."""
LANES: Final = 2
"""Batches that one worker records concurrently."""
FINAL: tuple[Status, ...] = ("completed", "cancelled", "expired")
"""Statuses that no run changes any more."""


class RunRecord(msgspec.Struct, gc=False):
    """One run of a job, as a worker records it in the ledger. Times are epoch seconds.

    Attributes:
        job_id: the job's id.
        queue: the queue it came from.
        kind: its kind; empty if the document names none.
        level: high, normal or low.
        hop: of the entry that ran.
        deliveries: of this run, deaths of workers on earlier entries included.
        attempt: which attempt this run is, from 1.
        attempts: failed attempts, this run included.
        max_attempts: how many the document allows; ``None`` leaves it to the handler.
        epoch: identity of the stream or list it was claimed from.
        body: the whole document.
        payload: the payload's JSON; ``None`` if the document cannot be read.
        headers: headers of the document.
        started: when the handler began; ``None`` if it never did.
        created: when the producer made the job, if the document says so.
        status: of the job after this run.
        outcome: one word for the attempt's log.
        finished: when the run ended.
        run_at: when the job runs again, if it does.
        error: what went wrong.
        result: what the handler returned, as JSON.
        new: the ledger had no row of the job before the run, and none was written since: it is inserted without a
            look for its row. A guess; a wrong one only costs time.
        expires: when the job expires, if it does.
        waits_for: the signal that a waiting job waits for.
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
    expires: float | None = None
    waits_for: str | None = None


class Stored(enum.Enum):
    """The ledger's answer to one `RunRecord`."""

    STORED = "stored"
    ENDED = "ended"  # completed, cancelled or expired before: nothing was changed
    SUPERSEDED = "superseded"  # a later hop or delivery of the job is known: nothing was changed
    BUSY = "busy"  # another transaction has locked the job's row: record it again later


class Known(msgspec.Struct, frozen=True):
    """The state of a job in the ledger before it runs.

    Attributes:
        status: of the job.
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
    """The outcome of a run's transaction."""

    OPEN = "open"
    COMMITTED = "committed"  # the writes and "this job is done" are stored
    UNDONE = "undone"  # nothing of it is stored
    ENDED = "ended"  # the job had ended before: nothing may be done
    SUPERSEDED = "superseded"  # a later hop or delivery of the job is known: whether it is really there is not
    BUSY = "busy"  # another run of the job holds its record
    LOST = "lost"  # PostgreSQL went away: nothing is known to be stored


def refusal(error: RunEnded) -> Effect:
    """The outcome of a transaction that was refused to a run."""
    if error.busy:
        return Effect.BUSY
    return Effect.SUPERSEDED if error.superseded else Effect.ENDED


class Transaction(AbstractAsyncContextManager[Any], Protocol):
    """A database transaction in which the handler's writes and "this job is done" commit together."""

    effect: Effect

    @property
    def connection(self) -> SqlConnection | None:
        """For our statements, while the block is open."""


class BlockingTransaction(AbstractContextManager[Any], Protocol):
    """`Transaction` for handlers in threads."""

    effect: Effect

    @property
    def connection(self) -> SqlConnection | None:
        """For our statements, while the block is open."""


class _AsyncEngine(Protocol[T_co]):
    def connect(self) -> AbstractAsyncContextManager[T_co]: ...


class _AsyncPool(Protocol[T_co]):
    def connection(self) -> AbstractAsyncContextManager[T_co]: ...


class _Engine(Protocol[T_co]):
    def connect(self) -> AbstractContextManager[T_co]: ...


class _Pool(Protocol[T_co]):
    def connection(self) -> AbstractContextManager[T_co]: ...


AsyncSource: TypeAlias = Callable[[], AbstractAsyncContextManager[T]] | _AsyncEngine[T] | _AsyncPool[T]
"""What type checkers see of a session factory, an engine or a pool, whichever library it is of."""
BlockingSource: TypeAlias = Callable[[], AbstractContextManager[T]] | _Engine[T] | _Pool[T]
"""`AsyncSource` for handlers in threads."""


class SqlConnection(Protocol):
    """A connection of the user's, inside the user's transaction, whichever library it is of.

    The coroutines of a ``blocking`` one never suspend: `loops.at_once` calls them without an event loop.
    """

    @property
    def blocking(self) -> bool:
        """Its statements block the thread that calls."""

    async def require_transaction(self) -> None:
        """Check that what is written now commits with the caller's rows.

        Raises:
            UsageError: it is in no transaction, or leads to no PostgreSQL.
        """

    async def fetch(self, statement: str, *values: Any) -> Sequence[Sequence[Any]]:
        """The rows of one statement.

        Args:
            statement: with parameters ``$1``, ``$2`` …, each cast from text, or from an array of texts, by the server.
            values: texts, lists of texts, ``None``.
        """

    async def copy(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> bool:
        """Add rows by COPY, in its text format; False, and nothing is added, where the library has none.

        Args:
            table: in the schema streamworker.
            columns: of the table.
            lines: the rows.
        """


class SqlTransaction(Protocol):
    """A transaction on a connection that ``ctx.transaction()`` takes from a pool, an engine or a session factory."""

    @property
    def blocking(self) -> bool:
        """Its statements block the thread that calls."""

    async def begin(self) -> tuple[SqlConnection, Any]:
        """Begin; returns (the connection for our statements, the object that the handler is given)."""

    async def commit(self) -> None:
        """Commit."""

    async def rollback(self) -> None:
        """Roll back, if the connection is still there."""

    async def release(self) -> None:
        """Give the connection back."""

    def break_off(self) -> None:
        """End the connection at once, from any thread; pending statements fail."""


class StepHost(Protocol):
    """The context of a run, as the run's steps use it."""

    cause: str
    """Why the run is cancelled; empty while it is not."""
    deadline_at: float | None

    @property
    def batch(self) -> Sequence[Any]:
        """Contexts of the batch that the job is in; empty if it is in none."""

    @property
    def connection(self) -> SqlConnection | None:
        """Of the transaction that the handler has open: what is recorded meanwhile commits with it."""

    def refuse(self, effect: Effect) -> None:
        """This run may do nothing more."""

    @property
    def sealer(self) -> Sealer:
        """Seals what steps return."""

    def during(self, transaction: Any) -> AbstractContextManager[None]:
        """The transaction of a step is open inside of the block."""


class Steps(Protocol):
    """The steps of one run. What ends with ``_blocking`` is for handlers in threads."""

    runs: int
    """Runs of the job that were recorded before this one."""
    progressed: bool
    """This run has recorded a step, or a cursor."""

    async def call(self, name: str, function: Callable[..., Any], args: Sequence[Any], result: Any, source: Any) -> Any:
        """The value of a step, remembered or recorded now; see `Context.step`."""

    def call_blocking(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], result: Any, source: Any
    ) -> Any:
        """`call` in a handler's thread."""

    async def wait_for(self, name: str, timeout: float | None, result: Any) -> Any:
        """The data of a signal; see `Context.wait_for`."""

    async def sleep(self, seconds: float) -> None:
        """Return once the time has passed; see `Context.sleep`."""

    async def cursor(self, default: Any, result: Any) -> Any:
        """The last cursor that a run of the job recorded."""

    async def set_cursor(self, value: Any, connection: Any) -> None:
        """Record a cursor; with a connection, in its transaction."""

    def set_cursor_blocking(self, value: Any, connection: Any) -> None:
        """`set_cursor` in a handler's thread."""

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, in a handler's thread."""


class StepMemory(NamedTuple):
    """A step that a run under test has recorded: its value as JSON, and when its time comes, in epoch seconds."""

    kind: str
    name: str
    value: str | None
    until: float | None


class ParentSource(Protocol):
    """The nodes before a running node of a flow, as `results.Parents` reads them."""

    async def read(self) -> Sequence[tuple[str, str, str | None]]:
        """(name, job's id, result's JSON) of each node before this one that was completed; of a flow its last ones."""

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, in a handler's thread."""


class Cursor:
    """How far a long iteration has come, in the ledger: ``ctx.cursor``.

    Args:
        steps: of the run.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def read(self, default: Any = None, *, result: Any = None) -> Any:
        """The cursor that this run or an earlier one of the job set last.

        Args:
            default: what is returned before one was set.
            result: its type; without one: dicts, lists, texts, numbers.
        """
        return await self._steps.cursor(default, result)

    async def set(self, value: Any, *, connection: Any = None) -> None:
        """Record how far the iteration has come. Costs one statement.

        Args:
            value: 256 KiB of JSON at most.
            connection: in a transaction of yours: the cursor and your rows commit together. As for `Context.complete`.
        """
        await self._steps.set_cursor(value, connection)

    def read_blocking(self, default: Any = None, *, result: Any = None) -> Any:
        """`read` for sync handlers."""
        return self._steps.wait(self._steps.cursor(default, result))

    def set_blocking(self, value: Any, *, connection: Any = None) -> None:
        """`set` for sync handlers; the connection is one that blocks."""
        self._steps.set_cursor_blocking(value, connection)


class KeptLog(msgspec.Struct, frozen=True):
    """What the run of a job logged.

    Attributes:
        job_id: the job's id.
        queue: its queue.
        hop: of the run.
        deliveries: of the run.
        lines: JSON: an array of [epoch seconds, level, text]; or that sealed.
        attempt: which attempt it was, from 1; only of what is read.
    """

    job_id: str
    queue: str
    hop: int
    deliveries: int
    lines: str
    attempt: int = 1


class Ledger(Protocol):
    """The ledger as one worker uses it. Every method raises `Unreachable` while no database answers."""

    async def lookup(self, jobs: Collection[JobKey]) -> dict[JobKey, Known]:
        """The state of claimed jobs. A job without a row is not in the answer, which may hold other jobs, too."""

    async def record(self, runs: Sequence[RunRecord]) -> list[Stored]:
        """Record finished runs; answers in order. Recording a run again changes nothing."""

    async def park(self, runs: Sequence[RunRecord]) -> list[Stored]:
        """Let jobs wait whose runs have ended, or queue those for which the signal is there; answers in order."""

    async def payloads_in_use(self, jobs: Mapping[str, int]) -> Collection[str]:
        """Ids of the stored payloads of those jobs that may be queued again, whatever Redis knows.

        Args:
            jobs: ids of jobs that have ended in Redis, to the hops at which they did.
        """

    async def keep_logs(self, logs: Sequence[KeptLog]) -> None:
        """Keep what runs that are recorded have logged."""

    async def running(self, runs: Sequence[RunRecord]) -> None:
        """Record that these jobs have been running for a while."""

    def transaction(self, run: RunRecord, deadline: float | None, source: Any = None) -> Any:
        """The transaction of a run: a `Transaction`, or a `BlockingTransaction` if the source blocks.

        Args:
            run: the run.
            deadline: monotonic seconds at which the run times out.
            source: where its connection comes from; ``None``: the worker's pool.

        Raises:
            UsageError: it is no source of connections.
        """

    def steps(self, run: RunRecord, host: StepHost) -> Steps:
        """The steps of a run."""

    async def complete(self, run: RunRecord, connection: Any, *, blocking: bool) -> None:
        """Mark the job done in the caller's own transaction.

        Args:
            run: of the job.
            connection: the caller's.
            blocking: the caller blocks, and the coroutine must not suspend.

        Raises:
            UsageError: the connection is in no transaction, or blocks and must not, or the other way round.
        """

    def parents(self, run: RunRecord) -> ParentSource:
        """The nodes before a job in its flow.

        Args:
            run: of the job.
        """

    def abandon(self) -> None:
        """Break the connections in use: every pending statement fails at once, executed by the server or not."""

    @property
    def history(self) -> HistoryWriter:
        """Where the history of runs is kept."""

    async def tick(self) -> float:
        """Delete old history and a batch of jobs past their retention; returns the seconds until the next call."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the ledger remembers it.

    Attributes:
        id: the job's id.
        queue: the queue's name.
        kind: the kind; empty if the document names none.
        level: high, normal or low.
        status: of the job.
        attempts: failed attempts so far.
        max_attempts: attempts the job itself allows; ``None`` leaves it to the handler.
        hop: how often it was put on a stream again.
        deliveries: of its last run.
        created_at: when it was made, as far as the ledger knows.
        run_at: not before this moment.
        expires_at: it never starts at this moment or later.
        waits_for: the signal that it waits for, if it has the status ``waiting``; ``run_at`` is its timeout then.
        started_at: when its last run began.
        finished_at: when it was completed, was cancelled, expired, or died.
        worker_id: the worker that ran it last.
        error: what went wrong last, or why its result is missing.
        result: what the handler returned.
        payload: the payload's JSON text, undecoded; ``None`` if it was not asked for, or is only there as ``document``.
        headers: of the document.
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
    expires_at: datetime | None = None
    waits_for: str | None = None
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
        worker_id: the worker that ran it.
        started_at: when the handler began; ``None`` if it never did.
        finished_at: when it ended.
        outcome: one word: ok, raised, timed_out, interrupted, snoozed, discarded, undecodable, unknown_kind, abandoned,
            cancelled, expired.
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


class StepRow(msgspec.Struct, frozen=True):
    """A step that a job has recorded.

    Attributes:
        position: in the order of the handler's steps, from 0; -1 is the cursor.
        kind: step, sleep, wait or cursor.
        name: of the step, or of the signal.
        state: done, waiting or timed out.
        value: what it returned, or the data of the signal, as JSON text.
        worker_id: the worker that recorded it.
        started_at: when its function was called.
        recorded_at: when it was recorded.
        until: when a sleep, or a wait with a timeout, is over.
    """

    position: int
    kind: str
    name: str
    state: str
    value: str | None
    worker_id: str | None
    started_at: datetime | None
    recorded_at: datetime
    until: datetime | None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A filter on jobs of the ledger; a field that is not set matches every job.

    Attributes:
        queue: of this queue.
        kind: of this kind.
        statuses: with one of these.
        since: made at this moment or later.
        ids: with one of these ids.
        after: behind this job, given as (made at, id, queue), in the order of `Archive.jobs`.
    """

    queue: str | None = None
    kind: str | None = None
    statuses: tuple[Status, ...] = ()
    since: datetime | None = None
    ids: frozenset[str] = frozenset()
    after: tuple[datetime, str, str] | None = None


class AuditRow(msgspec.Struct, frozen=True):
    """One action of an operator.

    Attributes:
        at: epoch seconds; ``None`` of one that is about to be kept.
        who: did it.
        source: ``cli``, ``dashboard`` or ``python``.
        action: what was done.
        queue, job_id, kind: to what; ``None`` where there is none. Of a flow, ``job_id`` is its id.
        details: what else was said.
        result: ``done``, ``gone`` (the job had moved on), or why it was refused.
    """

    who: str
    source: str
    action: str
    queue: str | None = None
    job_id: str | None = None
    kind: str | None = None
    details: str | None = None
    result: str = "done"
    at: float | None = None


MAX_COUNTED: Final = 2**31 - 1
"""Nodes or edges that are counted: all of them."""


class Flows(Protocol):
    """Flows as operators use them. Every method raises `Unreachable` while no database answers."""

    async def flows(
        self,
        *,
        status: str | None = None,
        name: str | None = None,
        after: tuple[datetime, str] | None = None,
        limit: int = 50,
        most: int = MAX_COUNTED,
    ) -> list[FlowRecord]:
        """Flows, newest first.

        Args:
            status: with this status.
            name: with this name.
            after: those behind the one that was started then and has this id.
            limit: most of them.
            most: nodes of each that are counted.
        """

    async def find(self, flow: str) -> FlowRecord | None:
        """One flow, by its id, or by its key if only one flow has that.

        Raises:
            UsageError: several flows have this key.
        """

    async def of_job(self, queue: str, job_id: str) -> FlowOfJob | None:
        """The flow that a job is a node of."""

    async def nodes(
        self, flow_id: str, *, limit: int = 10_000, edges: int = 1000, all_edges: int = MAX_COUNTED
    ) -> list[NodeRecord]:
        """The nodes of a flow, in the order in which they were added.

        Args:
            flow_id: which.
            limit: most of them.
            edges: to one node, at most.
            all_edges: if the flow has more in all, none is read.
        """

    async def cancel(self, flow_id: str) -> list[JobKey]:
        """Cancel what has not begun; the jobs that may be in Redis, where they have to be told."""

    async def failed(self, flow_id: str) -> list[JobKey]:
        """The jobs that `retry` would queue anew."""

    async def retry(self, flow_id: str) -> int:
        """Queue the dead, expired and cancelled jobs of a flow anew; returns how many there were."""

    async def delete(self, flow_id: str) -> bool:
        """Delete a flow and its jobs; False if it has not ended, or does not exist."""


class Archive(Protocol):
    """The ledger as operators use it: list, show, cancel, retry, prune. Every method raises `Unreachable` while no
    database answers.
    """

    @property
    def flows(self) -> Flows:
        """The flows of the ledger."""

    @property
    def history(self) -> HistoryReader:
        """The history of runs."""

    def jobs(self, wanted: Wanted, *, payload: bool = False) -> AsyncIterator[JobRecord]:
        """Jobs, newest first, in pages of bounded cost.

        Args:
            wanted: the filter.
            payload: with payload and document.
        """

    async def find(self, job_id: str, queue: str | None = None) -> JobRecord | None:
        """One job with all its columns.

        Args:
            job_id: its id.
            queue: its queue; needed only where several queues have a job with this id.

        Raises:
            UsageError: several queues have one, and ``queue`` is not given.
        """

    async def attempts(self, queue: str, job_id: str) -> list[Attempt]:
        """The runs of a job, oldest first."""

    async def erase(self, queue: str, ids: Sequence[str]) -> dict[str, int]:
        """Delete all rows of jobs, but none of a job that runs; returns how many of each table."""

    async def key_uses(self) -> list[KeyUse]:
        """The keys with which values are sealed, and how many. It reads all rows."""

    def payloads(self, namespace: str) -> SweptStore:
        """Payloads of the jobs of a namespace that are too large for a document."""

    async def logs(self, queue: str, job_id: str) -> list[KeptLog]:
        """What the runs of a job logged that have ended, in order."""

    async def steps(self, queue: str, job_id: str) -> list[StepRow]:
        """The steps that a job has recorded, in their order."""

    async def signal(self, job_id: str, name: str, data: str | None, queue: str | None) -> bool:
        """Send a signal to a job; False if one with this name was sent, timed out, or the job has ended.

        Args:
            job_id: its id.
            name: of the signal.
            data: as JSON text.
            queue: of the job; needed if the ledger does not know the job yet, or several queues have one with this id.

        Raises:
            UsageError: the queue is needed, or the name or the data cannot be stored.
        """

    async def now(self) -> float:
        """The database's clock, in epoch seconds."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """Cancel a job before it runs; False if it runs, has ended, or does not exist."""

    async def change(
        self, queue: str, job_id: str, *, payload: bytes | None, level: str, run_at: float | None, moved: str | None
    ) -> bool:
        """Let the row of a job that waits follow a change; False if it has started, or there is none.

        Args:
            queue: where it was.
            job_id: its id.
            payload: its new one; ``None`` as before.
            level: its level.
            run_at: epoch seconds at which it is due; 0 at once, ``None`` as before.
            moved: its new queue; ``None`` if it stays.
        """

    async def change_queued(
        self, was: JobRecord, body: bytes, *, level: str, run_at: float | None, moved: str | None
    ) -> bool:
        """Change a job that no relay has taken yet. A transaction that holds its row is waited for.

        Args:
            was: as it was read.
            body: its new document.
            level: its level.
            run_at: epoch seconds at which it is due; 0 at once, ``None`` as before.
            moved: its new queue; ``None`` if it stays.

        Returns:
            False if it does not wait as it was read any more.

        Raises:
            UsageError: it has to stay in its queue.
            InvalidJob: PostgreSQL cannot keep its payload.
        """

    @property
    def schedules(self) -> ScheduleLedger:
        """Schedules that are kept as data."""

    async def keep_audit(self, rows: Sequence[AuditRow]) -> bool:
        """Keep actions of operators; False if the schema is of an older release."""

    def audit(
        self, *, queue: str | None = None, job_id: str | None = None, who: str | None = None, since: float | None = None
    ) -> AsyncIterator[AuditRow]:
        """Actions of operators, newest first.

        Args:
            queue, job_id, who: only of these.
            since: not before this moment, in epoch seconds.
        """

    async def free_keys(self, queue: str, ids: Sequence[str]) -> int:
        """Delete the deduplication keys of jobs; returns how many there were."""

    async def retry(self, queue: str, job_id: str) -> bool:
        """Queue an ended job again, with all its attempts; False if it has not ended, expired, or does not exist."""

    async def prunable(self, queue: str | None = None, *, older: float | None = None) -> int:
        """How many jobs `prune` would delete.

        Args:
            queue: of this queue; all of them otherwise.
            older: that ended this many seconds ago; the queue's own retention otherwise.
        """

    async def prune(self, queue: str | None = None, *, older: float | None = None) -> int:
        """Delete a batch of the jobs that `prunable` counts; returns how many: 0 when none is left."""

    async def find_waiting(self, job: Job, max_bytes: int, key_ttl: float) -> Enqueued | None:
        """The answer for a job whose deduplication key belongs to one that waits here, if there is one."""


def run_record(claim: Claim, reading: DocumentFields, *, kind: str, started: float | None) -> RunRecord:
    """The record of a run that has begun.

    Args:
        claim: of the run.
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
        expires=codec.expiry(reading),
    )


def unread_record(claim: Claim) -> RunRecord:
    """The record of a claim whose document cannot be decoded, under the id that the document names, if any."""
    told, hop = codec.told_of(claim.body)
    job_id = told or codec.derived_id(claim.place, claim.epoch, claim.entry)
    deliveries = deliveries_of(claim, None)
    return RunRecord(
        job_id, claim.queue, "", claim.level, hop, deliveries, 1, 0, None, claim.epoch, claim.body, None, None, None,
        None if claim.body is None else codec.made_at(claim.body),
    )  # fmt: skip
