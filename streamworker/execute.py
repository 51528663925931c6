"""Claim to Outcome: decode, find the handler, run it under its deadline.

What is decided before user code runs (`prepare`) is synchronous and cheap; `call` is the only place that awaits a
handler. A deadline costs no timer per job: whoever holds the runs looks at ``deadline`` and
calls `Run.cancel`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic, time
from typing import Any, Final, TypeAlias

import anyio
import anyio.to_thread
import msgspec

from streamworker import codec, signals
from streamworker.codec import Reading
from streamworker.context import Context, Shared
from streamworker.errors import InvalidJob
from streamworker.handlers import Handlers, Registration
from streamworker.job import (
    Ok,
    Outcome,
    Postponed,
    Raised,
    Undecodable,
    UnknownKind,
)
from streamworker.policy import SUSPECT_DELIVERIES, Facts, Limits, abandoned, wish_in
from streamworker.redact import describe
from streamworker.run import CANCELLED, Cause, Run

Middleware: TypeAlias = Callable[[Context[Any], Callable[[], Awaitable[Any]]], Awaitable[Any]]
"""``async def mw(ctx, call_next)``: awaits ``call_next()`` once, and returns what that returned."""

OK = Ok()
REWRITE_SLACK: Final = 1024
"""Bytes by which a document that was put back may exceed the limit: our own keys were added to a small enough one."""


class Executor:
    """Runs claims of one worker.

    Args:
        handlers: kind to handler.
        shared: what all contexts of the worker share.
        middleware: wraps every handler, the first outermost.
        threads: handlers of sync functions that may run at once.
        max_deliveries: deliveries after which a job is dead before it runs.
        max_job_bytes: the largest document that is decoded.
        unknown_kind_ttl: seconds an unknown kind may wait for a worker that knows it.
    """

    def __init__(
        self,
        handlers: Handlers[Any],
        shared: Shared[Any],
        *,
        middleware: Sequence[Middleware] = (),
        threads: int = 100,
        max_deliveries: int = 5,
        max_job_bytes: int = 262_144,
        unknown_kind_ttl: float = 86_400.0,
    ) -> None:
        self._handlers = handlers
        self.shared = shared
        self._middleware = tuple(middleware)
        self._threads = threads
        self._limiter: anyio.CapacityLimiter | None = None
        self._pid = os.getpid()
        self._max_deliveries = max_deliveries
        self._max_job_bytes = max_job_bytes
        self._unknown_kind_ttl = unknown_kind_ttl
        self._no_limits = Facts(0, Limits(), unknown_kind_ttl)
        self._facts: dict[str, Facts] = {}  # by kind: hashing a registration would hash all it holds

    def prepare(self, run: Run) -> None:
        """Decode the claim and find its handler; sets ``run.outcome`` if the job does not come to run. Never raises."""
        try:
            self._prepare(run)
        except BaseException as error:  # noqa: BLE001 - payload types run users' code; no document may end the worker
            run.outcome = Undecodable(f"the payload of {run.kind!r} does not fit: {describe(error)}")

    def _prepare(self, run: Run) -> None:
        claim = run.claim
        run.facts = self._no_limits
        try:
            run.reading = reading = self._read(claim.body)
        except InvalidJob as error:
            run.outcome = Undecodable(str(error))
            return
        if claim.cancelled:
            run.outcome = CANCELLED
            run.facts = self._facts_of(reading, self._handlers.handler_of(reading.kind, claim.queue))
            return
        deliveries = run.deliveries
        if deliveries > 1:
            run.suspect = deliveries >= SUSPECT_DELIVERIES
            run.outcome = abandoned(deliveries, self._max_deliveries)
            if run.outcome is not None:
                run.facts = self._facts_of(reading, self._handlers.handler_of(reading.kind, claim.queue))
                return
        registration = self._handlers.handler_of(reading.kind, claim.queue)
        run.facts = self._facts_of(reading, registration)
        if registration is None:
            since = codec.state_of(reading, claim.secret).unknown_since
            run.outcome = UnknownKind(reading.kind or "", since or None)
            return
        run.registration = registration
        run.special = registration.special or run.suspect
        if reading.run_at is not None:
            until = codec.when(reading)
            if until is not None and until > time():
                run.outcome = Postponed(until)
                return
        run.payload = registration.decode(reading.payload)

    async def call(self, run: Run) -> Outcome:
        """Run the handler of a prepared run to its outcome; only the end of the whole worker gets through."""
        # A slot knows its task: asking asyncio, which is Python code before 3.12, is dear for each job.
        registration, task = run.registration, run.task or asyncio.current_task()
        if registration is None or run.facts is None or run.reading is None:
            raise AssertionError("a run must be prepared before it is called")
        limits = run.facts.limits
        run.task = task
        run.started = now = monotonic()
        if limits.timeout is not None:
            run.deadline = now + limits.timeout
        try:
            if registration.is_async and not registration.wants_context and not self._middleware:
                value = await registration.function(run.payload)
            else:
                run.context = context = Context(self.shared, run.claim, run.reading, limits)
                context.deadline_at = run.deadline
                value = await self._in_context(run, registration, context)
            if value is not None and inspect.isawaitable(value):
                value = await value  # a function around an async one: what it returned is the job itself
        except asyncio.CancelledError as error:
            if (run.cause is None or run.outcome is not None) and task is not None and task.cancelling():
                raise  # the slot knows whether the worker is torn down or the handler cancelled itself
            return _uncancelled(task, run.cause) or Raised(error)
        except GeneratorExit as error:
            if asyncio.current_task() is not task:
                raise  # this coroutine is being closed from outside, and must not go on
            return Raised(error)
        except BaseException as error:  # noqa: BLE001 - SystemExit and the like in a handler end the job, not the worker
            return _uncancelled(task, run.cause) or Raised(wish_in(error))
        if run.cause is not None:
            _uncancelled(task, run.cause)
            if run.cause is CANCELLED and run.context is not None and run.context.heeded:
                return CANCELLED  # it looked, and ended early; one that did not has done its work
        return OK if value is None else Ok(value)

    async def _in_context(self, run: Run, registration: Registration, context: Context[Any]) -> Any:
        if self._middleware:
            return await self._wrapped(run, registration, context)
        if registration.is_async:
            return await registration.function(run.payload, context)
        return await self._in_thread(run, context)

    async def _wrapped(self, run: Run, registration: Registration, context: Context[Any]) -> Any:
        async def innermost() -> Any:
            if not registration.is_async:
                return await self._in_thread(run, context)
            return await registration.function(
                *((run.payload, context) if registration.wants_context else (run.payload,))
            )

        call: Callable[[], Awaitable[Any]] = innermost
        for layer in reversed(self._middleware):
            call = _bound(layer, context, call)
        return await call()

    async def _in_thread(self, run: Run, context: Context[Any]) -> Any:
        """A sync handler in a thread; its clock starts there, and nothing can stop it."""
        registration, facts = run.registration, run.facts
        if registration is None or facts is None:
            raise AssertionError("a run must be prepared before it is called")

        def body() -> Outcome:
            if facts.limits.timeout is not None:
                run.deadline = context.deadline_at = monotonic() + facts.limits.timeout
            try:
                arguments = (run.payload, context) if registration.wants_context else (run.payload,)
                outcome: Outcome = Ok(registration.function(*arguments))
            except BaseException as error:  # noqa: BLE001 - a future cannot carry StopIteration, nor the loop SystemExit
                outcome = Raised(error)
            if os.getpid() != self._pid:  # the handler forked, and its child came back, too
                signals.end_child(outcome.error if isinstance(outcome, Raised) else None)
            return outcome

        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(self._threads)
        run.in_thread = True
        run.deadline = context.deadline_at = None
        try:
            outcome = await anyio.to_thread.run_sync(body, limiter=self._limiter, abandon_on_cancel=True)
        finally:
            run.in_thread = False
        if isinstance(outcome, Raised):
            raise outcome.error
        return outcome.value if isinstance(outcome, Ok) else None

    def _read(self, body: bytes | None) -> Reading:
        if body is None:
            raise InvalidJob("the entry has no field 'job'")
        excess = len(body) - self._max_job_bytes
        if excess > 0 and not (excess <= REWRITE_SLACK and codec.read(body).hop):
            raise InvalidJob(f"the document has {len(body)} bytes and {self._max_job_bytes} are allowed")
        return codec.read(body)

    def _facts_of(self, reading: Reading, registration: Registration | None) -> Facts:
        """Shared between jobs wherever a job brings nothing of its own."""
        if registration is not None and not reading.attempt_count and reading.max_attempts is None:
            facts = self._facts.get(registration.kind)
            if facts is None:
                facts = self._facts[registration.kind] = Facts(0, registration.limits, self._unknown_kind_ttl)
            return facts
        limits = registration.limits if registration is not None else self._no_limits.limits
        if reading.max_attempts is not None:
            limits = msgspec.structs.replace(limits, max_attempts=max(1, reading.max_attempts))
        return Facts(reading.attempt_count or 0, limits, self._unknown_kind_ttl)


def _uncancelled(task: asyncio.Task[Any] | None, cause: Cause | None) -> Outcome | None:
    """Take our own cancellations back, so that the task is as good as new for its next job."""
    if cause is not None and task is not None:
        while task.cancelling():
            task.uncancel()
    return cause


def _bound(
    layer: Middleware, context: Context[Any], call: Callable[[], Awaitable[Any]]
) -> Callable[[], Awaitable[Any]]:
    async def bound() -> Any:
        return await layer(context, call)

    return bound
