"""The listings."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from streamworker.views import BUDGET, Look, Selection, dead_row, dead_slice, delayed_row, delayed_slice, pending_slice
from streamworker.web.forms import query
from streamworker.web.render import monitor_of, render

RUNNING: int = 200
"""Jobs that are shown of one worker at most."""


def token(*parts: Any) -> str:
    """What names a row in a form; plain ASCII, so that nothing in it can reorder the page around it."""
    return json.dumps(parts)


def names(look: Look) -> list[str]:
    """The queues there are."""
    return [row.queue for row, _ in look.queues]


def _page(request: Request, template: str, title: str, **values: Any) -> Response:
    return render(request, template, title=title, **values)


async def overview(request: Request) -> Response:
    """Everything at a glance."""
    look = await monitor_of(request).looked()
    return _page(request, "overview.html", "Overview", fleet=look)


async def queue(request: Request) -> Response:
    """One queue."""
    monitor, name = monitor_of(request), query(request).queue() or "default"
    look, operator = await monitor.looked(), await monitor.operator()
    (depth,) = await operator.depth([name])
    note = await operator.paused(name)
    workers = [worker for worker in look.workers if name in worker.queues]
    kinds = sorted(await operator.waiting([name], 300), key=lambda each: -each.count)
    notices = [notice for notice in look.notices if notice.queue == name]
    return _page(
        request, "queue.html", name, queue=depth, note=note, workers=workers, kinds=kinds, notices=notices,
        rate=look.rates.get(name),
    )  # fmt: skip


async def pending(request: Request) -> Response:
    """Pending jobs."""
    monitor, form = monitor_of(request), query(request)
    look, operator = await monitor.looked(), await monitor.operator()
    selection = form.selection()
    found = await pending_slice(operator, names(look), selection, form.text("after") or "")
    rows = [(row, token(row.queue, row.entry_id, row.level, row.worker_id, row.deliveries)) for row in found.rows]
    total = sum(row.running for row, _ in look.queues if selection.queue in (None, row.queue))
    lost = [worker for worker in look.workers if not worker.alive and worker.pending]
    return _page(
        request, "pending.html", "Pending", rows=rows, found=found, asked=selection, total=total, lost=lost,
        queues=names(look), lease=operator.lease,
    )  # fmt: skip


async def dead(request: Request) -> Response:
    """Dead letters."""
    monitor, form = monitor_of(request), query(request)
    look, operator = await monitor.looked(), await monitor.operator()
    selection = form.selection()
    found = await dead_slice(operator, names(look), selection, form.text("after") or "")
    rows = [(dead_row(job, look.at), token(job.queue, job.handle, job.level)) for job in found.rows]
    total = sum(row.dead for row, _ in look.queues if selection.queue in (None, row.queue))
    return _page(
        request, "dead.html", "Dead letters", rows=rows, found=found, asked=selection, total=total, queues=names(look),
        filtered=selection.narrows,
    )  # fmt: skip


async def delayed(request: Request) -> Response:
    """Delayed jobs."""
    monitor, form = monitor_of(request), query(request)
    look, operator = await monitor.looked(), await monitor.operator()
    selection = form.selection()
    found = await delayed_slice(operator, names(look), selection, form.text("after") or "")
    rows = [
        (delayed_row(job, look.at), job.at_ms / 1000, token(job.queue, job.handle, job.level)) for job in found.rows
    ]
    total = sum(row.delayed for row, _ in look.queues if selection.queue in (None, row.queue))
    return _page(
        request, "delayed.html", "Delayed", rows=rows, found=found, asked=selection, total=total, queues=names(look)
    )


async def workers(request: Request) -> Response:
    """Who works, and what one of them runs."""
    monitor, form = monitor_of(request), query(request)
    look, operator = await monitor.looked(), await monitor.operator()
    chosen = form.text("worker")
    running, more = [], False
    if chosen is not None:
        selection = Selection(worker=chosen)
        homes = next((worker.queues for worker in look.workers if worker.worker_id == chosen), names(look))
        found = await pending_slice(operator, homes, selection, "", RUNNING, BUDGET / 2)
        running, more = found.rows[:RUNNING], found.after is not None
    return _page(request, "workers.html", "Workers", workers=look.workers, chosen=chosen, running=running, more=more)


MOST: Final = 200
"""Browsers that may watch at once."""


async def events(request: Request) -> Response:
    """Server-sent events: ``look`` for each look at the fleet."""
    monitor = monitor_of(request)
    if monitor.watchers >= MOST:
        return PlainTextResponse("Too many watch already.\n", 503)
    await monitor.operator()

    async def stream() -> AsyncIterator[bytes]:
        async for told in monitor.events():
            yield b"event: look\ndata: " + msgspec.json.encode(monitor.told()) + b"\n\n" if told else b": here\n\n"

    # Proxies must not gather what is meant for now.
    return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


async def history(request: Request) -> Response:
    """The points of a queue, or of all: [at, ready, running, delayed, dead, rate, oldest] each."""
    monitor = monitor_of(request)
    await monitor.looked()
    points = monitor.past(query(request).queue() or "")
    return Response(msgspec.json.encode(points), media_type="application/json")
