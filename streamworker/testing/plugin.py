"""The pytest plugin: handlers of your app on real servers, which are started for the tests and thrown away.

Define one fixture in your ``conftest.py``, the app::

    @pytest.fixture
    def streamworker_app():
        return shop.jobs.app

and a test reads like this, with the anyio or the pytest-asyncio plugin::

    async def test_an_invoice_is_sent(streamworker_live_app, drain):
        async with streamworker_live_app as app:
            await app.enqueue(SendInvoice(invoice_id=1))
            assert (await drain(app)).done == 1

Needs ``pip install 'streamworker[embedded]'``. Every test has keys of its own; the PostgreSQL database is shared by the
tests of one pytest process.
"""

# Loaded in every pytest run, also in those of projects that test nothing of ours: everything else is imported in the
# fixtures.
from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def streamworker_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Embedded servers for the session: ``.redis_url`` and ``.database_url``."""
    from streamworker import embedded  # noqa: PLC0415

    with embedded.acquire(tmp_path_factory.mktemp("streamworker")) as servers:
        yield servers


@pytest.fixture
def streamworker_settings(streamworker_servers: Any) -> Any:
    """Settings on the embedded servers, with a namespace of this test's own; the environment is not read.

    Leases and grace are short, so that a test about them need not wait.
    """
    from streamworker.settings import Settings  # noqa: PLC0415

    return Settings(
        redis_url=streamworker_servers.redis_url,
        database_url=streamworker_servers.database_url,
        namespace=f"test-{secrets.token_hex(6)}:",
        lease=2.0,
        grace=2.0,
    )


@pytest.fixture
def streamworker_app() -> Any:
    """Your app. Override this fixture in your ``conftest.py`` with one that returns it."""
    pytest.fail("define a fixture `streamworker_app` that returns your App, in conftest.py", pytrace=False)


@pytest.fixture
def streamworker_live_app(streamworker_app: Any, streamworker_settings: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Your app (the very object, so that code that imported it enqueues here too) on ``streamworker_settings``.

    Not open yet: ``async with streamworker_live_app as app:``, in whatever async plugin you use.
    """
    monkeypatch.setattr(streamworker_app._connection, "settings", streamworker_settings)
    # The loop behind enqueue_blocking() knows the settings it was made with.
    monkeypatch.setattr(streamworker_app._producer, "_background", None)
    return streamworker_app


@pytest.fixture
def drain() -> Callable[..., Awaitable[Any]]:
    """The function `streamworker.testing.drain`, which runs a worker until nothing is ready."""
    from streamworker.testing import drain as function  # noqa: PLC0415

    return function
