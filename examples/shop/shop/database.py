"""Tables, and the sessions that the API and the handlers share the making of."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from typing import TypeAlias
from uuid import UUID, uuid4

from sqlalchemy import ForeignKey, Numeric, func
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Sessions: TypeAlias = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    """The shop's tables; those of streamworker are in a schema of their own."""


class Order(Base):
    """What was ordered. ``paid`` is set by the job that charges it."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    email: Mapped[str]
    amount: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    paid: Mapped[bool] = mapped_column(default=False)
    ordered_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Receipt(Base):
    """One row a paid order: no unique constraint is needed for that."""

    __tablename__ = "receipts"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    order_id: Mapped[UUID] = mapped_column(ForeignKey("orders.id"))


@asynccontextmanager
async def opened() -> AsyncGenerator[Sessions]:
    """Sessions on ``DATABASE_URL``; the tables are made if they are not there."""
    engine = create_async_engine(os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://", 1))
    try:
        async with engine.begin() as connection:
            # Two processes that start at once: one makes the tables. A shop with a past has migrations (Alembic).
            await connection.exec_driver_sql("select pg_advisory_xact_lock(7)")
            await connection.run_sync(Base.metadata.create_all)
        yield async_sessionmaker(engine, expire_on_commit=False)
    finally:
        await engine.dispose()
