"""The dashboard's ASGI application: routes, live events and access control."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from streamworker.app import App
from streamworker.errors import StreamworkerError, UsageError
from streamworker.settings import EMBEDDED, Settings
from streamworker.web import actions, flow_pages, history_page, job_pages, pages
from streamworker.web.monitor import FleetMonitor
from streamworker.web.render import PageTemplates, render
from streamworker.web.security import Access, Guard

STATIC = Path(__file__).parent / "static"


class _Assets(StaticFiles):
    """Files that pages load: kept by browsers for as long as they are asked for by their present version."""

    def __init__(self, version: str) -> None:
        super().__init__(directory=STATIC)
        self._version = version.encode()

    def file_response(self, *args: Any, **options: Any) -> Response:
        """The file, or that it has not changed."""
        response = super().file_response(*args, **options)
        scope: Scope = options["scope"] if "scope" in options else args[2]
        current = scope["query_string"] == self._version
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if current else "no-cache"
        return response


class Site:
    """An ASGI application. Opens its connections with the first request, and closes them with its lifespan.

    Args:
        app: whose server it shows.
        settings: where that is.
        access: who may see and do what.
    """

    def __init__(self, app: App[Any], settings: Settings, access: Access) -> None:
        self.read_only = access.read_only
        durable = settings.ledger != "off" and (settings.database_url or settings.redis_url == EMBEDDED)
        self.monitor = FleetMonitor(
            lambda: app.operator(settings), (lambda: app.archive(settings)) if durable else None
        )
        rendering = PageTemplates()
        routes = [
            Route("/", pages.overview, name="overview"),
            Route("/queue", pages.queue, name="queue"),
            Route("/pending", pages.pending, name="pending"),
            Route("/dead", pages.dead, name="dead"),
            Route("/groups", pages.groups, name="groups"),
            Route("/delayed", pages.delayed, name="delayed"),
            Route("/workers", pages.workers, name="workers"),
            Route("/cron", pages.cron, name="cron"),
            Route("/jobs", job_pages.jobs, name="jobs"),
            Route("/flows", flow_pages.flows, name="flows"),
            Route("/remembered", job_pages.remembered, name="remembered"),
            Route("/show", job_pages.show, name="show"),
            Route("/payload", job_pages.payload, name="payload"),
            Route("/output", job_pages.output, name="output"),
            Route("/log", job_pages.log_, name="log"),
            Route("/events", pages.events, name="events"),
            Route("/points", pages.points, name="points"),
            Route("/history", history_page.history, name="history"),
            Route("/do/{what}", actions.do, name="do", methods=["POST"]),
            Mount("/static", _Assets(rendering.version), name="static"),
        ]
        handlers: Any = {StreamworkerError: _trouble, 404: _nothing}
        site = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        site.state.monitor, site.state.access, site.state.rendering = self.monitor, access, rendering
        site.state.app, site.state.settings = app, settings
        site.state.history = history_page.LookCache()
        self._guarded = Guard(site, access)
        self._site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] == "lifespan":
            await self._site(scope, receive, send)
        else:
            await self._guarded(scope, receive, send)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.monitor.aclose()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await self.aclose()


async def _trouble(request: Request, error: Exception) -> Response:
    """One sentence that says what to do next."""
    status = 400 if isinstance(error, UsageError) else 503 if getattr(error, "exit_code", 1) == 69 else 500
    if request.method == "POST":
        return JSONResponse({"ok": False, "message": str(error)}, status)
    return render(request, "error.html", status, title="Trouble", sentence=str(error))


async def _nothing(request: Request, _: Exception) -> Response:
    if request.method == "POST":
        return JSONResponse({"ok": False, "message": "There is no such thing to do."}, 404)
    return render(request, "error.html", 404, title="Nothing here", sentence="There is no such page.")
