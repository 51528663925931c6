"""FastAPI: the app in its lifespan, jobs in the transaction of a request, the dashboard behind the user's authentication."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import asyncpg
import httpx2
import pytest
import sqlalchemy
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from streamworker import App, Payload, Settings
from streamworker.integrations.fastapi import RequestJobs, guarded, lifespan, request_jobs
from streamworker.web import Access, dashboard

HERE = "http://here"


class Receipt(Payload, kind="receipt", queue="receipts"):
    order: int


@asynccontextmanager
async def client_of(api: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=api, raise_app_exceptions=False)
    async with api.router.lifespan_context(api), httpx2.AsyncClient(transport=transport, base_url=HERE) as client:
        yield client


async def counts(url: str) -> tuple[int, int]:
    pg = await asyncpg.connect(url)
    try:
        return tuple(
            await pg.fetchrow("select (select count(*) from orders), (select count(*) from streamworker.jobs)")
        )
    finally:
        await pg.close()


@pytest.fixture
async def shop_url(database_url: str) -> str:
    pg = await asyncpg.connect(database_url)
    await pg.execute("create table orders (id int primary key deferrable initially deferred)")
    await pg.close()
    return database_url


async def ordered(client: httpx2.AsyncClient, url: str) -> None:
    """One order, one that fails after it was enqueued, and one whose commit fails."""
    assert (await client.post("/orders/1")).status_code == 200
    assert await counts(url) == (1, 1)
    assert (await client.post("/orders/2?fail=true")).status_code == 500
    assert (await client.post("/orders/1")).status_code == 500
    assert await counts(url) == (1, 1)


async def test_a_request_enqueues_in_its_own_transaction(shop_url):
    app = App(settings=Settings())
    engine = create_async_engine(shop_url.replace("postgresql://", "postgresql+asyncpg://"), poolclass=NullPool)
    sessions = async_sessionmaker(engine)

    async def session() -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    begun = Annotated[AsyncSession, Depends(session, scope="function")]
    jobs_of = Annotated[RequestJobs, Depends(request_jobs(app, begun), scope="function")]
    api = FastAPI()

    async def order(number: int, session: Any, jobs: Any, fail: bool = False) -> str:
        await session.execute(sqlalchemy.text(f"insert into orders values ({number})"))
        done = await jobs.enqueue(Receipt(order=number), delay=60)
        if fail:
            raise ValueError("no")
        return done.id

    order.__annotations__.update(session=begun, jobs=jobs_of, number=int, fail=bool)
    api.post("/orders/{number}", response_model=None)(order)
    async with client_of(api) as client:
        await ordered(client, shop_url)
    await engine.dispose()


async def test_endpoints_that_are_not_async(shop_url):
    app = App(settings=Settings())
    engine = sqlalchemy.create_engine(shop_url.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool)
    sessions = sessionmaker(engine)

    def session() -> Iterator[Session]:
        with sessions.begin() as session:
            yield session

    begun = Annotated[Session, Depends(session, scope="function")]
    jobs_of = Annotated[RequestJobs, Depends(request_jobs(app, begun), scope="function")]
    api = FastAPI()

    def order(number: int, session: Any, jobs: Any, fail: bool = False) -> str:
        session.execute(sqlalchemy.text(f"insert into orders values ({number})"))
        done = jobs.enqueue_blocking(Receipt(order=number), priority="high")
        if fail:
            raise ValueError("no")
        return done.id

    order.__annotations__.update(session=begun, jobs=jobs_of, number=int, fail=bool)
    api.post("/orders/{number}", response_model=None)(order)
    async with client_of(api) as client:
        await ordered(client, shop_url)
    engine.dispose()


async def test_the_app_is_open_in_the_lifespan(redis_url, raw):
    app = App(settings=Settings(redis_url=redis_url))
    api = FastAPI(lifespan=lifespan(app))

    @api.post("/orders/{number}")
    async def order(number: int) -> str:
        return (await app.enqueue(Receipt(order=number))).id

    async with client_of(api) as client:
        assert (await client.post("/orders/1")).status_code == 200
    assert raw.xlen("stream:{receipts}") == 1


@pytest.mark.parametrize("sync", [False, True])
async def test_the_dashboard_behind_the_users_own_authentication(redis_url, raw, sync):
    app = App(settings=Settings(redis_url=redis_url))

    def allowed(request: Any) -> bool:
        if request.headers.get("authorization") is None:
            raise HTTPException(401, "who are you?", headers={"www-authenticate": "Bearer"})
        return request.headers["authorization"] == "Bearer operator"

    async def allow(request: Any) -> bool:
        return allowed(request)

    site = dashboard(app, access=Access(outer=True))
    api = FastAPI()
    api.mount("/jobs", guarded(site, allowed if sync else allow))
    async with client_of(api) as client:
        for path in ("/jobs/", "/jobs/static/site.css", "/jobs/dead"):
            nobody = await client.get(path)
            assert (nobody.status_code, nobody.headers["www-authenticate"]) == (401, "Bearer"), path
            assert (await client.get(path, headers={"authorization": "Bearer guest"})).status_code == 403
        shown = await client.get("/jobs/", headers={"authorization": "Bearer operator"})
        assert shown.status_code == 200 and "streamworker" in shown.text.lower()
    await site.aclose()
