"""The reference of the documentation, made from the code while the site is built, so that it cannot drift.

Each page is a function that returns Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tools.reference import api, cli, keys, metrics, schema, scripts, settings, wire

PAGES: Final[dict[str, Callable[[], str]]] = {
    "reference/settings.md": settings.page,
    "reference/cli.md": cli.page,
    "reference/api.md": api.page,
    "reference/testing.md": api.testing_page,
    "reference/wire.md": wire.page,
    "reference/keys.md": keys.page,
    "reference/metrics.md": metrics.page,
    "reference/scripts.md": scripts.page,
    "reference/schema.md": schema.page,
}
"""The site's names of the pages, and what makes them."""
