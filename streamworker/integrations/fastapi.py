"""FastAPI (``pip install 'streamworker[fastapi]'``): the app in its lifespan, jobs in a request's transaction, and the
dashboard behind the user's own authentication. `lifespan` and `guarded` are for any Starlette application.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from inspect import Parameter, Signature, isawaitable
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import Unpack

from streamworker.app import App
from streamworker.job import Enqueued, Job
from streamworker.payload import AnyPayload
from streamworker.producer import JobOptions

Allow: TypeAlias = Callable[[HTTPConnection], Awaitable[bool] | bool]
"""Whether a request may pass; it may raise ``HTTPException`` instead of returning False."""


def lifespan(app: App[Any]) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """The lifespan of an application in which ``app.enqueue`` may be called: ``FastAPI(lifespan=lifespan(app))``.

    One that has a lifespan of its own writes ``async with app:`` there.
    """

    @asynccontextmanager
    async def opened(_: Any) -> AsyncIterator[None]:
        async with app:
            yield

    return opened


class RequestJobs:
    """Enqueues in the transaction of a request; made by the dependency `request_jobs`."""

    def __init__(self, app: App[Any], connection: Any) -> None:
        self._app = app
        self._connection = connection

    async def enqueue(self, payload: AnyPayload | Job, /, **options: Unpack[JobOptions]) -> Enqueued:
        """`App.enqueue` with the request's session as its ``connection``."""
        job = self._app.job(payload, **options) if not isinstance(payload, Job) else payload
        return await self._app.enqueue(job, connection=self._connection)

    def enqueue_blocking(self, payload: AnyPayload | Job, /, **options: Unpack[JobOptions]) -> Enqueued:
        """`App.enqueue_blocking` with the request's session as its ``connection``, for endpoints that are not async."""
        return self._app.enqueue_blocking(payload, connection=self._connection, **options)


def request_jobs(app: App[Any], session: Any) -> Callable[..., RequestJobs]:
    """A dependency that enqueues in the transaction of a request's session.

    ``Jobs = Annotated[RequestJobs, Depends(request_jobs(app, Session), scope="function")]``

    Args:
        app: makes the jobs.
        session: the annotation by which endpoints are given their session, ``Annotated[AsyncSession, Depends(...)]``:
            the same one, so that a request has one session.
    """

    def dependency(session: Any) -> RequestJobs:
        return RequestJobs(app, session)

    parameter = Parameter("session", Parameter.POSITIONAL_OR_KEYWORD, annotation=session)
    dependency.__signature__ = Signature([parameter])  # type: ignore[attr-defined]
    return dependency


def guarded(site: ASGIApp, allow: Allow) -> ASGIApp:
    """An ASGI application behind the user's own authentication.

    ``api.mount("/jobs", guarded(dashboard(app, access=Access(outer=True)), allow))``

    Args:
        site: such as ``streamworker.web.dashboard(app, access=Access(outer=True))``.
        allow: is asked before each request; what it refuses is answered with 403, or as the ``HTTPException`` says.
    """

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await site(scope, receive, send)
            return
        refusal = PlainTextResponse("Forbidden", 403)
        try:
            answer = allow(HTTPConnection(scope))
            allowed = await answer if isawaitable(answer) else answer
        except HTTPException as error:
            allowed, refusal = False, PlainTextResponse(error.detail, error.status_code, error.headers)
        await (site if allowed is True else refusal)(scope, receive, send)

    return application
