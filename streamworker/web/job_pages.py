"""Pages of one job, in Redis and in the ledger: everything about it; and the ledger's jobs, searched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, Final, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from streamworker.broker import Operator, PendingEntry
from streamworker.codec import FIRST_MOMENT, LAST_MOMENT
from streamworker.errors import StreamworkerError, UsageError
from streamworker.postgres import Archive, JobRecord, Status, Wanted
from streamworker.redact import printable
from streamworker.telemetry.logs import get_logger
from streamworker.views.listing import BUDGET, DEAD, DELAYED, PENDING, JobListing, Selection
from streamworker.views.rows import attempt_row, dead_row, document_facts, job_row, step_row
from streamworker.web.events import shown_events, shown_log
from streamworker.web.forms import Form, query
from streamworker.web.pages import names, pending_token, stored_token
from streamworker.web.render import access_of, client, is_operator, monitor_of, render, who

log = get_logger("streamworker.web")

LARGEST: Final = 200_000
"""Characters of a document that are shown."""


async def show(request: Request) -> Response:
    """One pending or delayed job, or one dead letter."""
    form = query(request)
    place, row, body, row_token = await _find(request, form)
    job_id = row.job_id
    values: dict[str, Any] = {
        "place": place,
        "row": dead_row(row, monitor_of(request).now()) if place == "dead" else row,
        "facts": _facts(body),
        "token": row_token,
        "handle": form.must("id"),
        "since": None if place == "pending" else row.at_ms / 1000,
        "extra": row.details.get("entry", "") if place == "dead" else "",
    }
    title = job_id or form.must("id")
    return render(request, "show.html", title=printable(title), **values)


async def payload(request: Request) -> Response:
    """The document of one job. The log says who looked."""
    _require_payloads(request)
    place, row, body, _ = await _find(request, query(request))
    return _payload(request, _indented(body), place=place, queue=row.queue, job_id=row.job_id)


async def output(request: Request) -> Response:
    """The output of one job as it comes, as server-sent events. The log says who looked."""
    return _followed(request, "dashboard_output_shown", shown_events)


async def log_(request: Request) -> Response:
    """What the handler of one job logs, as it comes. The log says who looked."""
    return _followed(request, "dashboard_job_log_shown", shown_log)


def _followed(request: Request, event: str, shown: Callable[..., AsyncIterator[bytes]]) -> Response:
    _require_payloads(request)
    form, state = query(request), request.app.state
    wanted, queue = form.must("id"), form.queue()
    log.info(event, who=who(request), client=client(request), queue=queue, job_id=wanted)
    events = shown(state.app, state.settings, request, wanted, queue=queue)
    return StreamingResponse(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _require_payloads(request: Request) -> None:
    if not is_operator(request):
        raise UsageError("payloads are shown to operators alone")
    if not access_of(request).payloads:
        raise UsageError("payloads are shown only where a password is asked for, or on this machine")


def _payload(request: Request, text: str, **job: Any) -> Response:
    """A document, everything spelled out that could reorder or hide its lines; the log says who looked at which."""
    log.info("dashboard_payload_shown", who=who(request), client=client(request), **job)
    shown = "\n".join(printable(line) for line in text[:LARGEST].split("\n"))
    return render(request, "payload.html", title="Payload", text=shown, cut=max(0, len(text) - LARGEST))


async def _places(request: Request, wanted: str) -> tuple[dict[str, list[Any]], bool]:
    """(the places of a job id on the server: (row, queue, handle) by place; whether all was looked at)."""
    monitor = monitor_of(request)
    look, operator = await monitor.looked(), await monitor.operator()
    selection, there, whole = Selection(ids=frozenset({wanted})), names(look), True
    found: dict[str, list[Any]] = {}
    listings: tuple[JobListing[Any], ...] = (PENDING, DELAYED, DEAD)
    for listing in listings:
        piece = await listing.slice(operator, there, selection, "", 20, BUDGET / 3)
        found[listing.state] = [
            (row, row.queue, getattr(row, "entry_id", "") or getattr(row, "handle", "")) for row in piece.rows
        ]
        whole = whole and piece.after is None
    return found, whole


async def _find(request: Request, form: Form) -> tuple[str, Any, bytes | None, str]:
    """(place, row, document, token) of what an address names."""
    operator = await monitor_of(request).operator()
    place, queue, handle = form.must("place"), form.queue(), form.must("id")
    if queue is None:
        raise UsageError("queue is missing")
    row: Any = None
    if place == "pending":
        row = await pending_row(operator, queue, handle)
        if row is not None:
            return place, row, await operator.body(row), pending_token(row)
    elif place == "dead":
        page = await operator.dead(queue, only=handle) if handle.replace("-", "").isdigit() else None
        row = page.rows[0] if page is not None and page.rows else None
    elif place == "delayed":
        row = await operator.delayed_job(queue, handle)
    if row is None:
        raise UsageError(f"{printable(handle)} is not {place} in {queue} any more: it ran, moved on, or was deleted")
    return place, row, row.body, stored_token(row)


async def pending_row(operator: Operator, queue: str, entry_id: str) -> PendingEntry | None:
    """A pending entry by its id, wherever in the queue."""
    if len(entry_id) > 200:
        return None
    after: str | None = ""
    while after is not None:
        page = await operator.pending(queue, after, only=entry_id)
        if page.rows:
            return page.rows[0]
        after = page.after
    return None


_LABELS: Final = {
    "bytes": "size",
    "attempt_count": "failed attempts",
    "max_attempts": "attempts allowed",
    "run_at": "not before",
    "expires_at": "expires",
}


def _facts(body: bytes | None) -> dict[str, Any]:
    if body is None:
        return {"document": "there is none"}
    facts = document_facts(body) | {"bytes": f"{len(body):,} bytes"}
    return {_LABELS.get(name, name): value for name, value in facts.items()}


def _indented(body: bytes | None) -> str:
    if body is None:
        return ""
    try:
        return msgspec.json.format(body, indent=2).decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="backslashreplace")


FIRST: Final = datetime.fromtimestamp(FIRST_MOMENT, UTC)
LAST: Final = datetime.fromtimestamp(LAST_MOMENT, UTC)
"""The ledger's times are between them."""
SIZE: Final = 100
"""Rows of a page."""


async def jobs(request: Request) -> Response:
    """The ledger's jobs, newest first; with an id, all that is known of it."""
    form = query(request)
    wanted = form.text("id")
    archive, trouble = None, ""
    try:
        archive = await monitor_of(request).archive()
    except StreamworkerError as error:
        trouble = str(error)
    values: dict[str, Any] = {"durable": archive is not None, "ledger_trouble": trouble}
    asked = _asked(form) if wanted is None else Wanted(queue=form.queue(), ids=frozenset({wanted}))
    rows, after = await _page(archive, asked) if archive is not None else ([], None)
    if wanted is not None and len(rows) < 2:  # more: several queues have a job with this id
        queue = rows[0].queue if rows else asked.queue
        values |= await _one(request, archive, wanted, queue)
        return render(request, "job.html", title=printable(wanted), wanted=wanted, queue=queue, **values)
    look = await monitor_of(request).looked()
    values |= {"asked": asked, "rows": [job_row(job, monitor_of(request).now()) for job in rows], "after": after}
    return render(request, "jobs.html", title="Jobs", queues=names(look), statuses=get_args(Status), **values)


async def _one(request: Request, archive: Archive | None, wanted: str, queue: str | None) -> dict[str, Any]:
    job = await archive.find(wanted, queue) if archive is not None else None
    attempts = await archive.attempts(job.queue, wanted) if archive is not None and job is not None else []
    steps = await archive.steps(job.queue, wanted) if archive is not None and job is not None else []
    flow = await archive.flows.of_job(job.queue, wanted) if archive is not None and job is not None else None
    found, whole = await _places(request, wanted)
    places = [where for rows in found.values() for _, where, _ in rows]
    return {
        "job": job_row(job, monitor_of(request).now()) if job is not None else None,
        "where": job.queue if job is not None else queue or next(iter(places), None),
        "attempts": [attempt_row(attempt) for attempt in attempts],
        "steps": [step_row(step) for step in steps],
        "flow": flow,
        "found": found,
        "whole": whole,
        "any": any(found.values()),
    }


async def remembered(request: Request) -> Response:
    """What the ledger remembers of a job that may be private. The log says who looked."""
    _require_payloads(request)
    archive, form = await monitor_of(request).archive(), query(request)
    wanted = form.must("id")
    job = await archive.find(wanted, form.queue()) if archive is not None else None
    if job is None:
        raise UsageError("the ledger knows no such job")
    text = job.document.decode(errors="backslashreplace") if job.document is not None else _readable(job)
    return _payload(request, text, place="ledger", job_id=wanted)


def _readable(job: JobRecord) -> str:
    parts = {"payload": job.payload, "headers": job.headers, "result": job.result}
    return msgspec.json.format(msgspec.json.encode({k: v for k, v in parts.items() if v is not None})).decode()


async def _page(archive: Archive, asked: Wanted) -> tuple[list[JobRecord], str | None]:
    rows: list[JobRecord] = []
    async for job in archive.jobs(asked):
        if len(rows) == SIZE:
            return rows, f"{rows[-1].created_at.isoformat()}|{rows[-1].queue}|{rows[-1].id}"
        rows.append(job)
    return rows, None


def _asked(form: Form) -> Wanted:
    status = form.text("status")
    statuses: tuple[Status, ...] = tuple(each for each in get_args(Status) if each == status)
    if status is not None and not statuses:
        raise UsageError(f"there is no status {printable(status)}")
    return Wanted(queue=form.queue(), kind=form.text("kind"), statuses=statuses, after=_after(form.text("after")))


def _after(text: str | None) -> tuple[datetime, str, str] | None:
    if text is None:
        return None
    moment, _, rest = text.partition("|")
    queue, separator, job_id = rest.partition("|")
    try:
        at = datetime.fromisoformat(moment)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None or not FIRST <= at <= LAST or not separator:
        raise UsageError("no page begins there: begin at the first one")
    return at, job_id, queue
