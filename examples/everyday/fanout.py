"""Fan-out and join: one job starts many, the last of them starts what comes after all, whoever is killed on the way.

    REDIS_URL=redis://localhost:6379 DATABASE_URL=postgresql://localhost/shop python examples/everyday/fanout.py

The database needs the schema (`streamworker migrate up`). ``worker`` as an argument runs a worker and nothing else, so
that there can be several, and ``start N`` enqueues a year of N months.
"""

import asyncio
import os
import sys
from uuid import UUID, uuid4

import asyncpg

from streamworker import App, Context, Payload, QueueWorker

TABLES = """
create table if not exists yearly (
    id uuid primary key,
    remaining int not null check (remaining >= 0),  -- children that have not committed
    total int                                       -- what the continuation wrote
);
create table if not exists monthly (
    year uuid references yearly (id),
    month int,
    total int not null,
    primary key (year, month)
);
"""

app = App()


class CloseYear(Payload, kind="year.close", queue="books"):
    year: UUID
    months: int


class CloseMonth(Payload, kind="month.close", queue="books"):
    year: UUID
    month: int


class SumYear(Payload, kind="year.sum", queue="books"):
    year: UUID


@app.handler
async def close_year(payload: CloseYear, ctx: Context) -> None:
    async with ctx.transaction() as pg:  # the counter and all children exist, or nothing does
        await pg.execute("insert into yearly (id, remaining) values ($1, $2)", payload.year, payload.months)
        children = [CloseMonth(year=payload.year, month=month) for month in range(1, payload.months + 1)]
        await app.enqueue_many(children, connection=pg)


@app.handler
async def close_month(payload: CloseMonth, ctx: Context) -> None:
    total = payload.month * 10
    await asyncio.sleep(0.02)  # the work: outside of the transaction if it takes long
    async with ctx.transaction() as pg:  # the part, the count, and perhaps the continuation: once, together
        await pg.execute("insert into monthly values ($1, $2, $3)", payload.year, payload.month, total)
        # Last, because the row is locked from here to the commit, and every child comes by.
        remaining = await pg.fetchval(
            "update yearly set remaining = remaining - 1 where id = $1 returning remaining", payload.year
        )
        if remaining == 0:
            await app.enqueue(SumYear(year=payload.year), connection=pg)


@app.handler
async def sum_year(payload: SumYear, ctx: Context) -> None:
    async with ctx.transaction() as pg:
        await pg.execute(
            """update yearly set total = coalesce(total, 0) + (select sum(total) from monthly where year = $1)
            where id = $1""",
            payload.year,
        )


async def start(connection: asyncpg.Connection, months: int) -> UUID:
    year = uuid4()
    async with connection.transaction():
        await app.enqueue(CloseYear(year=year, months=months), connection=connection)
    return year


async def main(arguments: list[str]) -> None:
    if arguments == ["worker"]:
        await QueueWorker(app, redis=None, database=None, services=None).run()
        return
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    await connection.execute(TABLES)
    year = await start(connection, int(arguments[1]) if arguments[:1] == ["start"] else 12)
    if arguments:
        print(year)
        return
    worker = QueueWorker(app, redis=None, database=None, services=None)
    working = asyncio.create_task(worker.start())
    while not (total := await connection.fetchval("select total from yearly where id = $1", year)):
        await asyncio.sleep(0.05)
    await worker.stop()
    await working
    print(f"12 months, {total} in all")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
