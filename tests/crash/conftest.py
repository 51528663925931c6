"""``-m crash`` runs the crash suite; without it those tests are left out, for they take minutes."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mode_free: what breaks there does not care what jobs lie in")
    config.addinivalue_line("markers", "crash: workers and servers are killed; run them with -m crash (./dev crash)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "crash" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="crash: run with -m crash, or ./dev crash")
    for item in items:
        if item.get_closest_marker("crash"):
            item.add_marker(skip)


@pytest.fixture(params=[pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param
