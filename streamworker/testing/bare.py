"""Handlers without any server: called bare with a context, or through everything a worker does around them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from time import monotonic, time
from typing import Any, Final, overload

import anyio
import msgspec
from typing_extensions import TypeVar

from streamworker import codec
from streamworker.app import App
from streamworker.context import Context, Shared
from streamworker.errors import UsageError
from streamworker.execution import EXPIRED, Execution
from streamworker.handlers import Payload
from streamworker.job import Claim, Job, Outcome, Postponed, TimedOut
from streamworker.policy import Limits
from streamworker.producer import make_job
from streamworker.settings import Settings
from streamworker.worker.batching import BatchExecution
from streamworker.worker.executor import Executor
from streamworker.worker.tasks import Completion, JobTasks

S = TypeVar("S", default=Any)

WORKER_ID: Final = "worker-test"
_THREAD_GRACE: Final = 1.0
"""Seconds a thread may overrun its timeout before `run` stops waiting for it."""


@overload
def context(
    job: Payload | Job,
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
) -> Context[Any]: ...
@overload
def context(
    job: Payload | Job,
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
) -> Context[S]: ...
def context(
    job: Payload | Job,
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

    Raises:
        UsageError: ``attempt`` or ``delivery`` is below 1.
        InvalidJob: the payload cannot be written as JSON.
    """
    shared = Shared(WORKER_ID, services, redis, database, stopping=stopping)
    claim = _claim(job, attempt, delivery)
    made = Context(shared, claim, codec.read(claim.body or b""), Limits(max_attempts=max_attempts, timeout=timeout))
    if timeout is not None:
        made.deadline_at = monotonic() + timeout
    if cancelled:
        made.cancel(TimedOut.__name__)
    return made


async def run(
    app: App[Any],
    job: Payload | Job,
    /,
    *,
    services: Any = None,
    attempt: int = 1,
    delivery: int = 1,
    redis: Any = None,
    database: Any = None,
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

    Raises:
        UsageError: ``attempt`` or ``delivery`` is below 1.
        InvalidJob: the payload cannot be written as JSON.
    """
    claim = _claim(job, attempt, delivery)
    async with AsyncExitStack() as stack:
        if services is None and app.lifespan is not None:
            services = await stack.enter_async_context(app.lifespan())
        shared = Shared(WORKER_ID, services, redis, database)
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


def _claim(job: Payload | Job, attempt: int, delivery: int) -> Claim:
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
