"""The listings."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from typing_extensions import TypeVar

from streamworker.broker import PendingEntry, StoredJob
from streamworker.cron.stored import ScheduleRow, schedule_rows
from streamworker.views.fleet import Look
from streamworker.views.listing import BUDGET, DEAD, DELAYED, PENDING, JobListing, Selection
from streamworker.views.rows import dead_row, delayed_row
from streamworker.web.forms import query
from streamworker.web.render import monitor_of, render, schedules_of

T = TypeVar("T")

RUNNING: int = 200
"""Jobs that are shown of one worker at most."""


def pending_token(entry: PendingEntry) -> str:
    """What names a pending job in a form, a `FormRow`; plain ASCII, so that it cannot reorder the page around it."""
    return json.dumps((entry.queue, entry.entry_id, entry.level, entry.worker_id, entry.deliveries))


def stored_token(job: StoredJob) -> str:
    """The same of a delayed job or a dead letter."""
    return json.dumps((job.queue, job.handle, job.level))


def names(look: Look) -> list[str]:
    """The queues there are."""
    return [row.queue for row, _ in look.queues]


async def overview(request: Request) -> Response:
    """Everything at a glance."""
    look = await monitor_of(request).looked()
    return render(request, "overview.html", title="Overview", fleet=look)


async def queue(request: Request) -> Response:
    """One queue."""
    monitor, name = monitor_of(request), query(request).queue() or "default"
    look, operator = await monitor.looked(), await monitor.operator()
    (depth,) = await operator.depth([name])
    note = await operator.paused(name)
    workers = [worker for worker in look.workers if name in worker.queues]
    kinds = sorted(await operator.waiting([name], 300), key=lambda each: -each.count)
    notices = [notice for notice in look.notices if notice.queue == name]
    return render(
        request, "queue.html", title=name, queue=depth, note=note, workers=workers, kinds=kinds, notices=notices,
        rate=look.rates.get(name),
    )  # fmt: skip


async def _listing(
    request: Request, title: str, listing: JobListing[T], row: Callable[[T, Look], tuple[Any, ...]]
) -> Response:
    """A page of jobs in one state; ``row`` makes of a job what the template shows of it."""
    monitor, form = monitor_of(request), query(request)
    look, operator = await monitor.looked(), await monitor.operator()
    selection = form.selection()
    found = await listing.slice(operator, names(look), selection, form.text("after") or "")
    rows = [row(job, look) for job in found.rows]
    lost = [worker for worker in look.workers if not worker.alive and worker.pending and not look.silent]
    return render(
        request, f"{listing.state}.html", title=title, rows=rows, found=found, asked=selection, lease=operator.lease,
        filtered=selection.narrows, queues=names(look), total=look.count(listing.column, selection.queue), lost=lost,
    )  # fmt: skip


async def pending(request: Request) -> Response:
    """Pending jobs."""
    return await _listing(request, "Pending", PENDING, lambda entry, _: (entry, pending_token(entry)))


async def dead(request: Request) -> Response:
    """Dead letters."""

    def row(job: StoredJob, look: Look) -> tuple[Any, ...]:
        return dead_row(job, look.at), job.at_ms / 1000, stored_token(job)

    return await _listing(request, "Dead letters", DEAD, row)


async def groups(request: Request) -> Response:
    """Dead letters that failed alike."""
    monitor, wanted = monitor_of(request), query(request).queue()
    look = await monitor.looked()
    counts = {row.queue: row.dead for row, _ in look.queues if row.dead and wanted in (None, row.queue)}
    whole = True
    if monitor.fleet is not None:
        for name, dead in counts.items():
            whole = await monitor.fleet.groups.update(name, dead, BUDGET) and whole
    found = monitor.fleet.groups.of(list(counts)) if monitor.fleet is not None else []
    return render(
        request, "groups.html", title="Errors", groups=found[:GROUPS], more=len(found) - GROUPS, whole=whole,
        queue=wanted, queues=names(look), read=sum(group.count for group in found), total=sum(counts.values()),
    )  # fmt: skip


async def delayed(request: Request) -> Response:
    """Delayed jobs."""

    def row(job: StoredJob, look: Look) -> tuple[Any, ...]:
        return delayed_row(job, look.at), job.at_ms / 1000, stored_token(job)

    return await _listing(request, "Delayed", DELAYED, row)


async def workers(request: Request) -> Response:
    """Who works, and what one of them runs."""
    monitor, form = monitor_of(request), query(request)
    look, operator = await monitor.looked(), await monitor.operator()
    chosen = form.text("worker")
    running, more = [], False
    if chosen is not None:
        selection = Selection(worker=chosen)
        homes = next((worker.queues for worker in look.workers if worker.worker_id == chosen), names(look))
        found = await PENDING.slice(operator, homes, selection, "", RUNNING, BUDGET / 2)
        running, more = found.rows[:RUNNING], found.after is not None
    return render(
        request, "workers.html", title="Workers", workers=look.workers, chosen=chosen, running=running, more=more
    )


GROUPS: Final = 200
"""Groups of dead letters that are shown at most."""
SCHEDULES: Final = 500
"""Schedules that are shown at most."""


async def cron(request: Request) -> Response:
    """What is enqueued by the calendar."""
    operator, more = await monitor_of(request).operator(), False
    rows: list[ScheduleRow] = []
    wanted = (query(request).text("search") or "").casefold()
    async for row in schedule_rows(operator, await schedules_of(request)):
        if wanted and not any(wanted in word.casefold() for word in (row.name, row.kind, row.queue)):
            continue
        if len(rows) == SCHEDULES:
            more = True
            break
        rows.append(row)
    return render(request, "cron.html", title="Schedules", rows=rows, more=more, search=wanted)


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


async def points(request: Request) -> Response:
    """The points of a queue, or of all: [at, ready, running, delayed, dead, rate, oldest] each."""
    monitor = monitor_of(request)
    await monitor.looked()
    past = monitor.past(query(request).queue() or "")
    return Response(msgspec.json.encode(past), media_type="application/json")
