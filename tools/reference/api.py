"""The Python API: the public names, by their docstrings (mkdocstrings reads them while the site is built)."""

from __future__ import annotations

from importlib import import_module
from typing import Final

import streamworker

# What the house itself calls on an App; nothing of it is pinned.
_OURS: Final = ("site", "entered", "resolve", "handler_of", "registrations", "handlers")
_FILTERS: Final = ", ".join(f'"!^{name}$"' for name in _OURS)
_PLAIN: Final = f'    options:\n      filters: ["!^_", {_FILTERS}]\n'
# For type checkers the module is a stub without it.
_TESTING: Final[dict[str, str]] = vars(import_module("streamworker.testing"))["_HOMES"]
_FIRST: Final = ("App", "Handlers", "Payload", "Context", "Backoff", "Retry", "Snooze", "Discard")


def page() -> str:
    """Everything that ``from streamworker import …`` gives."""
    names = [*_FIRST, *(name for name in streamworker.__all__ if name not in _FIRST)]
    parts = [
        "# Python API\n\nWhat `from streamworker import …` gives. Everything else is not public and may change at any time.\n"
    ]
    parts += [f"## {name}\n\n{_directive(name)}" for name in names]
    parts.append("## Observers\n\n::: streamworker.observe\n    options:\n      show_root_heading: false\n")
    parts.append(
        "## Errors\n\n::: streamworker.errors\n    options:\n      members: false\n      show_root_heading: false\n"
    )
    return "\n".join(parts)


def testing_page() -> str:
    """``streamworker.testing`` and its pytest plugin."""
    parts = ["# streamworker.testing\n\nHow to use it: [testing your handlers](../testing.md).\n"]
    for name in _TESTING:
        home = _TESTING[name]
        if home.startswith("streamworker.testing."):
            parts.append(f"## {name}\n\n::: {home}.{name}\n{_PLAIN}")
    outcomes = [name for name in _TESTING if _TESTING[name] == "streamworker.job" and name != "Outcome"]
    parts.append("## Outcomes\n\nWhat `run` returns is one of these.\n")
    parts += [f"::: streamworker.job.{name}\n    options:\n      show_root_heading: true\n" for name in outcomes]
    parts.append(
        "## The pytest plugin\n\n::: streamworker.testing.plugin\n    options:\n      show_root_heading: false\n"
    )
    return "\n".join(parts)


def _directive(name: str) -> str:
    return f"::: streamworker.{streamworker._HOMES[name]}.{name}\n{_PLAIN}"
