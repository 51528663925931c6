"""What fragments of Python on the pages take for granted. `tests.docs.running` puts real things behind these names."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from streamworker import *  # noqa: F403 - every public name, as after the imports at a page's top
from streamworker import App, Payload


class SendInvoice(Payload, kind="invoice.send", queue="billing"):
    invoice_id: UUID
    copy_to: str | None = None


class Export(Payload, kind="export", queue="exports"):
    name: str


class Resize(Payload, kind="resize", queue="pictures"):
    name: str


class CallPartner(Payload, kind="partner.call", queue="partner"):
    order: int


class BuildReport(Payload, kind="report.build", queue="reports"):
    tenant_id: str


class Add(Payload, kind="add", queue="sums"):
    a: int
    b: int


class DailyReport(Payload, kind="report.daily", queue="reports"):
    day: str = "today"


class Poll(Payload, kind="poll", queue="polls"):
    source: str


class Load(Payload, kind="load", queue="loads"):
    file: str


rows: list[dict[str, str]] = [{"name": "Ann"}]


def report(error: BaseException | None, **facts: Any) -> None:
    """Stands for an error tracker."""


@asynccontextmanager
async def lifespan() -> AsyncIterator[Any]:
    yield None


app: App[Any] = App(lifespan=lifespan)
connection: "asyncpg.Connection[asyncpg.Record]"
i: UUID = uuid4()
invoice_id: UUID = uuid4()
