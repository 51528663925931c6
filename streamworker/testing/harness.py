"""Handlers under test: called bare with a context, run as a worker does without any server, or on a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from time import monotonic, time
from typing import Any, Final, overload

import anyio
import msgspec
from typing_extensions import TypeVar

from streamworker import codec
from streamworker.app import App
from streamworker.broker import Operator
from streamworker.context import Context, Shared
from streamworker.cron import Schedule
from streamworker.encryption import Keys
from streamworker.errors import ConfigurationError, HandlerSignal, Parked, Snooze, StreamworkerError, UsageError
from streamworker.execution import EXPIRED, Execution
from streamworker.handlers import Handlers
from streamworker.job import Claim, Job, Ok, Outcome, Postponed, TimedOut
from streamworker.observe import JobRun, Observer
from streamworker.payload import AnyPayload
from streamworker.policy import Limits
from streamworker.postgres import StepMemory
from streamworker.producer import make_job
from streamworker.relay import Outbox
from streamworker.settings import Settings
from streamworker.views.listing import DELAYED, Selection
from streamworker.wiring import memory_ledger
from streamworker.worker import QueueWorker
from streamworker.worker.batching import BatchExecution
from streamworker.worker.executor import Executor, Middleware
from streamworker.worker.host import WorkerResources
from streamworker.worker.tasks import Completion, JobTasks

S = TypeVar("S", default=Any)

WORKER_ID: Final = "worker-test"
_THREAD_GRACE: Final = 1.0
"""Seconds a thread may overrun its timeout before `run` stops waiting for it."""


class JobMemory:
    """What is remembered of a job between its runs, and was sent to it: for handlers with steps, waits and parents.

    Give the same one to each run of a job: ``context(payload, memory=memory)``.

    Args:
        signals: their data by their names; more may be put into ``memory.signals`` between two runs.
        parents: results of the nodes before the job in its flow, by their names.
    """

    def __init__(self, *, signals: Mapping[str, Any] | None = None, parents: Mapping[str, Any] | None = None) -> None:
        self.signals: dict[str, Any] = dict(signals or {})
        self.parents: dict[str, Any] = dict(parents or {})
        self.records: dict[int, StepMemory] = {}
        """What runs have recorded, by its place in the order of the handler's steps."""
        self.timed_out: set[str] = set()
        """Names of signals that did not come in time."""
        self._passed = 0.0

    def pass_time(self, seconds: float) -> None:
        """Sleeps and timeouts are over so much earlier."""
        self._passed += seconds

    def now(self) -> float:
        """Epoch seconds, with the time that has passed."""
        return time() + self._passed

    @property
    def steps(self) -> dict[str, Any]:
        """The values of the steps by their names."""
        return {each.name: _value(each) for each in self.records.values() if each.kind == "step"}

    @property
    def cursor(self) -> Any:
        """The cursor that was set last; ``None`` before that."""
        return next((_value(each) for each in self.records.values() if each.kind == "cursor"), None)


def _value(recorded: StepMemory) -> Any:
    return msgspec.json.decode(recorded.value or "null")


@overload
def context(
    job: AnyPayload | Job,
    /,
    *,
    attempt: int = 1,
    max_attempts: int = 20,
    timeout: float | None = 300,
    delivery: int = 1,
    redis: Any = None,
    database: Any = None,
    cancelled: bool = False,
    stopping: bool = False,
    memory: JobMemory | None = None,
) -> Context[Any]: ...
@overload
def context(
    job: AnyPayload | Job,
    /,
    *,
    services: S,
    attempt: int = 1,
    max_attempts: int = 20,
    timeout: float | None = 300,
    delivery: int = 1,
    redis: Any = None,
    database: Any = None,
    cancelled: bool = False,
    stopping: bool = False,
    memory: JobMemory | None = None,
) -> Context[S]: ...
def context(
    job: AnyPayload | Job,
    /,
    *,
    services: Any = None,
    attempt: int = 1,
    max_attempts: int = 20,
    timeout: float | None = 300,
    delivery: int = 1,
    redis: Any = None,
    database: Any = None,
    cancelled: bool = False,
    stopping: bool = False,
    memory: JobMemory | None = None,
) -> Context[Any]:
    """Make what a handler is handed beside its payload, to call it as the plain function it is.

    Args:
        job: the payload, or a job made with ``app.job(payload, headers=...)``.
        services: become ``ctx.services``.
        attempt: becomes ``ctx.attempt``, from 1.
        max_attempts: attempts after which a job is dead; with ``attempt`` it decides ``ctx.last_attempt``.
        timeout: seconds from now until ``ctx.deadline``; ``None`` for no deadline. Nothing ends the handler by it.
        delivery: becomes ``ctx.delivery``; above 1, a worker was lost with the job.
        redis: becomes ``ctx.redis``.
        database: becomes ``ctx.database``.
        cancelled: becomes ``ctx.cancelled``.
        stopping: becomes ``ctx.stopping``.
        memory: of the job's steps, waits and parents; without one, it has none of an earlier run. A handler that waits
            ends with `errors.Parked`, as in a worker.

    Raises:
        UsageError: ``attempt`` or ``delivery`` is below 1.
        InvalidJob: the payload cannot be written as JSON.
    """
    ledger = memory_ledger(memory or JobMemory())
    shared = Shared(WORKER_ID, services, redis, database, ledger, stopping=stopping)
    claim = _claim(job, attempt, delivery)
    made = Context(shared, claim, codec.read(claim.body or b""), Limits(max_attempts=max_attempts, timeout=timeout))
    if timeout is not None:
        made.deadline_at = monotonic() + timeout
    if cancelled:
        made.cancel(TimedOut.__name__)
    return made


async def run(
    app: App[Any],
    job: AnyPayload | Job,
    /,
    *,
    services: Any = None,
    attempt: int = 1,
    delivery: int = 1,
    redis: Any = None,
    database: Any = None,
    memory: JobMemory | None = None,
) -> Outcome:
    """Run one job as a worker does, without Redis: encode, decode, find the handler, middleware, handler, timeout.

    What a handler raises does not come out of here; it is in the outcome, as ``Raised(error)``.

    Args:
        app: its handlers and middleware.
        job: the payload, or a job made with ``app.job(payload, headers=...)``.
        services: become ``ctx.services``; ``None`` enters the app's ``lifespan``, as a worker does.
        attempt: becomes ``ctx.attempt``, from 1.
        delivery: becomes ``ctx.delivery``; a job delivered too often is ``Abandoned`` before it runs.
        redis: becomes ``ctx.redis``.
        database: becomes ``ctx.database``.
        memory: of the job's steps, waits and parents, as for `context`.

    Raises:
        UsageError: ``attempt`` or ``delivery`` is below 1.
        InvalidJob: the payload cannot be written as JSON.
    """
    claim = _claim(job, attempt, delivery)
    async with AsyncExitStack() as stack:
        if services is None and app.lifespan is not None:
            services = await stack.enter_async_context(app.lifespan())
        shared = Shared(WORKER_ID, services, redis, database, memory_ledger(memory or JobMemory()))
        executor = Executor(app.handlers, shared, middleware=app.middleware, threads=1)
        return await _outcome(executor, Execution(claim))
    raise AssertionError("a lifespan must not swallow errors")


class _OneCompletion(Completion):
    """Completion of one job, which is neither recorded nor settled."""

    def __init__(self) -> None:
        self.ended: Final = anyio.Event()

    def finish(self, run: Execution) -> None:
        if isinstance(run, BatchExecution):
            list(run.disperse())
        self.ended.set()


async def _outcome(executor: Executor, run: Execution) -> Outcome:
    """Prepare and run as a worker does. This machine's clock says what is due, and one job is a batch of one."""
    copy_context().run(executor.prepare, run)
    if run.outcome is None and run.reading is not None and run.special:
        until, expires = codec.when(run.reading) or 0.0, codec.expiry(run.reading)
        if expires is not None and expires <= time():
            run.outcome = EXPIRED
        elif until > time():
            run.outcome = Postponed(until)
        elif run.reading.run_at is not None or expires is not None:
            copy_context().run(executor.decode, run)
    if run.outcome is None:
        together = run.registration is not None and run.registration.together is not None
        await _in_task(executor, BatchExecution([run]) if together else run)
    if run.outcome is None:
        raise AssertionError("a run that ended has an outcome")
    return run.outcome


async def _in_task(executor: Executor, run: Execution) -> None:
    completion = _OneCompletion()

    def abandon(stuck: Execution) -> None:
        """A worker would exit with 70; here the thread is left behind."""
        stuck.outcome = TimedOut((stuck.deadline or 0.0) - (stuck.started or 0.0))
        completion.finish(stuck)

    tasks = JobTasks(1, executor, completion, stuck=abandon, grace=_THREAD_GRACE)
    tasks.open()
    try:
        tasks.put(run)
        await completion.ended.wait()
    finally:
        with anyio.CancelScope(shield=True):
            await tasks.close(_THREAD_GRACE)


def _claim(job: AnyPayload | Job, attempt: int, delivery: int) -> Claim:
    """The job as a worker would get it; through its document, so that what JSON does to a payload is tested too."""
    if attempt < 1 or delivery < 1:
        raise UsageError(f"attempt={attempt} and delivery={delivery} count from 1")
    made = job if isinstance(job, Job) else make_job(job)
    if made.expires_in is not None:
        made = msgspec.structs.replace(made, expires_at=datetime.now(UTC) + timedelta(seconds=made.expires_in))
    if attempt > 1:
        made = msgspec.structs.replace(made, attempts=attempt - 1)
    settings = Settings()
    packed = codec.pack(made, max_bytes=settings.max_job_bytes, key_ttl=settings.key_ttl)
    return Claim(made.queue, made.level, f"test:{made.queue}", b"0-1", delivery, packed.body, b"")


class Drained(msgspec.Struct, frozen=True):
    """What a `drain` did, and what is left.

    Attributes:
        done: runs that succeeded.
        failed: runs that raised, timed out, or asked for `Retry` or `Discard`.
        snoozed: runs that raised `Snooze`.
        delayed: jobs that wait until later, afterwards.
        dead: dead letters, afterwards.
        errors: what handlers raised, in order, without `Retry`, `Snooze` and `Discard`.
    """

    done: int
    failed: int
    snoozed: int
    delayed: int
    dead: int
    errors: list[BaseException]


async def drain(app: App[Any], *, services: Any = None, delayed: bool = False, timeout: float = 30.0) -> Drained:
    """Run a worker on the app's queues until nothing is ready, on the servers of the app's settings.

    Jobs that become due meanwhile run too, and what jobs enqueue; so do jobs that wait in the ledger for the relay.

    Args:
        app: its settings say where; `streamworker.testing.plugin` puts it on embedded servers.
        services: become ``ctx.services``; ``None`` enters the app's ``lifespan``, once.
        delayed: delayed jobs, retries and snoozed jobs are due at once, until none is left.
        timeout: seconds after which this gives up; a job that snoozes for ever never gets done.

    Raises:
        StreamworkerError: the time was up, or a worker could not start.
    """
    settings = app.resolve(None)
    queues = [spec.name for spec in settings.queues] or app.queues
    with anyio.move_on_after(timeout):
        async with AsyncExitStack() as stack:
            operator = await stack.enter_async_context(app.operator(settings))
            outbox = await _outbox(app, settings, stack)
            if services is None and app.lifespan is not None:
                services = await stack.enter_async_context(app.lifespan())
            counted = _CountedApp(app)
            while True:
                ready = await _run_now(operator, queues, everything=delayed)
                if delayed and outbox is not None:
                    ready += await outbox.run_now(queues)
                due, later = (0, 0) if outbox is None else await outbox.queued(queues)
                depths = await operator.depth(queues)
                if not ready and not due and not any(depth.ready for depth in depths):
                    later += sum(depth.delayed for depth in depths)
                    return counted.drained(later, sum(depth.dead for depth in depths))
                await QueueWorker(counted, redis=None, database=None, services=services).run(burst=True)
    raise StreamworkerError(
        f"drain() was not done within {timeout:g} s: a handler runs longer, or jobs come back for ever"
    )


async def _outbox(app: App[Any], settings: Settings, stack: AsyncExitStack) -> Outbox | None:
    """Where jobs that were enqueued in a transaction wait; ``None`` if the worker will not look there."""
    if settings.ledger == "off" or settings.relay == "off":
        return None
    try:
        return (await stack.enter_async_context(app.relaying(settings))).outbox
    except ConfigurationError:  # no database, or no schema in it: no ledger
        return None


async def _run_now(operator: Operator, queues: list[str], *, everything: bool) -> int:
    """Move delayed jobs to their streams, those that are due or all of them; returns how many."""
    now = time() * 1000
    found = [
        job
        for queue in queues
        async for job in DELAYED.chosen(operator, Selection(queue=queue))
        if job.body is not None and (everything or job.at_ms <= now)
    ]
    moved = 0
    for job in found:
        moved += await operator.run_now(job)
    return moved


class _OutcomeCounter(Observer):
    """Counts outcomes of runs."""

    def __init__(self) -> None:
        self.done = self.failed = self.snoozed = 0
        self.errors: list[BaseException] = []

    def on_outcome(self, run: JobRun) -> None:
        """Count the outcome."""
        if run.started_at is None:
            return
        if isinstance(run.outcome, Ok):
            self.done += 1
        elif isinstance(run.exception, Snooze):
            self.snoozed += 1
        else:
            self.failed += 1
            if run.exception is not None and not isinstance(
                run.exception, HandlerSignal | Parked | asyncio.CancelledError
            ):
                self.errors.append(run.exception)


class _CountedApp:
    """An app whose runs are counted; its lifespan is entered by `drain` and not by each worker."""

    def __init__(self, app: App[Any]) -> None:
        self._app = app
        self._counts = _OutcomeCounter()

    def drained(self, delayed: int, dead: int) -> Drained:
        """The counts so far, with what is left."""
        counts = self._counts
        return Drained(counts.done, counts.failed, counts.snoozed, delayed, dead, counts.errors)

    @property
    def handlers(self) -> Handlers[Any]:
        return self._app.handlers

    @property
    def middleware(self) -> tuple[Middleware, ...]:
        return self._app.middleware

    @property
    def schedules(self) -> Sequence[Schedule]:
        return []  # what is there is drained; the calendar goes on elsewhere

    @property
    def observers(self) -> tuple[Observer, ...]:
        return (self._counts, *self._app.observers)

    @property
    def encryption(self) -> Keys | None:
        return self._app.encryption

    @property
    def lifespan(self) -> None:
        return None

    def operator(self, settings: Settings, redis: Any) -> AbstractAsyncContextManager[Operator]:
        return self._app.operator(settings, redis)

    def resolve(self, settings: Settings | None) -> Settings:
        return self._app.resolve(settings)

    def entered(self, settings: Settings, redis: Any) -> AbstractAsyncContextManager[Any]:
        return self._app.entered(settings, redis)

    async def site(
        self, stack: AsyncExitStack, settings: Settings, redis: Any, database: Any, worker_id: str
    ) -> WorkerResources:
        return await self._app.site(stack, settings, redis, database, worker_id)
