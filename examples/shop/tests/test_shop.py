"""The shop on real servers: what a request stores, and what follows from it, once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, text

from shop import jobs
from shop.api import api
from shop.database import Order, Receipt, opened
from streamworker.testing import drain


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def streamworker_app() -> Any:
    return jobs.app


@pytest.fixture
async def live(streamworker_live_app: Any, streamworker_settings: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The app on servers of this test's own; the tables are those of a shop that begins."""
    monkeypatch.setenv("DATABASE_URL", streamworker_settings.database_url)
    async with streamworker_live_app.migrator(streamworker_settings) as migrator:
        await migrator.up()
    async with opened() as sessions, sessions.begin() as session:
        await session.execute(text("truncate orders, receipts, streamworker.jobs"))
    return streamworker_live_app


@pytest.fixture
async def client(live: Any) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=api, raise_app_exceptions=False)
    async with (
        api.router.lifespan_context(api),
        httpx2.AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        yield client


async def counts(app: Any) -> tuple[int, int, int]:
    """(orders that are paid, receipts, jobs)."""
    async with opened() as sessions, sessions() as session:
        paid = await session.scalar(select(func.count()).select_from(Order).where(Order.paid))
        receipts = await session.scalar(select(func.count()).select_from(Receipt))
        stored = await session.scalar(text("select count(*) from streamworker.jobs"))
        return paid or 0, receipts or 0, stored or 0


async def test_an_order_is_charged_once_and_its_receipt_sent(client, live):
    answer = await client.post("/orders", json={"email": "ada@example.com", "amount": "9.90"})
    assert answer.status_code == 201
    where = f"/orders/{answer.json()['id']}"
    assert (await client.get(where)).json() == {"paid": False}
    assert await counts(live) == (0, 0, 1)
    async with live:
        assert (await drain(live)).done == 2  # the charge, and the mail that it enqueued
    assert (await client.get(where)).json() == {"paid": True}
    assert await counts(live) == (1, 1, 2)


async def test_what_is_refused_or_fails_stores_neither_order_nor_job(client, live, monkeypatch):
    assert (await client.post("/orders", json={"email": "ada@example.com", "amount": "-1"})).status_code == 422

    async def fails(*_: Any, **__: Any) -> None:
        await original(*_, **__)
        raise RuntimeError("after the job was enqueued")

    from streamworker.integrations.fastapi import RequestJobs

    original = RequestJobs.enqueue
    monkeypatch.setattr(RequestJobs, "enqueue", fails)
    assert (await client.post("/orders", json={"email": "ada@example.com", "amount": "1"})).status_code == 500
    assert await counts(live) == (0, 0, 0)


async def test_the_dashboard_wants_the_shops_token(client, monkeypatch):
    assert (await client.get("/jobs/")).status_code == 403
    monkeypatch.setenv("SHOP_OPERATOR_TOKEN", "a-token")
    assert (await client.get("/jobs/", headers={"authorization": "Bearer wrong"})).status_code == 403
