"""What hangs in the crash suite ends, and says where."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.crash.watchdog import watchdog

PATIENCE = 90.0
"""Seconds a test may hang beyond its own timeout."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    marker = item.get_closest_marker("timeout")
    capture = item.config.pluginmanager.getplugin("capturemanager")
    limit = (marker.args[0] if marker is not None else 60) + PATIENCE
    with watchdog(limit, item.nodeid, first=lambda: capture.suspend_global_capture(in_=False)):
        return (yield)


@pytest.fixture(params=[pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """asyncio's loop, for the proxy: uvloop's sockets cannot be asked for anything once they are closed."""
    return request.param
