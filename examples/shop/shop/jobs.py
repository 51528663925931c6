"""The jobs: `streamworker worker shop.jobs:app`."""

from __future__ import annotations

from uuid import UUID

from shop.database import Order, Receipt, Sessions, opened
from streamworker import App, Backoff, Context, Discard
from streamworker.integrations.pydantic import PydanticPayload

app = App(lifespan=opened)


class ChargeOrder(PydanticPayload, kind="order.charge", queue="orders"):
    """Charge an order, and write its receipt."""

    order: UUID


class SendReceipt(PydanticPayload, kind="receipt.send", queue="mail"):
    """Send a receipt by mail."""

    order: UUID
    to: str


@app.handler(max_attempts=8, backoff=Backoff(base=1, cap=60), timeout=30)
async def charge(payload: ChargeOrder, ctx: Context[Sessions]) -> None:
    """The order is paid, its receipt written and the mail enqueued, together and once, whatever is killed."""
    async with ctx.transaction(ctx.services) as session:
        order = await session.get(Order, payload.order)
        if order is None:
            raise Discard("the order was deleted")
        order.paid = True
        session.add(Receipt(order_id=order.id))
        await app.enqueue(SendReceipt(order=order.id, to=order.email), connection=session)


@app.handler
async def send_receipt(payload: SendReceipt, ctx: Context[Sessions]) -> None:
    """Mail is at-least-once, whoever sends it: a real sender gives the order's id as the message's id."""
    ctx.log.info("receipt_sent", order=str(payload.order))
