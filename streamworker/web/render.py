"""Templates, and how numbers, times and foreign text look in them."""

from __future__ import annotations

import hashlib
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from streamworker.broker import Operator
from streamworker.cron.stored import Schedules
from streamworker.operators import JobChanger
from streamworker.redact import printable
from streamworker.views.history import duration, percent
from streamworker.views.rows import age, moment, size
from streamworker.web.monitor import FleetMonitor
from streamworker.web.security import Access

HERE = Path(__file__).parent


@cache
def _environment() -> jinja2.Environment:
    """The templates of this process, each compiled when it is used first."""
    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "age": age, "ago": _ago, "count": _count, "due": _due, "duration": duration, "percent": percent,
        "shown": _shown, "size": size, "took": _took, "when": _when,
    }  # fmt: skip
    return environment


class PageTemplates:
    """The templates. Everything that is put into them is escaped."""

    def __init__(self) -> None:
        digest = hashlib.sha256()
        for path in sorted((HERE / "static").iterdir()):
            digest.update(path.read_bytes())
        self.version = digest.hexdigest()[:10]
        """Changes with the files that pages load, and stands in the addresses of those."""

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page, or only its changing part if a script on that page asks for it."""
        scope = request.scope
        root = scope.get("state", {}).get("root", "").rstrip("/")
        part = request.headers.get("hx-request") == "true"

        def link(path: str, **query: Any) -> str:
            kept = {name: value for name, value in query.items() if value not in (None, "")}
            return f"{root}{path}" + (f"?{urlencode(kept)}" if kept else "")

        common = {
            "layout": "part.html" if part else "base.html",
            "link": link,
            "asset": lambda name: f"{root}/static/{name}?{self.version}",
            "here": request.url.path.removeprefix(root) or "/",
            "this": link(request.url.path.removeprefix(root) or "/", **dict(request.query_params)),
            "csrf": scope.get("state", {}).get("csrf", ""),
            "who": scope.get("state", {}).get("who", ""),
            "counts": {},
        }
        text = _environment().get_template(template).render({**common, **values})
        return HTMLResponse(text, status, {"vary": "HX-Request"})


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _shown(text: object) -> Markup:
    """Foreign text: what could reorder or hide the text around it is spelled out, then it is escaped."""
    return escape(printable(str(text)))


@jinja2.pass_context
def _ago(context: jinja2.runtime.Context, at: float) -> Markup:
    """A moment in epoch seconds, as long ago by the server's clock; when exactly, on hover."""
    return _time(at, f"{age(max(0.0, context['now'] - at))} ago")


@jinja2.pass_context
def _due(context: jinja2.runtime.Context, at: float) -> Markup:
    """A moment in epoch seconds, as soon by the server's clock; when exactly, on hover."""
    wait = at - context["now"]
    return _time(at, f"in {age(wait)}" if wait >= 0 else f"{age(-wait)} overdue")


def _took(seconds: float | None) -> str:
    """How long a run took: short ones to the millisecond."""
    return "" if seconds is None else f"{seconds * 1000:,.0f} ms" if seconds < 10 else age(seconds)


@jinja2.pass_context
def _when(context: jinja2.runtime.Context, moment_: str) -> Markup:
    """A moment in ISO 8601, as long ago or as soon."""
    at = datetime.fromisoformat(moment_).timestamp()
    return _ago(context, at) if at <= context["now"] else _due(context, at)


def _time(at: float, words: str) -> Markup:
    exact = moment(at * 1000)
    return Markup('<time datetime="{0}" title="{0}">{1}</time>').format(exact, words)


def monitor_of(request: Request) -> FleetMonitor:
    """What is known between requests."""
    monitor: FleetMonitor = request.app.state.monitor
    return monitor


def access_of(request: Request) -> Access:
    """Who may do what."""
    access: Access = request.app.state.access
    return access


def changer_of(request: Request, operator: Operator) -> JobChanger:
    """Changes jobs that wait, checked by the types of the app's handlers."""
    state = request.app.state
    made: JobChanger = state.app.changer(operator, state.settings)
    return made


async def schedules_of(request: Request) -> Schedules:
    """The schedules, in code and as data.

    Raises:
        StreamworkerError: the server does not answer.
    """
    state = request.app.state
    made: Schedules = state.app.schedules_of(await monitor_of(request).operator(), state.settings)
    return made


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page, or only its changing part if a script on that page asks for it."""
    rendering: PageTemplates = request.app.state.rendering
    monitor, access = monitor_of(request), access_of(request)
    common = {
        "writable": not access.read_only and is_operator(request),
        "payloads": access.payloads and is_operator(request),
        "look": monitor.look,
        "trouble": monitor.alert,
        "now": monitor.now(),
        "silent": monitor.look is not None and monitor.look.silent,
        "counts": monitor.counts(),
    }
    return rendering.page(request, template, status, **{**common, **values})


def is_operator(request: Request) -> bool:
    """Whether who asks may change something, and see payloads."""
    return str(request.scope["state"]["role"]) == "operator"


def who(request: Request) -> str:
    """Who asks."""
    return str(request.scope["state"]["who"])


def client(request: Request) -> str:
    """From which address."""
    return request.client.host if request.client is not None else "?"
