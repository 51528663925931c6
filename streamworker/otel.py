"""Traces with OpenTelemetry (``pip install 'streamworker[otel]'``): ``App(observers=[Tracing()])``.

Follows the messaging conventions, https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/ :

- **send** (PRODUCER), one a call of ``enqueue``, ``enqueue_many`` or ``enqueue_blocking``. Its context goes into the
  headers of every job that brings none of its own, as ``traceparent``; one the user put there is kept, and linked.
- **create** (PRODUCER), one a job of a flow of up to 1,000 jobs, within the *send* span of `App.start`. It links to the
  *create* spans of the jobs right before it, and its context goes into the headers of its job.
- **process** (CONSUMER), one a run of a handler, current while it runs. It links to the context in the job's headers,
  which is also its parent unless ``parent=False``; so do all retries of the job. In a flow it links to the *create*
  spans of the jobs right before it, too, below which the *process* spans of these are: links lead along the edges.
- **settle** (CLIENT), one a batch, as the worker settles, with a link to each run.

Log lines of a handler, the standard library's too, hold ``trace_id`` and ``span_id``. Spans hold neither payloads nor
results of handlers. The program chooses the SDK, its exporter and the sampling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Token
from importlib.metadata import version
from time import time
from typing import Any, Final

import msgspec
import structlog
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from streamworker.job import Job, Raised, Settled, TimedOut
from streamworker.observe import MOST_LINKS, JobRun, Sender, Settlement

AFTER: Final = "streamworker-after"
"""The header with the contexts of the jobs right before a node of a flow, as ``traceparent`` has them."""
_W3C: Final = TraceContextTextMapPropagator()
SCHEMA: Final = "https://opentelemetry.io/schemas/1.37.0"
_FAILED: Final = frozenset({"raised", "timed_out", "discarded", "undecodable", "abandoned"})


class _Open(msgspec.Struct):
    """A span that has not ended, and the tokens that restore the context around it."""

    span: Span
    task: asyncio.Task[Any] | None
    token: Token[Context]
    logged: Mapping[str, Token[Any]]


class Tracing(Sender):
    """Observer that makes the spans.

    Args:
        tracer_provider: instead of the global one.
        propagator: instead of the global one, which is W3C Trace Context and Baggage unless the program says otherwise.
        parent: the context in a job's headers is the parent of its process spans; otherwise it is only linked, and
            every run is a trace of its own.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        *,
        propagator: TextMapPropagator | None = None,
        parent: bool = True,
    ) -> None:
        self._tracer = trace.get_tracer("streamworker", version("streamworker"), tracer_provider, SCHEMA)
        self._propagator = propagator or propagate.get_global_textmap()
        self._parent = parent
        self._open: dict[JobRun, _Open] = {}
        self._ended: dict[JobRun, SpanContext] = {}

    @contextmanager
    def sending(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """A span around an enqueue; its context goes into the jobs' headers."""
        queues = {job.queue for job in jobs}
        attributes = _attributes("send", queues, len(jobs))
        if len(jobs) == 1:
            attributes["messaging.message.id"] = jobs[0].id
        own = [self._context_in(job.headers) for job in jobs]
        links = [Link(context) for context in own if context.is_valid]
        with self._tracer.start_as_current_span(
            _name("send", queues), kind=SpanKind.PRODUCER, attributes=attributes, links=links
        ) as span:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            stamped = [
                job if context.is_valid else msgspec.structs.replace(job, headers={**(job.headers or {}), **carrier})
                for job, context in zip(jobs, own, strict=True)
            ]
            try:
                yield stamped
            except BaseException as error:
                span.set_attribute("error.type", _type_of(error))
                raise

    @contextmanager
    def sending_flow(self, jobs: Sequence[Job], before: Sequence[Sequence[int]]) -> Iterator[Sequence[Job]]:
        """A span around the start of a flow, and one for each of its jobs, linked along the edges."""
        outer = trace.get_current_span().get_span_context()  # of the node that adds these, if one does
        with self.sending(jobs) as stamped:
            yield stamped if not before else self._created(jobs, before, outer)

    def _created(self, jobs: Sequence[Job], before: Sequence[Sequence[int]], outer: SpanContext) -> list[Job]:
        contexts: dict[int, SpanContext] = {}
        for place in _in_order(before):
            job = jobs[place]
            own = self._context_in(job.headers)
            near = [contexts[each] for each in before[place]] or [outer]
            links = [Link(context) for context in (*near, own) if context.is_valid]
            attributes = {
                **_attributes("create", {job.queue}, 1),
                "messaging.message.id": job.id,
                "streamworker.kind": job.kind or "",
            }
            span = self._tracer.start_span(
                f"create {job.queue}", kind=SpanKind.PRODUCER, attributes=attributes, links=links
            )
            span.end()
            contexts[place] = span.get_span_context()
        return [self._stamped(job, contexts, place, before[place]) for place, job in enumerate(jobs)]

    def _stamped(self, job: Job, contexts: Mapping[int, SpanContext], place: int, before: Sequence[int]) -> Job:
        """A job of a flow with the contexts of its own span, and of those of the jobs right before it."""
        carrier: dict[str, str] = {}
        if not self._context_in(job.headers).is_valid:
            self._propagator.inject(carrier, _around(contexts[place]))
        near: list[str] = []
        for each in before:
            written: dict[str, str] = {}
            _W3C.inject(written, _around(contexts[each]))
            near += written.values()
        if near:
            carrier[AFTER] = ",".join(near)
        return msgspec.structs.replace(job, headers={**(job.headers or {}), **carrier}) if carrier else job

    def on_start(self, run: JobRun) -> None:
        """Begin a process span, and make it current."""
        came_with = self._propagator.extract(_texts(run.headers), context=Context())
        creation = trace.get_current_span(came_with).get_span_context()
        span = self._tracer.start_span(
            f"process {run.queue}",
            context=came_with if self._parent else Context(),
            kind=SpanKind.CONSUMER,
            links=[Link(context) for context in (creation, *_after(run.headers)) if context.is_valid],
            attributes={
                **_attributes("process", {run.queue}, 1),
                "messaging.message.id": run.job_id,
                "messaging.client.id": run.worker_id,
                "streamworker.kind": run.kind,
                "streamworker.level": run.level,
                "streamworker.attempt": run.attempt,
                "streamworker.deliveries": run.deliveries,
            },
        )
        context = span.get_span_context()
        logged: Mapping[str, Token[Any]] = {}
        if context.is_valid:
            run.trace_id = trace.format_trace_id(context.trace_id)
            logged = structlog.contextvars.bind_contextvars(
                trace_id=run.trace_id, span_id=trace.format_span_id(context.span_id)
            )
        token = otel_context.attach(trace.set_span_in_context(span, came_with))
        self._open[run] = _Open(span, asyncio.current_task(), token, logged)

    def on_outcome(self, run: JobRun) -> None:
        """End the process span."""
        opened = self._open.pop(run, None)
        if opened is None:
            return
        # A run that was released while it could not be stopped ends in another task: that of the run keeps its context.
        if opened.task is asyncio.current_task():
            otel_context.detach(opened.token)
            structlog.contextvars.reset_contextvars(**opened.logged)
        span, word = opened.span, run.word
        span.set_attribute("streamworker.outcome", word)
        if word in _FAILED:
            outcome = run.outcome
            if isinstance(outcome, Raised):
                span.record_exception(outcome.error)
                span.set_attribute("error.type", _type_of(outcome.error))
            else:
                span.set_attribute("error.type", "timeout" if isinstance(outcome, TimedOut) else word)
            span.set_status(Status(StatusCode.ERROR, run.error))
        span.end()
        self._ended[run] = span.get_span_context()

    def on_settled(self, settlement: Settlement) -> None:
        """A span over the batch, as long as it took, with a link to each run, or to where its job was sent."""
        runs = [run for run, _ in settlement.items]
        queues = {run.queue for run in runs}
        contexts = [self._ended.get(run) or self._context_in(run.headers) for run in runs]
        for run, result in settlement.items:
            if result is not Settled.REFUSED:  # that one is offered again
                self._ended.pop(run, None)
        attributes = _attributes("settle", queues, len(runs))
        around = Context()
        if len(runs) == 1:
            attributes["messaging.message.id"] = runs[0].job_id
            around = trace.set_span_in_context(trace.NonRecordingSpan(contexts[0]), around)
        span = self._tracer.start_span(
            _name("settle", queues),
            context=around,
            kind=SpanKind.CLIENT,
            links=[Link(context) for context in contexts if context.is_valid],
            attributes=attributes,
            start_time=_ns(settlement.began),
        )
        span.end(_ns(settlement.began + settlement.seconds))

    def _context_in(self, headers: Mapping[str, Any] | None) -> SpanContext:
        extracted = self._propagator.extract(_texts(headers or {}), context=Context())
        return trace.get_current_span(extracted).get_span_context()


def _around(context: SpanContext) -> Context:
    return trace.set_span_in_context(trace.NonRecordingSpan(context), Context())


def _after(headers: Mapping[str, Any]) -> list[SpanContext]:
    """The contexts of the jobs right before a node of a flow."""
    written = headers.get(AFTER)
    if not isinstance(written, str):
        return []
    parts = written.split(",", MOST_LINKS)[:MOST_LINKS]
    found = [_W3C.extract({"traceparent": part}, context=Context()) for part in parts]
    return [trace.get_current_span(each).get_span_context() for each in found]


def _in_order(before: Sequence[Sequence[int]]) -> list[int]:
    """Each place behind those before it."""
    waits = [len(others) for others in before]
    follow: list[list[int]] = [[] for _ in before]
    for place, others in enumerate(before):
        for each in others:
            follow[each].append(place)
    ready = [place for place, count in enumerate(waits) if not count]
    for place in ready:
        for each in follow[place]:
            waits[each] -= 1
            if not waits[each]:
                ready.append(each)
    return ready


def _attributes(operation: str, queues: Iterable[str], count: int) -> dict[str, str | int]:
    names = sorted(queues)
    told: dict[str, str | int] = {
        "messaging.system": "streamworker",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
    if len(names) == 1:
        told["messaging.destination.name"] = names[0]
    if count != 1:
        told["messaging.batch.message_count"] = count
    return told


def _name(operation: str, queues: set[str]) -> str:
    return f"{operation} {next(iter(queues))}" if len(queues) == 1 else operation


def _texts(headers: Mapping[str, Any]) -> dict[str, str]:
    """The headers that are text: propagators read nothing else, and producers may write anything."""
    return {name: value for name, value in headers.items() if isinstance(value, str)}


def _type_of(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _ns(seconds: float) -> int:
    return int(min(seconds, time()) * 1e9)
