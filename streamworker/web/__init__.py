"""The dashboard: what operators see and do, in a browser. Needs the extra ``web``.

`dashboard` makes an ASGI application to mount into one's own; ``streamworker dashboard`` serves it.
"""

from __future__ import annotations

import importlib
from typing import Any

from streamworker.app import App
from streamworker.errors import ConfigurationError
from streamworker.settings import Settings
from streamworker.web.security import Access

__all__ = ["Access", "dashboard", "require"]

LISTEN = "127.0.0.1:8787"
"""Where ``streamworker dashboard`` listens unless told otherwise."""
MISSING = "The dashboard needs the extra web, which is not installed here: pip install 'streamworker[web]'"


def dashboard(app: App[Any], *, settings: Settings | None = None, access: Access | None = None) -> Any:
    """Make the ASGI application, to be served as it is or mounted anywhere in another one.

    It opens its connections with the first request; ``await it.aclose()`` closes them.

    Args:
        app: whose server it shows.
        settings: instead of those of the app.
        access: who may see and do what; by default STREAMWORKER_DASHBOARD_USER and _PASSWORD, without which it
            answers requests to localhost alone. ``Access(outer=True)`` leaves it to the application around it.

    Raises:
        ConfigurationError: the extra is missing, or user and password make no sense.
    """
    require()
    site = importlib.import_module("streamworker.web.site")
    return site.Site(app, app.resolve(settings), access or Access.load())


def require() -> None:
    """Check that the extra is installed.

    Raises:
        ConfigurationError: it is not.
    """
    for name in ("starlette", "jinja2", "uvicorn"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigurationError(MISSING) from error
