"""In which modes the contract is tested when."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before anything is chosen by its markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is mode_free is tested in stream mode, and in list mode with --all."""
    for item in items:
        if item.get_closest_marker("mode_free") and _parameters(item).get("ground") == "list":
            item.add_marker("all")


def _parameters(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params
