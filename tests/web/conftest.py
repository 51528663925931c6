"""The dashboard as browsers and scanners reach it: over ASGI, with a real server behind it."""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from streamworker import App, Settings
from streamworker.web import Access, dashboard
from tests.web.chromium import Chromium, program

HERE = "http://127.0.0.1:8787"
LOOKS = {"streamworker.web.monitor.WATCHED": 0.3, "streamworker.loops.FIRST": 0.2}
"""Seconds between two looks, of which tests want the next one."""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium | None]:
    """A browser for all tests of this process; ``None`` if it is not installed."""
    chromium = Chromium() if program() is not None else None
    yield chromium
    if chromium is not None:
        chromium.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in LOOKS.items():
        assert isinstance(pkgutil.resolve_name(name), float), name
        monkeypatch.setattr(name, seconds)


class Browser:
    """A client that does what the page's script does: remembers the cookie, sends the token and the Origin."""

    def __init__(self, client: httpx2.AsyncClient, prefix: str = "") -> None:
        self.client = client
        self.prefix = prefix

    async def get(self, path: str, **options: Any) -> httpx2.Response:
        return await self.client.get(self.prefix + path, **options)

    async def text(self, path: str) -> str:
        answer = await self.get(path)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        return answer.text

    async def token(self) -> str:
        found = re.search(r'name="csrf" content="([^"]+)"', await self.text("/"))
        assert found is not None
        return found[1]

    async def do(self, what: str, /, **fields: Any) -> Any:
        """What a button does; the answer's JSON."""
        return (await self.post(what, fields, {"x-csrf-token": await self.token(), "origin": HERE})).json()

    async def post(self, what: str, fields: Any, headers: dict[str, str]) -> httpx2.Response:
        return await self.client.post(f"{self.prefix}/do/{what}", data=fields, headers=headers)

    async def rows(self, path: str) -> list[str]:
        """The tokens of a listing's rows."""
        import html

        return [html.unescape(value) for value in re.findall(r'name="row" value="([^"]*)"', await self.text(path))]


@pytest.fixture
def site_of(redis_url: str) -> Callable[..., Any]:
    """``async with site_of(user="me", password="secret") as browser``."""

    @asynccontextmanager
    async def make(*, auth: Any = None, app: Any = None, prefix: str = "", **access: Any) -> AsyncIterator[Browser]:
        below = prefix if app is None else ""
        site = dashboard(App(settings=Settings(redis_url=redis_url)), access=Access(prefix=below, **access))
        transport = httpx2.ASGITransport(app=app(site) if app is not None else site, client=("127.0.0.1", 5))
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, auth=auth) as client:
            try:
                browser = Browser(client, prefix)
                browser.site = site  # type: ignore[attr-defined]
                yield browser
            finally:
                await site.aclose()

    return make


@pytest.fixture
async def browser(site_of: Callable[..., Any]) -> AsyncIterator[Browser]:
    async with site_of() as browser:
        yield browser


def letter(raw: Any, queue: str = "q", **fields: str) -> str:
    """A dead letter."""
    base = {"id": "dead-1", "kind": "k", "level": "normal", "reason": "raised", "error": "E", "attempts": "3",
            "deliveries": "1", "worker": "w", "failed_at": "2026-11-24T00:00:00Z", "entry": "1-1",
            "job": json.dumps({"id": "dead-1", "kind": "k", "payload": {"secret": "s3cret"}})}  # fmt: skip
    return str(raw.xadd(f"stream:{{{queue}}}:dead", {**base, **fields}).decode())


def held(raw: Any, count: int = 1, queue: str = "q", worker: str = "worker-gone", **document: Any) -> list[str]:
    """Pending entries of a worker that does not beat."""
    key = f"stream:{{{queue}}}"
    for n in range(count):
        raw.xadd(key, {"job": json.dumps({"id": f"job-{n}", "kind": "k", "payload": {}, **document})})
    raw.xgroup_create(key, "workers", "0", mkstream=True)
    raw.hset(f"{key}:meta", "epoch", "e")
    read = raw.xreadgroup("workers", worker, {key: ">"}, count=count)
    return [entry.decode() for entry, _ in read[0][1]]
