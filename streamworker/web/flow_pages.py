"""Pages of flows: the ledger's, filtered; and the graph of one."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from streamworker.encryption import hidden
from streamworker.errors import StreamworkerError, UsageError
from streamworker.job import FlowRecord, NodeRecord
from streamworker.postgres import Archive
from streamworker.redact import printable, redact
from streamworker.views.flows import FlowBox, flow_row, layers, took
from streamworker.web.forms import query
from streamworker.web.render import monitor_of, render

SIZE: Final = 50
"""Flows of a page."""
COUNTED: Final = 1_000
"""Nodes that are counted of each flow of a page."""
DRAWN: Final = 1_000
"""Nodes of a graph."""
EDGES: Final = 20_000
"""Edges of a graph; one with more is drawn without them."""
LIGHT: Final = 60
"""Boxes of a graph above which they are small, and lines are faint until a node is pointed at."""
TROUBLED: Final = 50
"""Failed nodes that are listed."""
STATUSES: Final = ("running", "completed", "failed", "cancelled")


async def flows(request: Request) -> Response:
    """The ledger's flows, newest first; with an id or a key, the graph of that one."""
    form, monitor = query(request), monitor_of(request)
    wanted, status, name = form.text("id"), form.text("status"), form.text("name")
    if status is not None and status not in STATUSES:
        raise UsageError(f"there is no status {printable(status)}")
    archive, trouble = None, ""
    try:
        archive = await monitor.archive()
    except StreamworkerError as error:
        trouble = str(error)
    if archive is not None and wanted is not None:
        return await _flow(request, archive, wanted)
    after = _after(form.text("after"))
    found: list[FlowRecord] = []
    if archive is not None:
        found = await archive.flows.flows(status=status, name=name, after=after, limit=SIZE + 1, most=COUNTED)
    await monitor.looked()
    rows = [flow_row(flow, monitor.now()) for flow in found[:SIZE]]
    return render(
        request, "flows.html", title="Flows", durable=archive is not None, ledger_trouble=trouble, rows=rows,
        statuses=STATUSES, chosen=status, name=name, counted=COUNTED,
        after=f"{found[SIZE - 1].created_at.isoformat()}|{found[SIZE - 1].id}" if len(found) > SIZE else None,
    )  # fmt: skip


async def _flow(request: Request, archive: Archive, wanted: str) -> Response:
    found = await archive.flows.find(wanted)
    if found is None:
        return render(request, "flow.html", title=printable(wanted), flow=None, wanted=wanted)
    nodes = await archive.flows.nodes(found.id, limit=DRAWN, edges=DRAWN, all_edges=EDGES)
    monitor = monitor_of(request)
    await monitor.looked()
    now = monitor.now()
    graph = layers(nodes)
    jobs = sum(node.job_id is not None for node in nodes)
    troubled = [node for node in nodes if node.state in ("failed", "held") and node.job_id is not None]
    troubled.sort(key=lambda node: node.started_at is None)  # those that ran first: the others failed for their sake
    return render(
        request, "flow.html", title=f"{found.name} {found.key or found.id}", flow=flow_row(found, now), graph=graph,
        light=sum(map(len, graph)) > LIGHT, drawn=jobs, edges=any(node.after for node in nodes),
        conditions={how for layer in graph for box in layer for _, how in box.after},
        lines=lambda box: " ".join(f"{each}:{how}" for each, how in box.after),
        duration=lambda node: took(node, now), span=lambda box: _span(box, now),
        troubled=troubled[:TROUBLED], more=max(0, len(troubled) - TROUBLED), error=_error,
    )  # fmt: skip


def _span(box: FlowBox, now: float) -> tuple[float, float] | None:
    """The shortest and the longest time that nodes of a box took."""
    times = [seconds for node in box.nodes if (seconds := took(node, now)) is not None]
    return (min(times), max(times)) if times else None


def _error(node: NodeRecord) -> str:
    lines: list[str] = redact(hidden(node.error or "")).strip().splitlines()
    return lines[-1][:300] if lines else ""


def _after(text: str | None) -> tuple[datetime, str] | None:
    if text is None:
        return None
    moment, separator, flow = text.partition("|")
    try:
        at = datetime.fromisoformat(moment)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None or not separator:
        raise UsageError("no page begins there: begin at the first one")
    return at, flow
