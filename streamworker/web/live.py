"""What goes to browsers by itself: events for those who watch, and the past for their charts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from streamworker.web.forms import query
from streamworker.web.state import room_of

MOST: Final = 200
"""Browsers that may watch at once."""


async def events(request: Request) -> Response:
    """Server-sent events: ``look`` for each look at the fleet."""
    room = room_of(request)
    if room.watchers >= MOST:
        return PlainTextResponse("Too many watch already.\n", 503)
    await room.operator()

    async def stream() -> AsyncIterator[bytes]:
        async for told in room.events():
            yield b"event: look\ndata: " + msgspec.json.encode(room.told()) + b"\n\n" if told else b": here\n\n"

    # Proxies must not gather what is meant for now.
    return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


async def history(request: Request) -> Response:
    """The points of a queue, or of all: [at, ready, running, delayed, dead, rate, oldest] each."""
    room = room_of(request)
    await room.looked()
    points = room.past(query(request).queue() or "")
    return Response(msgspec.json.encode(points), media_type="application/json")
