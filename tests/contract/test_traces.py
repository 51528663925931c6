"""Spans of jobs, as OpenTelemetry's SDK collects them, in both modes."""

from __future__ import annotations

import json
import logging

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from streamworker import App, Backoff, Context, Payload, Settings, Snooze
from streamworker.otel import Tracing
from streamworker.telemetry import logs
from streamworker.testing import drain

pytestmark = pytest.mark.mode_free

OWN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Step(Payload, kind="step", queue="steps"):
    what: str = "ok"


class Block(Payload, kind="block", queue="blocks"):
    """For a handler that runs in a thread."""


class Rig:
    def __init__(self, redis_url: str, mode: str, **options: bool) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")
        self.current: list[int] = []
        settings = Settings(redis_url=redis_url, mode=mode, lease=1)  # type: ignore[arg-type]
        self.app: App[None] = App(settings=settings, observers=[Tracing(provider, **options)])

        @self.app.handler(max_attempts=2, timeout=0.2, backoff=Backoff(base=0, jitter=0))
        async def step(payload: Step, ctx: Context[None]) -> None:
            self.current.append(trace.get_current_span().get_span_context().span_id)
            ctx.log.info("from_handler")
            logging.getLogger("library").warning("from library")
            if payload.what == "fail":
                raise ValueError("no such invoice")
            if payload.what == "snooze":
                raise Snooze(3600)
            if payload.what == "more":
                await self.app.enqueue(Step())

        @self.app.handler
        def block(payload: Block) -> None:
            self.current.append(trace.get_current_span().get_span_context().span_id)
            with self.tracer.start_as_current_span("inside"):
                self.app.enqueue_blocking(Step())

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


def ids(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def links(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


@pytest.fixture
def rig(ground, redis_url):
    return Rig(redis_url, ground.mode)


async def test_a_job_is_one_trace_from_the_request_to_its_settlement(rig):
    async with rig.app:
        with rig.tracer.start_as_current_span("GET /") as request:
            job = await rig.app.enqueue(Step())
        await drain(rig.app)
    (send,), (process,), (settle,) = (rig.spans(f"{word} steps") for word in ("send", "process", "settle"))
    assert send.parent is not None
    assert send.parent.span_id == request.get_span_context().span_id
    assert (send.kind, process.kind, settle.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.CLIENT)
    assert process.parent is not None
    assert (process.parent.trace_id, process.parent.span_id) == ids(send)
    assert links(process) == [ids(send)]
    assert settle.parent is not None
    assert settle.parent.span_id == ids(process)[1]
    assert links(settle) == [ids(process)]
    assert rig.current == [ids(process)[1]]
    assert len({ids(span)[0] for span in rig.exporter.get_finished_spans()}) == 1
    common = {"messaging.system": "streamworker", "messaging.destination.name": "steps", "messaging.message.id": job.id}
    for span, word in ((send, "send"), (process, "process"), (settle, "settle")):
        told = dict(span.attributes or {})
        expected = common | {"messaging.operation.name": word, "messaging.operation.type": word}
        assert told.items() >= expected.items()
        assert "messaging.batch.message_count" not in told
        assert "error.type" not in told
        assert span.status.status_code is StatusCode.UNSET
    assert dict(process.attributes or {}).items() >= {
        "streamworker.kind": "step", "streamworker.attempt": 1, "streamworker.outcome": "ok",
        "streamworker.level": "normal", "streamworker.deliveries": 1,
    }.items()  # fmt: skip
    assert settle.start_time is not None
    assert settle.end_time is not None
    assert process.end_time is not None
    assert settle.start_time <= settle.end_time


async def test_a_failure_is_recorded_and_its_retry_belongs_to_the_same_sender(rig):
    async with rig.app:
        await rig.app.enqueue(Step(what="fail"))
        await drain(rig.app, delayed=True)
    (send,), processes = rig.spans("send steps"), rig.spans("process steps")
    assert [dict(span.attributes or {})["streamworker.attempt"] for span in processes] == [1, 2]
    for span in processes:
        assert links(span) == [ids(send)]
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "ValueError: no such invoice"
        assert dict(span.attributes or {})["error.type"] == "ValueError"
        (event,) = span.events
        assert dict(event.attributes or {})["exception.message"] == "no such invoice"


async def test_a_snooze_is_no_error(rig):
    async with rig.app:
        await rig.app.enqueue(Step(what="snooze"))
        await drain(rig.app)
    (span,) = rig.spans("process steps")
    assert (span.status.status_code, dict(span.attributes or {})["streamworker.outcome"]) == (
        StatusCode.UNSET,
        "snoozed",
    )
    assert span.events == ()


async def test_batches_are_one_span_with_a_link_to_each(rig):
    async with rig.app:
        await rig.app.enqueue_many([Step() for _ in range(20)])
        await drain(rig.app)
    (send,) = rig.spans("send steps")
    assert dict(send.attributes or {})["messaging.batch.message_count"] == 20
    assert "messaging.message.id" not in dict(send.attributes or {})
    processes, settles = rig.spans("process steps"), rig.spans("settle steps")
    assert [links(span) for span in processes] == [[ids(send)]] * 20
    assert sorted(link for span in settles for link in links(span)) == sorted(ids(span) for span in processes)
    counts = [dict(span.attributes or {}).get("messaging.batch.message_count", 1) for span in settles]
    assert sum(counts) == 20


async def test_a_context_of_the_users_own_is_kept_and_linked(rig, ground):
    async with rig.app:
        await rig.app.enqueue(Step(), headers={"traceparent": OWN})
        await rig.app.enqueue(Step(), headers={"traceparent": "no context", "tenant": "t1"})
        ground.push(json.dumps({"payload": {}, "kind": "step", "headers": {"traceparent": OWN, "n": 5}}), queue="steps")
        ground.push(json.dumps({"payload": {}, "kind": "step", "headers": {"traceparent": 17}}), queue="steps")
        await drain(rig.app)
    own = (int(OWN.split("-")[1], 16), int(OWN.split("-")[2], 16))
    first, second = rig.spans("send steps")
    assert links(first) == [own]
    assert links(second) == []
    found = sorted(links(span) for span in rig.spans("process steps"))
    assert found == sorted([[own], [own], [], [ids(second)]])


async def test_what_a_handler_sends_belongs_to_its_span_also_from_a_thread(rig):
    async with rig.app:
        await rig.app.enqueue(Step(what="more"))
        await rig.app.enqueue(Block())
        await drain(rig.app)
    (process,) = rig.spans("process blocks")
    (inside,) = rig.spans("inside")
    assert inside.parent is not None
    assert inside.parent.span_id == ids(process)[1]
    parents = {span.parent.span_id for span in rig.spans("send steps") if span.parent is not None}
    assert ids(inside)[1] in parents
    assert parents & {ids(span)[1] for span in rig.spans("process steps")}


async def test_without_parents_every_run_is_a_trace_of_its_own(ground, redis_url):
    rig = Rig(redis_url, ground.mode, parent=False)
    async with rig.app:
        await rig.app.enqueue(Step())
        await drain(rig.app)
    (send,), (process,) = rig.spans("send steps"), rig.spans("process steps")
    assert process.parent is None
    assert ids(process)[0] != ids(send)[0]
    assert links(process) == [ids(send)]


@pytest.mark.parametrize("form", ["json", "console"])
async def test_log_lines_hold_the_trace(rig, form, capsys):
    logs.configure("info", form)
    async with rig.app:
        job = await rig.app.enqueue(Step(what="fail"))
        await drain(rig.app, delayed=True)
    text = capsys.readouterr().err
    processes = rig.spans("process steps")
    traced, spans = f"{ids(processes[0])[0]:032x}", [f"{ids(span)[1]:016x}" for span in processes]
    if form == "console":
        said = [
            line
            for line in text.splitlines()
            if any(word in line for word in ("from_handler", "from library", "job_retry", "job_dead"))
        ]
        assert len(said) >= 6
        assert all(traced in line for line in said)
        return
    lines = [json.loads(line) for line in text.splitlines()]
    by_event = {
        event: [line for line in lines if line["event"] == event] for event in {line["event"] for line in lines}
    }
    assert [line["span_id"] for line in by_event["from_handler"]] == spans
    assert [line["span_id"] for line in by_event["from library"]] == spans
    for event, attempt in (("from_handler", 1), ("job_retry", 1), ("job_dead", 2)):
        line = by_event[event][0]
        assert line["trace_id"] == traced
        expected = {"job_id": job.id, "kind": "step", "queue": "steps", "attempt": attempt}
        assert line.items() >= expected.items()
        assert line["worker_id"].startswith("worker-")
    assert "trace_id" not in by_event["worker_stopped"][0]
