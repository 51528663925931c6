"""Pages of one job: everything about it, and the places that hold its id."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from streamworker import codec
from streamworker.broker import Operator, PendingEntry, StoredJob
from streamworker.errors import InvalidJob, UsageError
from streamworker.telemetry.logs import get_logger
from streamworker.views import BUDGET, Selection, dead_row, dead_slice, delayed_slice, pending_slice, printable
from streamworker.web.forms import Form, query
from streamworker.web.pages import names, token
from streamworker.web.render import access_of, client, monitor_of, render, who

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
        "row": dead_row(row, time.time()) if place == "dead" else row,
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
    if not access_of(request).payloads:
        raise UsageError("payloads are shown only where a password is asked for, or on this machine")
    form = query(request)
    place, row, body, _ = await _find(request, form)
    log.info(
        "dashboard_payload_shown", who=who(request), place=place, queue=row.queue, job_id=row.job_id,
        client=client(request),
    )  # fmt: skip
    return render(request, "payload.html", title="Payload", **_document(body))


async def places(request: Request, wanted: str) -> tuple[dict[str, list[Any]], bool]:
    """(the places of a job id on the server: (row, queue, handle) by place; whether all was looked at)."""
    monitor = monitor_of(request)
    look, operator = await monitor.looked(), await monitor.operator()
    selection, there, whole = Selection(ids=frozenset({wanted})), names(look), True
    found: dict[str, list[Any]] = {}
    for place, slicing in (("pending", pending_slice), ("delayed", delayed_slice), ("dead", dead_slice)):
        piece: Any = await slicing(operator, there, selection, "", 20, BUDGET / 3)
        found[place] = [
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
            parts = (queue, row.entry_id, row.level, row.worker_id, row.deliveries)
            return place, row, await operator.body(row), token(*parts)
    elif place == "dead":
        page = await operator.dead(queue, only=handle) if handle.replace("-", "").isdigit() else None
        row = page.rows[0] if page is not None and page.rows else None
    elif place == "delayed":
        row = await delayed_job(operator, queue, handle)
    if row is None:
        raise UsageError(f"{printable(handle)} is not {place} in {queue} any more: it ran, moved on, or was deleted")
    return place, row, row.body, token(queue, row.handle, row.level)


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


async def delayed_job(operator: Operator, queue: str, handle: str) -> StoredJob | None:
    """A delayed job by its handle."""
    return await operator.delayed_job(queue, handle)


def _facts(body: bytes | None) -> dict[str, Any]:
    """What the document says besides its payload and headers."""
    if body is None:
        return {"document": "there is none"}
    try:
        read = codec.read(body)
    except InvalidJob as error:
        return {"size": f"{len(body):,} bytes", "unreadable": str(error)}
    return {
        "size": f"{len(body):,} bytes",
        "failed attempts": read.attempt_count or 0,
        "attempts allowed": read.max_attempts,
        "hop": read.hop or 0,
        "not before": None if read.run_at is None else read.run_at.isoformat(),
        "expires": None if read.expires_at is None else read.expires_at.isoformat(),
    }


def spelled(text: str) -> str:
    """Lines of foreign text with everything spelled out that could reorder or hide them."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _document(body: bytes | None) -> dict[str, Any]:
    if body is None:
        return {"text": "", "cut": 0}
    try:
        text = msgspec.json.format(body, indent=2).decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body.decode(errors="backslashreplace")
    return {"text": spelled(text[:LARGEST]), "cut": max(0, len(text) - LARGEST)}
