"""An order as a flow: payment, approval, packing, shipping; and a refund where the approval is refused.

    REDIS_URL=redis://localhost:6379 DATABASE_URL=postgresql://localhost/shop python examples/everyday/order.py

The database needs the schema (`streamworker migrate up`). Three orders are placed: one is approved, one is refused, and
one card is declined. ``worker`` as an argument runs a worker and nothing else; ``streamworker flows show ID`` shows an
order.
"""

import asyncio
import os
import sys
from uuid import UUID, uuid4

import asyncpg
import msgspec

from streamworker import App, Context, Discard, Flow, Payload, QueueWorker
from streamworker.errors import SignalTimeout

TABLES = """
create table if not exists orders (id uuid primary key, amount int not null, state text not null default 'placed');
create table if not exists order_events (
    order_id uuid not null, what text not null, at timestamptz default clock_timestamp()
)
"""

app = App()


class Order(Payload, kind="order", queue="orders"):
    """What all steps of an order are given."""

    order: UUID


class Charge(Order, kind="order.charge", queue="orders"):
    amount: int


class Approve(Order, kind="order.approve", queue="orders"):
    pass


class Pack(Order, kind="order.pack", queue="orders"):
    pass


class Label(Order, kind="order.label", queue="orders"):
    pass


class Ship(Order, kind="order.ship", queue="orders"):
    pass


class Refund(Order, kind="order.refund", queue="orders"):
    pass


class Apologise(Order, kind="order.apologise", queue="orders"):
    pass


class Receipt(msgspec.Struct):
    """What the payment leaves to those after it."""

    number: str
    amount: int


class Decision(msgspec.Struct):
    by: str
    yes: bool


def order_flow(order: UUID, amount: int) -> Flow:
    flow = Flow("order", key=str(order))
    charge = flow.add(Charge(order=order, amount=amount), name="charge")
    approve = flow.add(Approve(order=order), name="approve", after=charge)
    pack = flow.add(Pack(order=order), after=approve)
    label = flow.add(Label(order=order), after=approve)
    flow.add(Ship(order=order), after=[pack, label])
    # Each edge has a condition of its own: there is something to refund, and the approval failed.
    flow.add(Refund(order=order), after={charge: "ok", approve: "failed"})
    flow.add(Apologise(order=order), after=charge, when="failed")
    return flow


async def place(connection: asyncpg.Connection, amount: int) -> UUID:
    """The order and its flow: both, or neither."""
    order = uuid4()
    async with connection.transaction():
        await connection.execute("insert into orders (id, amount) values ($1, $2)", order, amount)
        await app.start(order_flow(order, amount), connection=connection)
    return order


async def happened(pg: asyncpg.Connection, order: UUID, what: str) -> None:
    await pg.execute("insert into order_events (order_id, what) values ($1, $2)", order, what)
    await pg.execute("update orders set state = $2 where id = $1", order, what)


@app.handler
async def charge(payload: Charge, ctx: Context) -> Receipt:
    if payload.amount > 1000:
        raise Discard("the card was declined")  # it is dead at once: what waits for a failure runs
    async with ctx.transaction() as pg:  # the provider is given ctx.job.id as idempotency key
        await happened(pg, payload.order, "paid")
    return Receipt(number=f"R-{ctx.job.id[-4:]}", amount=payload.amount)


@app.handler
async def approve(payload: Approve, ctx: Context) -> None:
    """Waits in PostgreSQL, for days if need be: in no worker, and in no queue."""
    try:
        decision = await ctx.wait_for("decision", timeout=3 * 86_400, result=Decision)
    except SignalTimeout:
        raise Discard("nobody decided in three days") from None
    if not decision.yes:
        raise Discard(f"refused by {decision.by}")
    async with ctx.transaction() as pg:
        await happened(pg, payload.order, f"approved by {decision.by}")


@app.handler
async def pack(payload: Pack, ctx: Context) -> None:
    async with ctx.transaction() as pg:
        await happened(pg, payload.order, "packed")


@app.handler
async def label(payload: Label, ctx: Context) -> str:
    return f"label of {payload.order}"


@app.handler
async def ship(payload: Ship, ctx: Context) -> None:
    await ctx.parents.result("order.label", str)  # what the label's handler returned
    async with ctx.transaction() as pg:
        await happened(pg, payload.order, "shipped")


@app.handler
async def refund(payload: Refund, ctx: Context) -> None:
    receipt = await ctx.parents.result("charge", Receipt)
    async with ctx.transaction() as pg:
        await happened(pg, payload.order, f"refunded {receipt.amount}")


@app.handler
async def apologise(payload: Apologise, ctx: Context) -> None:
    async with ctx.transaction() as pg:
        await happened(pg, payload.order, "declined")


async def decide(connection: asyncpg.Connection, order: UUID, *, yes: bool) -> None:
    """What the button of a web page does."""
    flow = await app.find_flow(str(order))
    approval = await connection.fetchval(
        "select job_id from streamworker.flow_nodes where flow_id = $1 and name = 'approve'", flow.id if flow else None
    )
    async with connection.transaction():
        await app.signal(approval, "decision", {"by": "ann", "yes": yes}, queue="orders", connection=connection)


async def main(arguments: list[str]) -> None:
    if arguments == ["worker"]:
        await QueueWorker(app, redis=None, database=None, services=None).run()
        return
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    await connection.execute(TABLES)
    orders = [await place(connection, amount) for amount in (10, 20, 5000)]
    async with app:
        await decide(connection, orders[0], yes=True)  # a signal may come before its job waits
        await decide(connection, orders[1], yes=False)
    worker = QueueWorker(app, redis=None, database=None, services=None)
    working = asyncio.create_task(worker.start())
    names = [str(order) for order in orders]
    while await connection.fetchval(
        "select count(*) from streamworker.flows where key = any($1::text[]) and status = 'running'", names
    ):
        await asyncio.sleep(0.05)
    await worker.stop()
    await working
    for order in orders:
        events = await connection.fetch("select what from order_events where order_id = $1 order by at", order)
        print(", ".join(row["what"] for row in events))
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
