"""Spans of a flow, as OpenTelemetry's SDK collects them: linked along the edges."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from streamworker import App, Backoff, Context, Flow, Payload, chain, group
from streamworker.observe import MOST_LINKS
from streamworker.otel import Tracing
from tests.conftest import eventually
from tests.postgres.test_flows import flow_status, started
from tests.postgres.working import settings_for, working

OWN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Step(Payload, kind="step", queue="q"):
    n: int = 0
    more: int = 0


def ids(span: Any) -> tuple[int, int]:
    context = span if not isinstance(span, ReadableSpan) else span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def links(span: ReadableSpan) -> set[tuple[int, int]]:
    return {ids(link.context) for link in span.links}


class Rig:
    def __init__(self, redis_url: str, database_url: str, mode: str, **options: bool) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.app = App(
            settings=settings_for(redis_url, database_url, relay="on", mode=mode),
            observers=[Tracing(provider, **options)],
        )
        self.failed: set[int] = set()

        @self.app.handler(max_attempts=3, backoff=Backoff(base=0.01, jitter=0))
        async def step(payload: Step, ctx: Context) -> None:
            if payload.n == 2 and not self.failed:
                self.failed.add(2)
                raise ValueError("again")
            if payload.more:
                async with ctx.transaction() as pg:
                    await self.app.start(group(Step(n=70), Step(n=71), name="more"), connection=pg, inside=ctx)

    def of(self, word: str, job_id: str) -> list[ReadableSpan]:
        return [
            span
            for span in self.exporter.get_finished_spans()
            if span.name == f"{word} q" and (span.attributes or {}).get("messaging.message.id") == job_id
        ]


@pytest.mark.parametrize("parent", [True, False])
@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_spans_of_nodes_are_linked_along_the_edges(redis_url, database_url, pg, mode, parent):
    rig = Rig(redis_url, database_url, mode, parent=parent)
    flow = Flow("order")
    charge = flow.add(Step(n=1))
    pack, label = flow.add(Step(n=2), after=charge), flow.add(Step(n=3), after=charge)
    both = group(Step(n=4), Step(n=5), name="both")
    inner = flow.add(both, after=[pack, label])
    last = flow.add(Step(n=6, more=1), after=inner)
    four, five = both.nodes
    before = {charge: [], pack: [charge], label: [charge], four: [pack, label], five: [pack, label], last: [four, five]}
    async with working(rig.app), rig.app:
        flow_id = await started(pg, flow, rig.app)
        await eventually(lambda: ended(pg, flow_id), timeout=30)
    for node, others in before.items():
        (create,) = rig.of("create", node.id)
        assert links(create) == {ids(rig.of("create", each.id)[0]) for each in others}
        runs = rig.of("process", node.id)
        assert len(runs) == (2 if node is pack else 1)  # each run of a node has them
        for run in runs:
            assert links(run) == {ids(create)} | links(create)
            assert (run.parent is not None and ids(run.parent) == ids(create)) == parent
    added = await pg.fetch("select job_id from streamworker.flow_nodes where name like '%more/step%'")
    (host,) = rig.of("process", last.id)
    for (job_id,) in added:  # what a running node adds comes after its run
        (create,) = rig.of("create", job_id)
        assert links(create) == {ids(host)}
        (run,) = rig.of("process", job_id)
        assert ids(create) in links(run)
    assert len(added) == 2


async def ended(pg: Any, flow_id: str) -> bool:
    return await flow_status(pg, flow_id) == "completed"


async def test_a_context_of_the_users_is_kept_and_links_have_a_bound(redis_url, database_url, pg):
    rig = Rig(redis_url, database_url, "stream")
    many = [Step(n=n) for n in range(10, 60)]
    own = rig.app.job(Step(n=8), headers={"traceparent": OWN})
    flow = chain(own, group(*many), Step(n=9))
    async with working(rig.app), rig.app:
        flow_id = await started(pg, flow, rig.app)
        await eventually(lambda: ended(pg, flow_id), timeout=30)
    (run,) = rig.of("process", own.id)
    assert run.parent is not None
    assert f"{run.parent.span_id:016x}" in OWN
    (create,) = rig.of("create", own.id)
    assert {f"{span:016x}" for _, span in links(create)} == {"b7ad6b7169203331"}
    (last,) = rig.of("process", flow.nodes[-1].id)
    assert len(last.links) == 1 + MOST_LINKS
    # Too many jobs for links: as before, one span for all of them.
    large = group(*(Step(n=n) for n in range(1001)), name="large")
    rig.exporter.clear()
    await started(pg, large, rig.app)
    assert [span.name for span in rig.exporter.get_finished_spans()] == ["send q"]
