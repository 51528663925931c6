"""``-m crash`` runs the crash suite; without it those tests are left out, for they take minutes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.crash.watchdog import watchdog

PATIENCE = 90.0
"""Seconds a test may hang beyond its own timeout."""


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    marker = item.get_closest_marker("timeout")
    capture = item.config.pluginmanager.getplugin("capturemanager")
    limit = (marker.args[0] if marker is not None else 60) + PATIENCE
    with watchdog(limit, item.nodeid, first=lambda: capture.suspend_global_capture(in_=False)):
        return (yield)


@pytest.fixture(params=[pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param
