"""A worker process with a ledger: ``python -m tests.postgres.apps``. Its handlers leave traces in PostgreSQL and in Redis.

``CRASH_AT=settle`` kills the process after PostgreSQL has committed a verdict and before Redis hears of it; ``CRASH_AT=record``
kills it before PostgreSQL does.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from typing import Any

from streamworker import App, Backoff, Context, Discard, Payload, QueueWorker, Snooze, StreamworkerError
from streamworker.broker.stream import StreamBroker
from streamworker.postgres.ledger import PostgresLedger
from streamworker.telemetry import logs

app = App()


class Work(Payload, kind="work", queue="q"):
    """What it comes to: ok, fail, discard, snooze, write (in the transaction), freeze (in the transaction), hold."""

    how: str


@app.handler(max_attempts=2, backoff=Backoff(base=0.05, jitter=0), timeout=float(os.environ.get("TIMEOUT", "10")))
async def work(payload: Work, ctx: Context) -> Any:
    await ctx.redis.rpush("queue:trace:ran", f"{ctx.job.id} {ctx.job.hop} {ctx.worker_id}")
    match payload.how:
        case "fail":
            raise ValueError("no")
        case "discard":
            raise Discard("never")
        case "wait":
            await ctx.wait_for("go")
        case "snooze" if ctx.job.hop == 0:
            raise Snooze(0.3)
        case "write":
            async with ctx.transaction() as pg:
                await pg.execute("insert into effect values ($1, $2)", ctx.job.id, ctx.worker_id)
        case "hold":
            async with ctx.transaction() as pg:
                await pg.execute("insert into effect values ($1, $2)", ctx.job.id, ctx.worker_id)
                while not await ctx.redis.exists("queue:trace:go"):  # noqa: ASYNC110 - a key rings no bell
                    await asyncio.sleep(0.02)
        case "freeze":
            if ctx.delivery == 1:
                time.sleep(0.5)  # the test stops the process here
            async with ctx.transaction() as pg:
                await pg.execute("insert into effect values ($1, $2)", ctx.job.id, ctx.worker_id)
    return payload.how


class Order(Payload, kind="order", queue="q"):
    """Six steps, the fourth of which writes in a transaction of its own."""


async def _write(pg: Any, job: str) -> str:
    await pg.execute("insert into effect values ($1, 'step')", job)
    return job


@app.handler(max_attempts=5, backoff=Backoff(base=0.05, jitter=0), timeout=30)
async def order(payload: Order, ctx: Context) -> None:
    async def call(number: int) -> int:
        await ctx.redis.rpush("queue:trace:steps", f"{ctx.job.id} {number} {os.getpid()}")
        await asyncio.sleep(random.uniform(0, 0.02))
        return number

    for number in range(6):
        if number == 3:
            assert await ctx.step("write", _write, ctx.job.id, transaction=True) == ctx.job.id
        assert await ctx.step(f"step {number}", call, number, result=int) == number


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def _dying(*_: Any) -> Any:
    _die()


async def main() -> int:
    match os.environ.get("CRASH_AT"):
        case "settle":
            StreamBroker.settle = _dying  # type: ignore[method-assign]
        case "park":
            PostgresLedger.park = _dying  # type: ignore[method-assign]
        case "record":
            PostgresLedger.record = _dying  # type: ignore[method-assign]
    worker = QueueWorker(app, redis=None, database=None, services=None)
    try:
        return await worker.run()
    except StreamworkerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    logs.configure(app.resolve(None).log_level, "json")
    code = asyncio.run(main())
    sys.stderr.flush()
    os._exit(code)
