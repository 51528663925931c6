"""Executor: claim to outcome. It decodes the document, finds the handler, and calls it.

`prepare` is synchronous and cheap; `call` is the only place that awaits a handler. A deadline costs no timer per job:
`tasks.JobTasks` looks at ``deadline`` ten times a second and calls `Execution.cancel`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from time import monotonic
from typing import Any, Final, Protocol, TypeAlias

import anyio
import anyio.to_thread
import msgspec

from streamworker import codec
from streamworker.codec import DocumentFields, deliveries_of
from streamworker.context import Context, Shared
from streamworker.errors import HandlerSignal, InvalidJob, Parked
from streamworker.execution import CANCELLED, OK, OUT_OF_TURN, Cause, Execution
from streamworker.handlers import Registration
from streamworker.job import (
    UNTIL,
    Cancelled,
    Interrupted,
    Ok,
    Outcome,
    Raised,
    TimedOut,
    Undecodable,
    UnknownKind,
    Unopened,
)
from streamworker.payload import MOST_KEY_BYTES, stored_in
from streamworker.policy import Facts, Limits, abandoned, apart_from, group_sizes, wish_in
from streamworker.redact import describe
from streamworker.telemetry.logs import get_logger
from streamworker.worker import signals
from streamworker.worker.calls import HandlerProcesses, JobThreads
from streamworker.worker.job_task import JOB, AsyncGenerators, JobTask
from streamworker.worker.observers import ObserverDispatch

log = get_logger("streamworker.worker")

Middleware: TypeAlias = Callable[[Context[Any], Callable[[], Awaitable[Any]]], Awaitable[Any]]
"""``async def mw(ctx, call_next)``: awaits ``call_next()`` once, and returns what that returned."""

Ended: TypeAlias = Callable[[Execution, Outcome], None]
"""Called with a run and its outcome."""
WAITED: Final = "for a connection of ctx."
"""Part of the note that connection pools add to a cancellation that ends a wait for a connection."""
LONGEST_DOUBLING: Final = 6
"""A job that others cancel waits for 1 s, then 2 s, and 64 s at most before it runs again."""
NO_STORE: Final = "its payload is in a store, and this worker has none: give it App(store=...), or DATABASE_URL"
REWRITE_SLACK: Final = 1024
"""Bytes by which a document may exceed the limit on a later hop: our own keys were added to it."""


class HandlerLookup(Protocol):
    """Finds handlers: `Handlers` does."""

    def handler_of(self, kind: str | None, queue: str) -> Registration | None:
        """The handler of a kind, or the only one of a queue."""


class Executor:
    """Prepares and calls the jobs of one worker.

    Args:
        handlers: kind to handler.
        shared: what all contexts of the worker share.
        middleware: wraps every handler, the first outermost.
        threads: sync handlers that may run at once.
        max_deliveries: deliveries after which a job is dead before it runs.
        max_job_bytes: the largest document that is decoded.
        unknown_kind_ttl: seconds an unknown kind may wait for a worker that knows it.
        observers: called before each handler, if one has ``on_start``.
        loads: payloads that are in a store are loaded later, by `load`; there is one.
        lenient: kinds whose payloads take a reference to a stored payload for one without their fields.
    """

    def __init__(
        self,
        handlers: HandlerLookup,
        shared: Shared[Any],
        *,
        middleware: Sequence[Middleware] = (),
        threads: int = 100,
        max_deliveries: int = 5,
        max_job_bytes: int = 262_144,
        unknown_kind_ttl: float = 86_400.0,
        observers: ObserverDispatch | None = None,
        loads: bool = False,
        lenient: frozenset[str] = frozenset(),
    ) -> None:
        self._loads = loads
        self._lenient = lenient
        self._handlers = handlers
        self.shared = shared
        self._middleware = tuple(middleware)
        self._threads = threads
        self._limiter: anyio.CapacityLimiter | None = None
        self._pid = os.getpid()
        self._max_deliveries = max_deliveries
        self._apart_from = apart_from(group_sizes(max_deliveries, 1))
        self._max_job_bytes = max_job_bytes
        self._unknown_kind_ttl = unknown_kind_ttl
        self._no_limits = Facts(0, Limits(), unknown_kind_ttl)
        self.generators: Final = AsyncGenerators()
        self.processes: Final = HandlerProcesses()
        self._begun = self.generators.begun
        self._thread_calls = JobThreads.calls
        self._describe: Callable[[BaseException], str] = describe
        self._facts: dict[str, Facts] = {}  # by kind
        self._observers = observers if observers is not None and observers.starts else None

    def prepare(self, run: Execution) -> None:
        """Decode the document and find its handler. Sets ``run.outcome`` if the job does not run. Never raises."""
        claim = run.claim
        run.facts = self._no_limits
        try:
            body = claim.body
            # Nearly all are of an ordinary size.
            reading = codec.read(body) if body is not None and len(body) <= self._max_job_bytes else self._odd(body)
            run.reading = reading
            registration = self._handlers.handler_of(reading.kind, claim.queue)
            if claim.cancelled:
                run.outcome = CANCELLED
            elif (deliveries := deliveries_of(claim, reading)) > 1:
                run.suspect = deliveries >= self._apart_from
                run.outcome = abandoned(deliveries, self._max_deliveries)
            run.facts = self._facts_of(reading, registration)
            if reading.order_key is not None or reading.fair_key is not None:
                _take_lines(run, reading, registration)
            if run.outcome is not None:
                return
            if registration is None:
                since = codec.state_of(reading, claim.secret).unknown_since
                run.outcome = UnknownKind(reading.kind or "", since or None)
                run.special = reading.expires_at is not None
                return
            run.registration = registration
            if reading.run_at is not None or reading.expires_at is not None:
                run.special = True  # only the server knows whether its time has come; `decode` follows then
                return
            if registration.special or reading.unique is not None:
                run.special = True
            if self._lenient and registration.kind in self._lenient and self._refers(run):
                return
            run.payload = registration.decode(reading.payload)
        except BaseException as error:  # noqa: BLE001 - payload types run users' code; no document may end the worker
            if not self._refers(run):
                run.outcome = undecodable(run, error)

    def decode(self, run: Execution) -> None:
        """Decode the payload of a prepared run whose ``run_at`` and ``expires_at`` let it start now. Never raises."""
        registration, reading = run.registration, run.reading
        if registration is None or reading is None:
            raise AssertionError("a run must be prepared before its payload is decoded")
        try:
            if self._lenient and registration.kind in self._lenient and self._refers(run):
                return
            run.payload = registration.decode(reading.payload)
        except BaseException as error:  # noqa: BLE001 - as in `prepare`
            if not self._refers(run):
                run.outcome = undecodable(run, error)

    def _refers(self, run: Execution) -> bool:
        """Whether the payload is in a store: then the run waits until it is loaded, or has its outcome."""
        reading = run.reading
        found = None if reading is None or run.registration is None else stored_in(reading.payload)
        if reading is None or found is None:
            return False
        if self._loads:
            run.payload, run.special = found, True
        else:
            since = codec.state_of(reading, run.claim.secret).unknown_since
            run.outcome = Unopened(NO_STORE, since or None, "no payload store")
        return True

    def load(self, run: Execution, data: bytes | None) -> None:
        """Decode a payload that a store had; ``None``: it has none. Never raises."""
        found, run.payload = run.payload, None
        trouble = "its payload is not in the store any more" if data is None else found.trouble_with(data)
        if data is None or trouble is not None:
            run.outcome = Undecodable(trouble or "", "payload gone" if data is None else "payload changed")
            return
        run.loaded = msgspec.Raw(data)
        try:
            self._decode_loaded(run, run.loaded)
        except BaseException as error:  # noqa: BLE001 - as in `prepare`
            run.outcome = undecodable(run, error)

    def _decode_loaded(self, run: Execution, payload: msgspec.Raw) -> None:
        if run.registration is not None:
            run.payload = run.registration.decode(payload)

    async def call(self, run: Execution, ended: Ended | None = None) -> Outcome:
        """Run the handler of a prepared run to its outcome: all that the task of a job does. Never raises.

        Args:
            run: prepared.
            ended: called last, with the outcome.
        """
        registration = run.registration
        if registration is None or run.facts is None or run.reading is None:
            raise AssertionError("a run must be prepared before it is called")
        JOB.set(run.claim.entry)
        if self._observers is not None:
            self._observers.started(run)
        limits = run.facts.limits
        run.started = now = monotonic()
        if limits.timeout is not None:
            run.deadline = now + limits.timeout
        try:
            if registration.is_async and not registration.wants_context and not self._middleware:
                value = await registration.function(run.payload)
            else:
                value = await self._in_context(run, registration, limits)
            if value is not None and inspect.isawaitable(value):
                value = await value  # a sync function around an async one
            outcome: Outcome = OK if value is None else Ok(value)
        except BaseException as error:  # noqa: BLE001 - SystemExit and the like in a handler end the job, not the worker
            outcome = self._failed(run, error)
            if run.context is not None and run.context.steps is not None:
                _start_anew(run)
        if self._begun:
            await self._close_generators(run)
        if self._thread_calls and not isinstance(outcome, Ok | Cancelled):
            await self._end_threads(run)
        if run.cause is not None and isinstance(outcome, Ok):
            outcome = _returned_after(run.cause, run, outcome)
        if ended is not None:
            ended(run, outcome)
        return outcome

    def _failed(self, run: Execution, error: BaseException) -> Outcome:
        """The outcome of a run whose handler raised."""
        if os.getpid() != self._pid:
            signals.end_child(error)  # of a forked child, which runs no loop: nothing below works there
        running = asyncio._get_running_loop()  # none if this coroutine is closed as the process ends
        current = asyncio.current_task(running) if running is not None else None
        task = run.task or current
        if isinstance(error, GeneratorExit) and (current is None or current is not task):
            raise error  # this coroutine is being closed from outside, and must not go on
        if run.cause is not None:
            _uncancel(task)
            return _explained(run.cause, error)
        by = task.by if isinstance(task, JobTask) else None
        if by is not None and task is not None and task.cancelling() and _came_of_cancelling(error):
            _uncancel(task)
            return _cancelled_by(by, run)
        if isinstance(error, asyncio.CancelledError):
            _uncancel(task)  # the handler cancelled itself, or what it awaited was cancelled
        return Raised(wish_in(error))

    async def _close_generators(self, run: Execution) -> None:
        """Close what the handler left open, in its own task, under its own deadline."""
        for generator in self.generators.take(asyncio.current_task()):
            if generator.ag_running:
                continue  # another task is inside it
            try:
                await generator.aclose()
            except GeneratorExit:
                raise  # this coroutine is being closed from outside
            except BaseException as error:  # noqa: BLE001 - users' code; the handler has ended already
                log.warning("generator_not_closed", handler=run.kind, job_id=run.job_id, error=self._describe(error),
                            generator=generator.__qualname__)  # fmt: skip

    async def _end_threads(self, run: Execution) -> None:
        """Wait for calls that go on in threads: the job may run again, and must not run beside them.

        A thread cannot be stopped. One that overruns the deadline by the grace is stuck, as a sync handler is.
        """
        calls = JobThreads.of(run.claim.entry)
        if not calls:
            return
        loop, task, ended = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()
        run.task, run.in_thread, run.thread = task, True, calls[0].thread
        log.warning("threads_left_behind", handler=run.kind, job_id=run.job_id, threads=len(calls),
                    hint="the job runs again only when they have returned; let them look at ctx.cancelled")  # fmt: skip

        def tell(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

        for call in calls:
            call.future.add_done_callback(tell)
        while run.outcome is None and not all(call.future.done() for call in calls):
            try:
                await ended.wait()
                ended.clear()
            except asyncio.CancelledError:
                _uncancel(task)  # the worker ends: a job that was handed back has its outcome
        run.in_thread = False

    async def _in_context(self, run: Execution, registration: Registration, limits: Limits) -> Any:
        if run.reading is None:
            raise AssertionError("a run must be prepared before it is called")
        run.context = context = Context(self.shared, run.claim, run.reading, limits)
        context.deadline_at = run.deadline
        if run.special:
            run.task = asyncio.current_task()  # `BatchExecution.begin` gives it to the jobs of the batch
            context.take_loaded(getattr(run, "loaded", None))
        if self._middleware:
            return await self._wrapped(run, registration, context)
        if registration.is_async:
            return await registration.function(run.payload, context)
        return await self._beside(run, registration, context)

    async def _wrapped(self, run: Execution, registration: Registration, context: Context[Any]) -> Any:
        async def innermost() -> Any:
            if not registration.is_async:
                return await self._beside(run, registration, context)
            return await registration.function(
                *((run.payload, context) if registration.wants_context else (run.payload,))
            )

        call: Callable[[], Awaitable[Any]] = innermost
        for layer in reversed(self._middleware):
            call = _bound(layer, context, call)
        return await call()

    async def _beside(self, run: Execution, registration: Registration, context: Context[Any]) -> Any:
        """Run a sync handler beside the event loop."""
        if not registration.process:
            return await self._in_thread(run, context)
        run.deadline = context.deadline_at = None

        def begins() -> datetime | None:
            _start_clock(run, context)
            return context.deadline

        return await self.processes.call(registration, run.payload, context, begins)

    async def _in_thread(self, run: Execution, context: Context[Any]) -> Any:
        """Run a sync handler in a thread. Its clock starts there; it cannot be stopped."""
        registration = run.registration
        if registration is None:
            raise AssertionError("a run must be prepared before it is called")
        ended = 0.0

        def body() -> Outcome:
            nonlocal ended
            run.thread = threading.get_ident()
            _start_clock(run, context)
            try:
                arguments = (run.payload, context) if registration.wants_context else (run.payload,)
                outcome: Outcome = Ok(registration.function(*arguments))
            except BaseException as error:  # noqa: BLE001 - a future cannot carry StopIteration, nor the loop SystemExit
                outcome = Raised(error)
            ended = monotonic()
            if os.getpid() != self._pid:  # a forked child
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
        if run.deadline is not None and ended > run.deadline:
            _overran(run, ended)
        return outcome.value if isinstance(outcome, Ok) else None

    def _odd(self, body: bytes | None) -> DocumentFields:
        """Decode a document that is missing, or larger than the limit."""
        if body is None:
            raise InvalidJob("the entry has no field 'job'")
        if len(body) - self._max_job_bytes <= REWRITE_SLACK and (reading := codec.read(body)).hop:
            return reading
        raise InvalidJob(f"the document has {len(body)} bytes and {self._max_job_bytes} are allowed")

    def _facts_of(self, reading: DocumentFields, registration: Registration | None) -> Facts:
        """Shared between jobs wherever a job brings nothing of its own."""
        own = reading.attempt_count or reading.max_attempts is not None or reading.unique is not None
        if registration is not None and not own:
            facts = self._facts.get(registration.kind)
            if facts is None:
                facts = self._facts[registration.kind] = Facts(0, registration.limits, self._unknown_kind_ttl)
            return facts
        limits = registration.limits if registration is not None else self._no_limits.limits
        if reading.max_attempts is not None:
            limits = msgspec.structs.replace(limits, max_attempts=max(1, reading.max_attempts))
        key = reading.key if reading.unique in UNTIL and isinstance(reading.key, str) else ""
        return Facts(reading.attempt_count or 0, limits, self._unknown_kind_ttl, key=key)


def _start_anew(run: Execution) -> None:
    """Forget the failed attempts before a run that made progress, if its handler says so."""
    facts, steps = run.facts, run.context.steps if run.context is not None else None
    if facts is not None and steps is not None and steps.progressed and steps.runs < facts.limits.progress_runs:
        run.facts = msgspec.structs.replace(facts, attempts=0)


def _start_clock(run: Execution, context: Context[Any]) -> None:
    """Set the deadline of a handler that begins now, beside the event loop."""
    if run.facts is not None and run.facts.limits.timeout is not None:
        run.deadline = context.deadline_at = monotonic() + run.facts.limits.timeout


def _take_lines(run: Execution, reading: DocumentFields, registration: Registration | None) -> None:
    """Take over a job's keys. A producer of another language may not have put it into its tenant's line."""
    order, fair = reading.order_key or "", reading.fair_key or ""
    for key in (order, fair):
        if len(key.encode()) > MOST_KEY_BYTES:
            raise InvalidJob(f"the document is no job: a key of its lines has more than {MOST_KEY_BYTES} bytes")
    if order and run.facts is not None:
        halts = registration is not None and registration.payload.__halts__
        run.facts = msgspec.structs.replace(run.facts, order=order, halts=halts)
        run.special = True  # whether it is its turn, only the server knows
    if fair and not reading.hop and run.claim.count == 1 and run.outcome is None:
        run.outcome = OUT_OF_TURN


def undecodable(run: Execution, error: BaseException) -> Undecodable:
    """The outcome of a run whose document or payload cannot be decoded."""
    if isinstance(error, InvalidJob):
        return Undecodable(str(error))
    return Undecodable(f"the payload of {run.kind!r} does not fit: {describe(error)}")


def _returned_after(cause: Cause, run: Execution, outcome: Ok) -> Outcome:
    """The outcome of a handler that returned after it was cancelled: its work is done, unless it ended for that."""
    _uncancel(run.task or asyncio.current_task())
    if isinstance(cause, TimedOut):
        _overran(run, monotonic())
    heeded = cause is CANCELLED and run.context is not None and run.context.heeded
    return CANCELLED if heeded else outcome


def _overran(run: Execution, ended: float) -> None:
    """Log that a handler returned after its timeout: the job counts as done."""
    timeout = run.facts.limits.timeout if run.facts is not None else None
    if timeout is None or run.deadline is None:
        return
    log.warning(
        "handler_overran",
        handler=run.registration.name if run.registration is not None else run.kind,
        job_id=run.job_id,
        timeout=timeout,
        duration=round(ended - run.deadline + timeout, 3),
        hint="the job counts as completed; let the handler look at ctx.cancelled, or raise its timeout",
    )


def _uncancel(task: asyncio.Task[Any] | None) -> None:
    """Take cancellations back, so that they do not cut off the clean-up after the handler."""
    while task is not None and task.cancelling():
        task.uncancel()


def _explained(cause: Cause, error: BaseException) -> Cause:
    """The cause; a timeout with what the handler waited for, if a connection pool noted that on the cancellation."""
    if not isinstance(cause, TimedOut):
        return cause
    return TimedOut(cause.after, next((note for note in getattr(error, "__notes__", ()) if WAITED in note), ""))


def _came_of_cancelling(error: BaseException) -> bool:
    """Whether an error is a cancellation, or was raised while one was handled."""
    seen: set[int] = set()
    while id(error) not in seen:
        if isinstance(error, asyncio.CancelledError):
            return True
        if isinstance(error, HandlerSignal | Parked):
            return False  # the handler's own wish counts
        seen.add(id(error))
        error = error.__cause__ or error.__context__ or error
    return False


def _cancelled_by(by: str, run: Execution) -> Interrupted:
    """The outcome of a job that other code cancelled: released uncharged, later each time, so that it does not spin."""
    hop = run.reading.hop or 0 if run.reading is not None else 0
    wait = 2.0 ** min(hop, LONGEST_DOUBLING)
    log.warning(
        "job_cancelled_by_others",
        handler=run.registration.name if run.registration is not None else run.kind,
        job_id=run.job_id,
        by=by,
        hint="code outside of the job cancelled its task: the job is given back uncharged",
    )
    return Interrupted(f"cancelled by {by}", wait)


def _bound(
    layer: Middleware, context: Context[Any], call: Callable[[], Awaitable[Any]]
) -> Callable[[], Awaitable[Any]]:
    async def bound() -> Any:
        return await layer(context, call)

    return bound
