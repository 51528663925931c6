"""Context: the second argument of a handler. One object a job; everything that costs is made on first use."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from time import monotonic, time
from typing import Any, Final, Generic, overload

import asyncpg
import msgspec
from redis.asyncio import Redis
from structlog.contextvars import get_contextvars
from typing_extensions import TypeVar

from streamworker import codec
from streamworker.codec import DocumentFields, trace_id
from streamworker.encryption import PLAIN, Sealer
from streamworker.errors import LONGEST_WAIT, ConfigurationError, RunEnded, UsageError
from streamworker.job import Claim, Job, Progress
from streamworker.loops import at_once
from streamworker.policy import Limits
from streamworker.postgres import (
    AsyncSource,
    BlockingSource,
    BlockingTransaction,
    Cursor,
    Effect,
    Ledger,
    RunRecord,
    SqlConnection,
    Steps,
    Transaction,
    refusal,
    run_record,
)
from streamworker.results import Chunk, Emitter, LogKeeper, Parents, packed
from streamworker.telemetry.logs import get_logger, reporting_logger, tapped_logger

_LOGGER: Final = "streamworker.handler"
MAX_NOTE: Final = 200
"""Characters of a note that are kept."""

S = TypeVar("S", default=Any)
T = TypeVar("T")
S_co = TypeVar("S_co", covariant=True, default=Any)


class Shared(msgspec.Struct, Generic[S]):
    """What the contexts of one worker share. Only ``stopping`` changes."""

    worker_id: str
    services: S
    redis: Redis | None = None
    database: Any = None
    ledger: Ledger | None = None
    stopping: bool = False
    outputs: Emitter | None = None
    sealer: Sealer = PLAIN
    logs: LogKeeper | None = None


class RefusedTransaction(msgspec.Struct):
    """Why the job could not be completed in the handler's own transaction."""

    effect: Effect


def check_progress(done: float, total: float | None) -> None:
    """Refuse what is no progress.

    Raises:
        UsageError: no numbers from 0 up.
    """
    if not (done >= 0 and (total is None or total >= 0)) or float("inf") in (done, total):
        raise UsageError(f"progress({done!r}, {total!r}) needs numbers from 0 up")


def check_wait(what: str, seconds: float | None) -> float | None:
    """The seconds of a wait.

    Raises:
        UsageError: they are none.
    """
    if seconds is not None and not 0 <= seconds <= LONGEST_WAIT:
        raise UsageError(f"ctx.{what}() needs seconds from 0 up to 100 years, not {seconds!r}")
    return None if seconds is None else float(seconds)


class Context(Generic[S_co]):
    """A running job's view of its job, its worker and the user's services.

    Handlers in threads may read everything here; `redis` and `database` belong to the event loop.
    """

    __slots__ = (
        "_attempts", "_batch", "_claim", "_job", "_limits", "_loaded", "_log", "_output", "_progress", "_reading",
        "_shared", "_steps", "_transaction", "booked", "cause", "deadline_at", "heeded",
    )  # fmt: skip

    def __init__(self, shared: Shared[S_co], claim: Claim, reading: DocumentFields, limits: Limits) -> None:
        self._shared: Final = shared
        self._claim: Final = claim
        self._reading: Final = reading
        self._limits: Final = limits
        self._attempts: Final = reading.attempt_count or 0
        self.deadline_at: float | None = None  # monotonic seconds; the executor's
        self.cause = ""  # the worker's: why this run is cancelled
        self.heeded = False  # the handler read ``cancelled`` after that
        self.booked = False  # this run may have written to the ledger itself
        self._transaction: Transaction | BlockingTransaction | RefusedTransaction | None = None
        self._job: Job | None = None
        self._log: Any = None
        self._loaded: msgspec.Raw
        self._output: Any
        self._steps: Steps

    @property
    def job(self) -> Job:
        """The job: id, queue, kind, payload text, level, attempts, hop, headers."""
        if self._job is None:
            reading, claim = self._reading, self._claim
            job_id, kind = codec.job_id(reading, claim), reading.kind or ""
            self._job = Job(
                id=job_id,
                queue=claim.queue,
                kind=kind,
                payload=self._shared.sealer.shown_payload(getattr(self, "_loaded", reading.payload), job_id, kind),
                level=claim.level,
                attempts=self._attempts,
                max_attempts=self._limits.max_attempts,
                hop=reading.hop or 0,
                run_at=reading.run_at,
                expires_at=reading.expires_at,
                headers=reading.headers,
            )
        return self._job

    @property
    def batch(self) -> Sequence[Context[S_co]]:
        """In middleware around a handler of batches: the contexts of all its jobs, once it was called. Else empty."""
        return getattr(self, "_batch", ())

    @batch.setter
    def batch(self, contexts: Sequence[Context[S_co]]) -> None:
        self._batch = contexts

    def beside(self, claim: Claim, reading: DocumentFields, limits: Limits) -> Context[S_co]:
        """The context of another job of the same batch; called by the worker."""
        other = Context(self._shared, claim, reading, limits)
        other.deadline_at = self.deadline_at
        return other

    def take_loaded(self, payload: msgspec.Raw | None) -> None:
        """The payload's text, if it came from a store; called by the worker."""
        if payload is not None:
            self._loaded = payload

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self._attempts + 1

    @property
    def last_attempt(self) -> bool:
        """A failure now makes the job dead."""
        return self._attempts + 1 >= self._limits.max_attempts

    @property
    def delivery(self) -> int:
        """How often this job was handed to a worker: above 1, a worker was lost with it."""
        return self._claim.count + codec.state_of(self._reading, self._claim.secret).deliveries

    @property
    def worker_id(self) -> str:
        """The id of the worker that runs this job: its consumer name in the group."""
        return self._shared.worker_id

    @property
    def services(self) -> S_co:
        """What the app's ``lifespan`` yielded."""
        return self._shared.services

    @property
    def redis(self) -> Redis:
        """A Redis client for the handler's own use, with a pool of its own."""
        if self._shared.redis is None:
            raise ConfigurationError(
                "ctx.redis is not there: run the handler in a worker, or pass redis= to testing.context()"
            )
        return self._shared.redis

    @property
    def database(self) -> Any:
        """The database the worker was given; ``None`` without one."""
        return self._shared.database

    @property
    def log(self) -> Any:
        """A structlog logger bound to job id, kind, queue, worker, attempt, and trace id if the job has one.

        Its lines are kept with the job, too, where STREAMWORKER_JOB_LOG says so (docs/job-logs.md).
        """
        if self._log is None:
            job, trace, keeper, name = self.job, trace_id(self._reading.headers), self._shared.logs, _LOGGER
            taken = None if keeper is None else keeper.taker(self._claim, self._reading)
            self._log = (get_logger(name) if taken is None else tapped_logger(taken, name)).bind(
                job_id=job.id, kind=job.kind, queue=job.queue, worker_id=self.worker_id, attempt=self.attempt
            )
            if trace is not None and "trace_id" not in get_contextvars():  # a tracer knows better
                self._log = self._log.bind(trace_id=trace)
        return self._log

    @property
    def deadline(self) -> datetime | None:
        """The moment (UTC) at which this run times out; ``None`` without a timeout."""
        if self.deadline_at is None:
            return None
        return datetime.now(UTC) + timedelta(seconds=self.deadline_at - monotonic())

    @property
    def cancelled(self) -> bool:
        """This run was cancelled or timed out, or its claim was lost.

        Threads cannot be stopped: long ones should look here. A handler that returns after it has seen that its job was
        cancelled ends as cancelled; one that never looked has done its work, and is completed.
        """
        if not self.cause:
            return False
        self.heeded = True
        return True

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """Report how far the job has come, for `pending`, `jobs show` and the dashboard. Costs next to nothing.

        The worker stores it once a second at most, and deletes it with the run. Handlers in threads may call it.

        Args:
            done: how much of it is done.
            total: of how much; ``None`` if that is not known.
            note: what it is doing, in a few words; operators read it.
        """
        check_progress(done, total)
        self._progress = Progress(done, total, str(note)[:MAX_NOTE], time())

    async def emit(self, chunk: Chunk, /) -> None:
        """Append a chunk to the job's output, which readers follow while it runs (`App.output`).

        Chunks are sent together, 50 times a second at most: emit as often as you like. It waits only while a thousand
        chunks or 256 KiB are unsent.

        Args:
            chunk: a str, bytes, or what JSON can say; 64 KiB at most.

        Raises:
            UsageError: it is none of these, or too large.
            ClaimLost: the claim was lost, and another worker has the job; or the job has ended.
        """
        piece = packed(chunk)
        outputs = self._shared.outputs
        if outputs is None:
            self.emitted.append(chunk)
        else:
            await outputs.add(self._emitting(outputs), piece)

    def emit_blocking(self, chunk: Chunk, /) -> None:
        """`emit` for sync handlers, and for threads that a handler starts.

        Args:
            chunk: a str, bytes, or what JSON can say; 64 KiB at most.

        Raises:
            UsageError: it is none of these, or too large; or this is the event loop, which it would block.
            ClaimLost: the claim was lost, and another worker has the job; or the job has ended.
        """
        piece = packed(chunk)
        outputs = self._shared.outputs
        if outputs is None:
            self.emitted.append(chunk)
        else:
            outputs.add_from_thread(self._emitting(outputs), piece, lambda: self.cause)

    def _emitting(self, outputs: Emitter) -> Any:
        """This run's output; unset until then: most jobs emit nothing."""
        found = getattr(self, "_output", None)
        if found is None:
            found = self._output = outputs.begin(self._claim, self.job.id, self.attempt)
        return found

    @property
    def emitted(self) -> list[Chunk]:
        """What was emitted, in a context of `streamworker.testing`; in a worker it is not kept here."""
        if self._shared.outputs is not None:
            return []
        found: list[Chunk] = getattr(self, "_output", None) or []
        self._output = found
        return found

    @property
    def reported(self) -> Progress | None:
        """The last report of `progress`."""
        return getattr(self, "_progress", None)  # unset until then: most jobs report none

    def cancel(self, why: str) -> None:
        """Set `cancelled`; called by the worker."""
        self.cause = why

    @property
    def stopping(self) -> bool:
        """The worker is shutting down and waits for this run until its grace has passed."""
        return self._shared.stopping

    @overload
    def transaction(self, /) -> AbstractAsyncContextManager[asyncpg.Connection[asyncpg.Record]]: ...
    @overload
    def transaction(self, source: AsyncSource[T], /) -> AbstractAsyncContextManager[T]: ...
    @overload
    def transaction(self, source: BlockingSource[T], /) -> AbstractContextManager[T]: ...
    def transaction(self, source: Any = None, /) -> Any:
        """A PostgreSQL transaction in which the handler's writes and "this job is done" commit together, once.

        The block does not begin if the job was completed before, or another run of it is at work. When it was left
        without an error the job is done, whatever the handler does afterwards; left by an error, nothing is stored.

        Args:
            source: where the connection comes from, and what the block is given: an ``async_sessionmaker`` or
                ``AsyncEngine`` of SQLAlchemy, an ``AsyncConnectionPool`` of psycopg; in sync handlers, with a plain
                ``with``, their blocking twins, or Django's ``connection``. Without one: a connection of asyncpg.

        Raises:
            ConfigurationError: this worker has no ledger, or the source's database no schema streamworker.
            UsageError: this run had its transaction, or the source is none.
        """
        ledger = self._book("transaction")
        if self.effect is not None:
            raise UsageError("ctx.transaction() may be used once in a run: put what belongs together into one block")
        made = ledger.transaction(self._record(), self.deadline_at, source)
        self._transaction = made
        return made

    async def complete(self, connection: Any) -> None:
        """Mark the job done in the caller's own transaction: it is done if that commits.

        Args:
            connection: of asyncpg, psycopg (``AsyncConnection``) or SQLAlchemy (``AsyncSession``,
                ``AsyncConnection``), inside a transaction.

        Raises:
            ConfigurationError: this worker has no ledger, or the connection's database no schema streamworker.
            UsageError: the connection is in no transaction, or none that can be used.
        """
        await self._complete(connection, blocking=False)

    def complete_blocking(self, connection: Any) -> None:
        """`complete` for sync handlers.

        Args:
            connection: of psycopg (``Connection``), SQLAlchemy (``Session``, ``Connection``) or Django, inside a
                transaction.
        """
        at_once(self._complete(connection, blocking=True))

    async def _complete(self, connection: Any, *, blocking: bool) -> None:
        try:
            await self._book("complete").complete(self._record(), connection, blocking=blocking)
        except RunEnded as ended:
            self._transaction = RefusedTransaction(refusal(ended))
            raise

    @property
    def effect(self) -> Effect | None:
        """The state of this run's transaction; ``None`` without one."""
        return None if self._transaction is None else self._transaction.effect

    @property
    def parents(self) -> Parents:
        """The results of the nodes before this one in its flow (docs/workflows.md); a job in no flow has none.

        Raises:
            ConfigurationError: this worker has no ledger.
        """
        return Parents(self._book("parents").parents(self._record()), self._shared.sealer)

    # -- steps

    @overload
    async def step(
        self, name: str, function: Callable[..., Any], /, *args: Any, result: type[T], transaction: Any = None
    ) -> T: ...
    @overload
    async def step(
        self, name: str, function: Callable[..., Any], /, *args: Any, result: Any = None, transaction: Any = None
    ) -> Any: ...
    async def step(
        self, name: str, function: Callable[..., Any], /, *args: Any, result: Any = None, transaction: Any = None
    ) -> Any:
        """Call a function once per job: later runs of the job are given what it returned (docs/steps.md).

        Args:
            name: of the step; the steps of a handler have different names, and the same order in each run.
            function: sync or async; it is called again only if it failed, or its worker died inside of it.
            args: of the function.
            result: the type of the value, which is made of its JSON in every run; without one: dicts, lists, texts.
            transaction: where the connection comes from that the function gets before ``args``, as for `transaction`,
                or ``True`` for one of asyncpg. Its writes and the step commit together.

        Raises:
            ConfigurationError: this worker has no ledger.
            UsageError: the name is no name, or was used; the value is no JSON, or has more than 256 KiB.
            StepsChanged: an earlier run of the job recorded other steps.
        """
        return await self._open_steps("step").call(name, function, args, result, transaction)

    @overload
    def step_blocking(
        self, name: str, function: Callable[..., Any], /, *args: Any, result: type[T], transaction: Any = None
    ) -> T: ...
    @overload
    def step_blocking(
        self, name: str, function: Callable[..., Any], /, *args: Any, result: Any = None, transaction: Any = None
    ) -> Any: ...
    def step_blocking(
        self, name: str, function: Callable[..., Any], /, *args: Any, result: Any = None, transaction: Any = None
    ) -> Any:
        """`step` for sync handlers; ``transaction`` is a source that blocks."""
        return self._open_steps("step").call_blocking(name, function, args, result, transaction)

    @overload
    async def wait_for(self, name: str, /, *, timeout: float | None = None, result: type[T]) -> T: ...
    @overload
    async def wait_for(self, name: str, /, *, timeout: float | None = None, result: Any = None) -> Any: ...
    async def wait_for(self, name: str, /, *, timeout: float | None = None, result: Any = None) -> Any:
        """The data of a signal (`App.signal`). Until it comes, the job is in no worker and in no queue.

        The run ends here (`errors.Parked`, which is no `Exception`), and a later one starts anew from the top of the
        handler, with the values of its steps.

        Args:
            name: of the signal; a job waits once for each name.
            timeout: seconds after which the job goes on without it; ``None`` for never.
            result: the type of the data; without one: dicts, lists, texts.

        Raises:
            SignalTimeout: it did not come in time. A signal that comes later is refused.
            ConfigurationError: this worker has no ledger.
            UsageError: it is inside of a transaction, of a step, or in a handler of batches.
        """
        return await self._open_steps("wait_for").wait_for(name, check_wait("wait_for", timeout), result)

    def wait_for_blocking(self, name: str, /, *, timeout: float | None = None, result: Any = None) -> Any:
        """`wait_for` in sync handlers."""
        steps = self._open_steps("wait_for")
        return steps.wait(steps.wait_for(name, check_wait("wait_for", timeout), result))

    async def sleep(self, seconds: float) -> None:
        """Return when the time has passed; until then the job is in no worker and in no queue, as for `wait_for`.

        Args:
            seconds: counted from the first run that came here, by the database's clock.
        """
        await self._open_steps("sleep").sleep(check_wait("sleep", seconds) or 0.0)

    def sleep_blocking(self, seconds: float) -> None:
        """`sleep` in sync handlers."""
        steps = self._open_steps("sleep")
        steps.wait(steps.sleep(check_wait("sleep", seconds) or 0.0))

    @property
    def cursor(self) -> Cursor:
        """How far a long iteration has come: a later run of the job goes on from the last cursor that was set."""
        return Cursor(self._open_steps("cursor"))

    @property
    def steps(self) -> Steps | None:
        """The steps of this run; ``None`` if it has called none."""
        return getattr(self, "_steps", None)  # unset until then: most jobs have none

    def _open_steps(self, what: str) -> Steps:
        ledger = self._book(what)
        if self.effect is Effect.COMMITTED:
            raise UsageError(f"ctx.{what}() is of no use after ctx.transaction(): the job is done")
        found = self.steps
        if found is None:
            found = self._steps = ledger.steps(self._record(), self)
        return found

    @property
    def sealer(self) -> Sealer:
        """Seals what the job leaves; called by the ledger."""
        return self._shared.sealer

    @property
    def connection(self) -> SqlConnection | None:
        """The ledger's side of the transaction that is open; called by the worker."""
        transaction = self._transaction
        return None if isinstance(transaction, RefusedTransaction | None) else transaction.connection

    def refuse(self, effect: Effect) -> None:
        """This run may do nothing more; called by the ledger."""
        if self.connection is None:
            self._transaction = RefusedTransaction(effect)

    @contextmanager
    def during(self, transaction: Any) -> Iterator[None]:
        """The transaction of a step is open inside of the block; called by the ledger."""
        if self.effect is Effect.OPEN:
            raise UsageError("a step with transaction= cannot be inside of another transaction of this handler")
        before, self._transaction = self._transaction, transaction
        try:
            yield
        finally:
            if transaction.effect in (Effect.COMMITTED, Effect.UNDONE):
                self._transaction = before

    def _book(self, what: str) -> Ledger:
        if self._shared.ledger is None:
            raise ConfigurationError(
                f"ctx.{what}() needs the PostgreSQL ledger: set DATABASE_URL, and run `streamworker migrate up` once"
            )
        self.booked = True
        return self._shared.ledger

    def _record(self) -> RunRecord:
        return run_record(self._claim, self._reading, kind=self._reading.kind or "", started=time())


class ProgressReport(msgspec.Struct, array_like=True, tag="progress"):
    """Progress on its way from a handler's process to its worker."""

    number: int
    done: float
    total: float | None
    note: str


class LogReport(msgspec.Struct, array_like=True, tag="log"):
    """A line that a handler logs, on its way from its process to its worker, which writes and keeps it."""

    number: int
    level: str
    event: str
    values: dict[str, str]


class ProcessContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler with ``process=True`` knows of its job. The worker's clients and services are not there.

    Attributes:
        job: the job, without its payload text.
        attempt: which attempt this is, from 1.
        last_attempt: a failure now makes the job dead.
        delivery: how often this job was handed to a worker: above 1, a worker was lost with it.
        worker_id: the id of the worker.
        deadline: the moment (UTC) at which the process is killed; ``None`` without a timeout.
        number: of this call in its worker.
        address: where its worker receives progress.
    """

    job: Job
    attempt: int
    last_attempt: bool
    delivery: int
    worker_id: str
    deadline: datetime | None
    number: int
    address: str

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """Report how far the job has come, see `Context.progress`. A worker that is busy misses some reports.

        Args:
            done: how much of it is done.
            total: of how much; ``None`` if that is not known.
            note: what it is doing, in a few words; operators read it.

        Raises:
            UsageError: no numbers from 0 up.
        """
        check_progress(done, total)
        self._send(ProgressReport(self.number, done, total, str(note)[:MAX_NOTE]), within=0.0)

    @property
    def log(self) -> Any:
        """A structlog logger: the worker writes what is logged, as it does for other handlers (`Context.log`).

        A worker that is busy for a second misses lines.
        """
        return reporting_logger(self._report)

    def _report(self, level: str, event: str, values: dict[str, str]) -> None:
        self._send(LogReport(self.number, level, event, values), within=1.0)

    def _send(self, report: ProgressReport | LogReport, *, within: float) -> None:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(within)
            channel.sendto(msgspec.msgpack.encode(report), self.address)
