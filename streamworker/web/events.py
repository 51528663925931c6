"""Server-sent events: the output of a job, as browsers follow it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import StreamingResponse

from streamworker.app import App
from streamworker.errors import StreamworkerError, UsageError
from streamworker.redact import clean_block
from streamworker.results import OutputItem
from streamworker.settings import Settings
from streamworker.views.job_log import log_text

HEARTBEAT: Final = 15.0
"""Seconds after which a silent stream says that it is there: proxies cut what they take for dead."""


def output_events(app: App[Any], request: Request, job_id: str, *, queue: str | None = None) -> StreamingResponse:
    """The response of a route that gives a job's output as server-sent events, to the end of the job.

    Each chunk is an event ``output``: its id is the position, its data JSON with ``attempt``, ``chunk``, ``restart``
    and ``missed`` (and ``"encoding": "base64"`` for bytes). A browser that lost the connection goes on where it was, by
    the header ``Last-Event-ID``; a client may also begin with ``?after=POSITION``. The last event is ``end``: close the
    ``EventSource`` then, or it connects again. Who may read which job is for the route to decide.

    Args:
        app: open (``async with app``) on this event loop.
        request: of a Starlette or FastAPI application.
        job_id: as ``enqueue`` returned it.
        queue: where the job is, see `App.output`.

    Raises:
        UsageError: ``Last-Event-ID`` or ``after`` is no position.
    """
    told = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not (told.isascii() and told.isdigit() and len(told) <= 16):
        raise UsageError("Last-Event-ID and after have to be a position: the id of an event")
    # Proxies must not gather what is meant for now.
    headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
    stream = _events(app.output(job_id, after=int(told), queue=queue))
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


async def shown_events(
    app: App[Any], settings: Settings, request: Request, job_id: str, *, queue: str | None = None
) -> AsyncIterator[bytes]:
    """A job's output as the dashboard shows it: as `output_events`, each chunk as clean text; ``trouble`` says why not.

    Args:
        app: opened here, until the stream ends.
        settings: where its server is.
        request: its header ``Last-Event-ID`` says where to go on.
        job_id: the job's id.
        queue: where the job is.
    """
    after = _last_event(request)

    async def texts() -> AsyncGenerator[OutputItem, None]:
        async with app.entered(settings, None), aclosing(app.output(job_id, after=after, queue=queue)) as items:
            async for item in items:
                yield msgspec.structs.replace(item, chunk=_shown(item.chunk))

    async for event in _or_trouble(texts()):
        yield event


async def shown_log(
    app: App[Any], settings: Settings, request: Request, job_id: str, *, queue: str | None = None
) -> AsyncIterator[bytes]:
    """A job's log as the dashboard shows it, to the end of the job: events as of `shown_events`, a line each.

    Args:
        app: opened here, until the stream ends.
        settings: where its server is.
        request: its header ``Last-Event-ID`` says how many lines the browser has.
        job_id: the job's id.
        queue: where the job is.
    """
    after = _last_event(request)

    async def texts() -> AsyncGenerator[OutputItem, None]:
        number, run = 0, None
        async with (
            app.entered(settings, None),
            aclosing(app.job_log(job_id, queue=queue, follow=True)) as lines,
        ):
            async for line in lines:
                head = "" if line.run == run else f"{line.heading}\n"
                number, run = number + 1, line.run
                if number > after:
                    yield OutputItem(number, 1, line.attempt, head + log_text(line))

    async for event in _or_trouble(texts()):
        yield event


def _last_event(request: Request) -> int:
    told = request.headers.get("last-event-id", "0")
    return int(told) if told.isascii() and told.isdigit() and len(told) <= 16 else 0


async def _or_trouble(items: AsyncGenerator[OutputItem, None]) -> AsyncIterator[bytes]:
    try:
        async for event in _events(items):
            yield event
    except StreamworkerError as error:
        yield b"event: trouble\ndata: %b\n\n" % msgspec.json.encode({"message": str(error)})


def _shown(chunk: Any) -> str:
    if isinstance(chunk, bytes):
        chunk = chunk.decode(errors="backslashreplace")
    if isinstance(chunk, str):
        return clean_block(chunk)
    return clean_block(msgspec.json.encode(chunk).decode()) + "\n"


async def _events(items: AsyncGenerator[OutputItem, None]) -> AsyncIterator[bytes]:
    awaited = asyncio.ensure_future(anext(items, None))
    try:
        while True:
            done, _ = await asyncio.wait({awaited}, timeout=HEARTBEAT)
            if not done:
                yield b": here\n\n"
                continue
            item = awaited.result()
            if item is None:
                yield b"event: end\ndata: {}\n\n"
                return
            yield _event(item)
            awaited = asyncio.ensure_future(anext(items, None))
    finally:
        with anyio.CancelScope(shield=True):
            awaited.cancel()
            await asyncio.wait({awaited})
            await items.aclose()


def _event(item: OutputItem) -> bytes:
    told: dict[str, Any] = {
        "attempt": item.attempt,
        "chunk": item.chunk,
        "restart": item.restart,
        "missed": item.missed,
    }
    if isinstance(item.chunk, bytes):
        told |= {"chunk": base64.b64encode(item.chunk).decode(), "encoding": "base64"}
    return b"id: %d\nevent: output\ndata: %b\n\n" % (item.position, msgspec.json.encode(told))
