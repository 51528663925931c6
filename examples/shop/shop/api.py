"""The API: `uvicorn shop.api:api`."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import HTTPConnection

from shop.database import Order, opened
from shop.jobs import ChargeOrder, app
from streamworker.integrations.fastapi import RequestJobs, guarded, request_jobs
from streamworker.web import Access, dashboard


async def begun(request: Request) -> AsyncIterator[AsyncSession]:
    """The request's session: committed before the response is sent, rolled back if the endpoint raises."""
    async with request.app.state.sessions.begin() as session:
        yield session


Session = Annotated[AsyncSession, Depends(begun, scope="function")]
Jobs = Annotated[RequestJobs, Depends(request_jobs(app, Session), scope="function")]


@asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncGenerator[None]:
    """Nothing of streamworker is opened: all jobs go through the request's transaction, and Redis is not asked."""
    async with opened() as sessions:
        api.state.sessions = sessions
        yield
        await site.aclose()


def operator(request: HTTPConnection) -> bool:
    """Whether a request may see the dashboard: it has the token that the environment names."""
    token = os.environ.get("SHOP_OPERATOR_TOKEN", "")
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return bool(token) and secrets.compare_digest(given.encode(), token.encode())


class NewOrder(BaseModel):
    """What a customer sends."""

    email: str = Field(min_length=3)
    amount: Decimal = Field(gt=0, le=10_000, decimal_places=2)


api = FastAPI(title="shop", lifespan=lifespan)
site = dashboard(app, access=Access(outer=True))
api.mount("/jobs", guarded(site, operator))


@api.post("/orders", status_code=201)
async def create_order(new: NewOrder, session: Session, jobs: Jobs) -> dict[str, UUID]:
    """Both are stored, or neither: the order, and the job that charges it."""
    order = Order(email=new.email, amount=new.amount)
    session.add(order)
    await session.flush()  # gives it its id
    await jobs.enqueue(ChargeOrder(order=order.id))
    return {"id": order.id}


@api.get("/orders/{order_id}")
async def show_order(order_id: UUID, session: Session) -> dict[str, bool]:
    """Whether an order is paid."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, "no such order")
    return {"paid": order.paid}
