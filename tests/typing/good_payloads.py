"""Payload types that are no msgspec structs, as type checkers see them: clean under mypy --strict and basedpyright."""

from dataclasses import dataclass
from typing import assert_type
from uuid import UUID

from streamworker import App, Context, Enqueued
from streamworker.integrations.dataclasses import DataclassPayload
from streamworker.integrations.pydantic import PydanticPayload

app = App()


@dataclass(frozen=True)
class SendData(DataclassPayload, kind="data.send", queue="mail"):
    invoice: UUID
    copy_to: str | None = None


class SendModel(PydanticPayload, kind="model.send", queue="mail"):
    invoice: UUID
    copy_to: str | None = None


@app.handler
async def send_data(payload: SendData, ctx: Context) -> None:
    assert_type(payload.invoice, UUID)


@app.handler(max_attempts=3)
def send_model(payload: SendModel) -> None:
    assert_type(payload.copy_to, str | None)


async def produce(invoice: UUID) -> None:
    assert_type(await app.enqueue(SendData(invoice), delay=5), Enqueued)
    assert_type(await app.enqueue_many([SendData(invoice), SendModel(invoice=invoice)]), list[Enqueued])
    app.enqueue_blocking(SendModel(invoice=invoice))
