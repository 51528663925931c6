"""``streamworker dashboard``: what operators see and do, in a browser."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

from cyclopts import Parameter

from streamworker import web
from streamworker.app import App
from streamworker.cli.app_loader import load_app
from streamworker.cli.options import SERVER, ServerFlags
from streamworker.errors import ConfigurationError
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.cli")


def dashboard(
    *,
    listen: str = web.LISTEN,
    read_only: bool = False,
    origin: Annotated[tuple[str, ...], Parameter(name="--origin")] = (),
    prefix: str = "",
    proxy: Annotated[tuple[str, ...], Parameter(name="--proxy")] = (),
    user_header: str | None = None,
    operator: Annotated[tuple[str, ...], Parameter(name="--operator")] = (),
    server: ServerFlags = SERVER,
) -> int:
    """Serve the dashboard until SIGINT or SIGTERM.

    Without STREAMWORKER_DASHBOARD_USER and STREAMWORKER_DASHBOARD_PASSWORD (or its _FILE form) it listens on this
    machine alone, or is read-only. Whatever is done with it is one line of the log.

    Args:
        listen: host:port; 127.0.0.1:8787 unless given, port 0 takes a free one.
        read_only: Show everything but payloads, change nothing.
        origin: What browsers see as its address, if a proxy changes the Host: https://ops.example.com.
        prefix: The path below which a proxy shows it: /ops. The proxy may pass it on or cut it off.
        proxy: Address or network of a proxy that is believed about the browser's address (X-Forwarded-For).
        user_header: In which that proxy says who asks, such as X-Forwarded-User; instead of a password.
        operator: With --user-header, one who may change something; once per name. All others are viewers.
    """
    web.require()
    settings = server.settings()
    access = web.Access.load(
        read_only=read_only, origins=origin, prefix=prefix, proxies=proxy, user_header=user_header,
        operators=operator,
    )  # fmt: skip
    serving = importlib.import_module("streamworker.web.server")
    code: int = serving.serve(_app(settings), settings, access, listen)
    return code


def _app(settings: Settings) -> App[Any]:
    """The app that is named, which knows kinds and the types of their payloads; a bare one where it cannot be had."""
    if settings.app is not None:
        try:
            return load_app(settings)
        except ConfigurationError as error:
            log.warning("app_not_loaded", error=str(error), hint="payloads are not checked against their types")
    return App(settings=settings)
