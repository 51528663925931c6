"""Middleware: what wraps every handler. Here a tenant in a context variable, and a timer.

REDIS_URL=redis://localhost:6379 python examples/everyday/middleware.py
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from time import monotonic
from typing import Any

from streamworker import App, Context, Payload, QueueWorker

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
timed: list[str] = []


async def with_tenant(ctx: Context, call_next: Callable[[], Awaitable[Any]]) -> Any:
    token = tenant.set((ctx.job.headers or {}).get("tenant", "nobody"))
    try:
        return await call_next()
    finally:
        tenant.reset(token)


async def with_timer(ctx: Context, call_next: Callable[[], Awaitable[Any]]) -> Any:
    began = monotonic()
    try:
        return await call_next()
    finally:
        timed.append(f"{ctx.job.kind} took {monotonic() - began:.0f} s")


app = App(middleware=[with_timer, with_tenant])  # the first is the outermost


class Greet(Payload, kind="greet", queue="greetings"):
    name: str


class Shout(Payload, kind="shout", queue="greetings"):
    name: str


@app.handler
async def greet(payload: Greet) -> None:
    print(f"hello {payload.name} of {tenant.get()}")


@app.handler
def shout(payload: Shout) -> None:  # in a thread: it sees the variable, too
    print(f"HELLO {payload.name} OF {tenant.get()}")


async def main() -> None:
    async with app:
        await app.enqueue(Greet(name="Ada"), headers={"tenant": "acme"})
        await app.enqueue(Shout(name="Bob"), headers={"tenant": "umbrella"})
        await app.enqueue(Greet(name="Eve"))
        await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
    print(*sorted(timed), sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
