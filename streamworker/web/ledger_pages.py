"""Jobs as the ledger remembers them: searched, and one with all its attempts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from streamworker.codec import FIRST_MOMENT, LAST_MOMENT
from streamworker.errors import StreamworkerError, UsageError
from streamworker.postgres import Archive, JobRecord, Status, Wanted
from streamworker.telemetry.logs import get_logger
from streamworker.views import printable
from streamworker.views.rows import attempt_row, job_row
from streamworker.web.forms import Form, query
from streamworker.web.job_pages import LARGEST, places, spelled
from streamworker.web.pages import names
from streamworker.web.render import access_of, client, monitor_of, render, who

log = get_logger("streamworker.web")

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
    values |= {"asked": asked, "rows": [job_row(job) for job in rows], "after": after}
    return render(request, "jobs.html", title="Jobs", queues=names(look), statuses=get_args(Status), **values)


async def _one(request: Request, archive: Archive | None, wanted: str, queue: str | None) -> dict[str, Any]:
    job = await archive.find(wanted, queue) if archive is not None else None
    attempts = await archive.attempts(job.queue, wanted) if archive is not None and job is not None else []
    found, whole = await places(request, wanted)
    return {
        "job": job_row(job) if job is not None else None,
        "attempts": [attempt_row(attempt) for attempt in attempts],
        "found": found,
        "whole": whole,
        "any": any(found.values()),
    }


async def remembered(request: Request) -> Response:
    """What the ledger remembers of a job that may be private. The log says who looked."""
    if not access_of(request).payloads:
        raise UsageError("payloads are shown only where a password is asked for, or on this machine")
    archive, form = await monitor_of(request).archive(), query(request)
    wanted = form.must("id")
    job = await archive.find(wanted, form.queue()) if archive is not None else None
    if job is None:
        raise UsageError("the ledger knows no such job")
    log.info("dashboard_payload_shown", who=who(request), place="ledger", job_id=wanted, client=client(request))
    text = job.document.decode(errors="backslashreplace") if job.document is not None else _readable(job)
    return render(
        request, "payload.html", title="Payload", text=spelled(text[:LARGEST]), cut=max(0, len(text) - LARGEST)
    )


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
