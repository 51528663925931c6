"""What belongs to the application, not to a request, as requests reach it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse

from streamworker.web.access import Access
from streamworker.web.render import Rendering
from streamworker.web.room import Room


def room_of(request: Request) -> Room:
    """What is known between requests."""
    room: Room = request.app.state.room
    return room


def access_of(request: Request) -> Access:
    """Who may do what."""
    access: Access = request.app.state.access
    return access


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page, or only its changing part if a script on that page asks for it."""
    rendering: Rendering = request.app.state.rendering
    room, access = room_of(request), access_of(request)
    common = {
        "writable": not access.read_only,
        "payloads": access.payloads,
        "look": room.look,
        "trouble": room.trouble,
        "counts": room.counts(),
    }
    return rendering.page(request, template, status, **{**common, **values})


def who(request: Request) -> str:
    """Who asks."""
    return str(request.scope["state"]["who"])


def client(request: Request) -> str:
    """From which address."""
    return request.client.host if request.client is not None else "?"
