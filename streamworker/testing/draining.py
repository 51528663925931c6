"""Handlers on a real server: a worker that ends when nothing is left to do."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from time import time
from typing import Any

import anyio
import msgspec

from streamworker.app import App
from streamworker.broker import Operator
from streamworker.cron import Schedule
from streamworker.errors import ConfigurationError, HandlerSignal, Snooze, StreamworkerError
from streamworker.handlers import Handlers
from streamworker.job import Ok
from streamworker.observe import JobRun, Observer
from streamworker.relay import Outbox
from streamworker.settings import Settings
from streamworker.views import Selection, chosen_delayed
from streamworker.worker import QueueWorker
from streamworker.worker.executor import Middleware
from streamworker.worker.host import WorkerResources


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
            place = _Watched(app)
            while True:
                ready = await _hasten(operator, queues, everything=delayed)
                if delayed and outbox is not None:
                    ready += await outbox.run_now(queues)
                due, later = (0, 0) if outbox is None else await outbox.queued(queues)
                depths = await operator.depth(queues)
                if not ready and not due and not any(depth.ready for depth in depths):
                    later += sum(depth.delayed for depth in depths)
                    return place.drained(later, sum(depth.dead for depth in depths))
                await QueueWorker(place, redis=None, database=None, services=services).run(burst=True)
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


async def _hasten(operator: Operator, queues: list[str], *, everything: bool) -> int:
    """Move delayed jobs to their streams, those that are due or all of them; returns how many."""
    now = time() * 1000
    found = [
        job
        for queue in queues
        async for job in chosen_delayed(operator, Selection(queue=queue))
        if job.body is not None and (everything or job.at_ms <= now)
    ]
    moved = 0
    for job in found:
        moved += await operator.run_now(job)
    return moved


class _Counting(Observer):
    """Counts what handlers came to."""

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
            if run.exception is not None and not isinstance(run.exception, HandlerSignal | asyncio.CancelledError):
                self.errors.append(run.exception)


class _Watched:
    """An app whose runs are counted; its lifespan is entered by `drain` and not by each worker."""

    def __init__(self, app: App[Any]) -> None:
        self._app = app
        self._counts = _Counting()

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
    def schedules(self) -> list[Schedule]:
        return []  # what is there is drained; the calendar goes on elsewhere

    @property
    def observers(self) -> tuple[Observer, ...]:
        return (self._counts, *self._app.observers)

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
