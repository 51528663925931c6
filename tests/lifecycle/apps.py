"""The app that lifecycle tests run as a process of its own: ``python -m tests.lifecycle.apps [burst]``.

Its handlers leave traces in Redis: a list ``trace:KIND`` of "name worker attempt delivery", and counters.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from contextlib import suppress

import redis

from streamworker import App, Backoff, Context, Payload, QueueWorker, Snooze, StreamworkerError
from streamworker.telemetry import logs

app = App()
TRACE = "queue:trace:"
"""Under a prefix that the key-leak check knows."""


class Quick(Payload, kind="quick", queue="q"):
    name: str = ""


class Wait(Payload, kind="wait", queue="q"):
    """Runs until its name is in the set ``queue:trace:go``, or for ever."""

    name: str


class Block(Payload, kind="block", queue="q"):
    name: str
    seconds: float


class Lock(Payload, kind="lock", queue="q"):
    name: str
    seconds: float


class LockLimited(Payload, kind="lock_limited", queue="q"):
    name: str
    seconds: float


class LockThread(Payload, kind="lock_thread", queue="q"):
    name: str
    seconds: float


class Hang(Payload, kind="hang", queue="q"):
    """Swallows its cancellation at the first delivery."""

    name: str


class Thread(Payload, kind="thread", queue="q"):
    name: str


class Poison(Payload, kind="poison", queue="q"):
    name: str


class Fail(Payload, kind="fail", queue="q"):
    name: str


class Nap(Payload, kind="nap", queue="q"):
    name: str


def trace(what: str, name: str, ctx: Context) -> None:
    # Synchronous on purpose: written before the next line runs, whatever becomes of the loop.
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        client.rpush(TRACE + what, f"{name} {ctx.worker_id} {ctx.attempt} {ctx.delivery} {ctx.job.hop}")


@app.handler
async def quick(payload: Quick, ctx: Context) -> None:
    await ctx.redis.rpush(TRACE + "quick", payload.name)


@app.handler(timeout=None)
async def wait(payload: Wait, ctx: Context) -> None:
    trace("wait", payload.name, ctx)
    while True:
        with suppress(redis.RedisError):  # the server may be restarted under us
            if await ctx.redis.sismember(TRACE + "go", payload.name):
                break
        await asyncio.sleep(0.02)
    trace("waited", payload.name, ctx)


@app.handler
async def block(payload: Block, ctx: Context) -> None:
    trace("block", payload.name, ctx)
    time.sleep(payload.seconds)  # what a lease must survive
    trace("blocked", payload.name, ctx)


@app.handler
async def lock(payload: Lock, ctx: Context) -> None:
    keep_the_lock(payload, ctx)


@app.handler(concurrency=1)
async def lock_limited(payload: LockLimited, ctx: Context) -> None:
    keep_the_lock(payload, ctx)


@app.handler
def lock_thread(payload: LockThread, ctx: Context) -> None:
    keep_the_lock(payload, ctx)


def keep_the_lock(payload: Lock | LockThread | LockLimited, ctx: Context) -> None:
    trace("lock", payload.name, ctx)
    ctypes.PyDLL(None).usleep(
        int(payload.seconds * 1_000_000)
    )  # C code that keeps the interpreter lock, and costs no processor time
    trace("locked", payload.name, ctx)


@app.handler(timeout=0.3)
async def hang(payload: Hang, ctx: Context) -> None:
    trace("hang", payload.name, ctx)
    while ctx.delivery == 1:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if ctx.stopping:
                raise


@app.handler(timeout=0.3)
def thread(payload: Thread, ctx: Context) -> None:
    trace("thread", payload.name, ctx)
    threading.Event().wait()


@app.handler(timeout=None)
async def poison(payload: Poison, ctx: Context) -> None:
    trace("poison", payload.name, ctx)
    os._exit(9)


@app.handler(max_attempts=3, backoff=Backoff(base=0.05, jitter=0))
async def fail(payload: Fail, ctx: Context) -> None:
    trace("fail", payload.name, ctx)
    raise ValueError("no")


@app.handler
async def nap(payload: Nap, ctx: Context) -> None:
    trace("nap", payload.name, ctx)
    if ctx.job.hop < 2:
        raise Snooze(0.05)


async def main() -> int:
    settings = app.resolve(None)
    worker = QueueWorker(app, redis=None, database=None, services=None, settings=settings)
    try:
        return await worker.run(burst="burst" in sys.argv)
    except StreamworkerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    logs.configure(app.resolve(None).log_level, "json")
    code = asyncio.run(main())
    sys.stderr.flush()
    os._exit(code)  # as the command line does: a thread that never returns must not keep the process
