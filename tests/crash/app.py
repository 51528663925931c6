"""The app whose workers are killed: every handler writes its history with O_APPEND, past the system under test.

Importing it in a worker process (``CRASH_DIR`` in the environment) also installs the witnesses on the server's side and
the failpoints, both from outside: the package holds no code for them.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from streamworker import App, Backoff, Context, Discard, Payload, Snooze
from streamworker.errors import ClaimLost
from tests.crash import failpoints, stalls, witness
from tests.crash.history import Journal

app = App()
journal = Journal.from_environment()
taken: list[bytearray] = []


class Work(Payload, kind="work", queue="q"):
    """One awaiting job.

    Attributes:
        seconds: how long it takes.
        fails: attempts that raise before one succeeds.
        snoozes: hops that snooze before one runs.
        bad: it is discarded.
    """

    seconds: float = 0.0
    fails: int = 0
    snoozes: int = 0
    bad: bool = False


class Block(Payload, kind="block", queue="q"):
    seconds: float


class Thread(Payload, kind="thread", queue="q"):
    seconds: float


class Stuck(Payload, kind="stuck", queue="q"):
    """Its thread never returns at the first attempt."""


class Deaf(Payload, kind="deaf", queue="q"):
    """Swallows its cancellation and never returns at its first delivery."""


class Poison(Payload, kind="poison", queue="q"):
    """Takes its worker along, always."""


class Hungry(Payload, kind="hungry", queue="q"):
    """Takes all the memory its process may have, at its first delivery.

    Attributes:
        then: ``raise``: the MemoryError is its end, and what it took is given back. ``keep``: all the worker has to go on
            without. ``die``: the kernel ends the process, which is what its own killer does.
    """

    then: str


class Gated(Payload, kind="gated", queue="q"):
    """Runs until a file of this name lies in the history's directory."""

    gate: str


class Talking(Payload, kind="talking", queue="q"):
    """Emits its delivery and a number all the time, until a file of this name is in the history's directory."""

    gate: str


class Limited(Payload, kind="limited", queue="q"):
    """At most `LIMIT` of them run at once, in all workers."""

    seconds: float = 0.0
    gate: str = ""


LIMIT = 3


class Kept(Payload, kind="kept", queue="q"):
    """Its result, the number of its delivery, is kept.

    Attributes:
        gate: it runs until a file of this name lies in the history's directory.
        careful: cancelled, it says so by another, and puts things away until a third is there.
    """

    gate: str = ""
    careful: bool = False


class Ticked(Payload, kind="ticked", queue="q"):
    """Made by the calendar; its run writes the schedule and the tick down."""

    seconds: float = 0.0


class Gathered(Payload, kind="gathered", queue="q"):
    """Called together with others; each is finished a little after the one before.

    Attributes:
        seconds: how long it takes.
        gate: of the batch, which waits for it after four of its jobs: partitions have no common order.
        fails: attempts that raise before one succeeds.
    """

    seconds: float = 0.0
    gate: str = ""
    fails: int = 0


class InLine(Payload, kind="in-line", queue="q", order_by="key", fair_by="tenant"):
    """Of those with one key one runs at a time, in the order of their numbers.

    Attributes:
        key: the order key.
        number: counted up by the producer.
        tenant: whose line it joins when its turn has come.
        seconds: how long it takes.
        fails: attempts that raise before one succeeds.
    """

    key: str
    number: int
    tenant: str = "t"
    seconds: float = 0.0
    fails: int = 0


class Shared(Payload, kind="shared", queue="q", fair_by="tenant"):
    """Each tenant has its share of the starts."""

    tenant: str
    seconds: float = 0.0


class Fleeting(Payload, kind="fleeting", queue="q"):
    """Enqueued with an expiry, after which it must not start."""

    seconds: float = 0.0
    fails: int = 0


class Single(Payload, kind="single", queue="q"):
    """Enqueued with a key that it holds until it has ended: no other one of that key starts before.

    Attributes:
        name: the key.
        seconds: how long it takes.
        fails: attempts that raise before one succeeds.
    """

    name: str
    seconds: float = 0.0
    fails: int = 0


@app.handler(timeout=60)
async def shared(payload: Shared, ctx: Context) -> None:
    with journal.run(ctx, tenant=payload.tenant):
        await asyncio.sleep(payload.seconds)


@app.handler(timeout=60, max_attempts=4, backoff=Backoff(base=0.05, cap=0.5))
async def fleeting(payload: Fleeting, ctx: Context) -> None:
    expires = ctx.job.expires_at
    with journal.run(ctx, expires=expires.timestamp() if expires is not None else None):
        await asyncio.sleep(payload.seconds)
        if ctx.attempt <= payload.fails:
            raise ValueError("as planned")


@app.handler(timeout=60, max_attempts=4, backoff=Backoff(base=0.05, cap=0.5))
async def single(payload: Single, ctx: Context) -> None:
    with journal.run(ctx, held=payload.name):
        await asyncio.sleep(payload.seconds)
        if ctx.attempt <= payload.fails:
            raise ValueError("as planned")


@app.handler(timeout=60, max_attempts=4, backoff=Backoff(base=0.05, cap=0.5))
async def in_line(payload: InLine, ctx: Context) -> None:
    with journal.run(ctx, key=payload.key, number=payload.number):
        if payload.seconds:
            await asyncio.sleep(payload.seconds)
        if ctx.attempt <= payload.fails:
            raise ValueError("as planned")


@app.handler(timeout=60, batch=8, linger=0.05, max_attempts=4, backoff=Backoff(base=0.05, cap=0.5))
async def gathered(payloads: list[Gathered], contexts: list[Context]) -> list[Exception | None]:
    outcomes: list[Exception | None] = []
    runs = [journal.run(ctx) for ctx in contexts]
    for run in runs:
        run.__enter__()
    for payload, ctx, run in zip(payloads, contexts, runs, strict=True):
        await asyncio.sleep(payload.seconds)
        while payload.gate and len(outcomes) == 4 and not journal.has_gate(payload.gate):  # noqa: ASYNC110 - a file rings no bell
            await asyncio.sleep(0.02)
        error = ValueError("as planned") if ctx.attempt <= payload.fails else None
        run.__exit__(type(error) if error is not None else None, error, None)
        outcomes.append(error)
    return outcomes


@app.handler(timeout=60, concurrency=LIMIT)
async def limited(payload: Limited, ctx: Context) -> None:
    with journal.run(ctx):
        await asyncio.sleep(payload.seconds)
        while payload.gate and not journal.has_gate(payload.gate):  # noqa: ASYNC110 - a file rings no bell
            await asyncio.sleep(0.02)


@app.handler(timeout=60, result_ttl=60)
async def kept(payload: Kept, ctx: Context) -> int:
    with journal.run(ctx):
        try:
            while payload.gate and not journal.has_gate(payload.gate):  # noqa: ASYNC110 - a file rings no bell
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            if payload.careful:
                journal.open_gate(f"{payload.gate}-told")
                while not journal.has_gate(f"{payload.gate}-clean"):  # noqa: ASYNC110 - a file rings no bell
                    await asyncio.sleep(0.02)
            raise
        return ctx.delivery


@app.handler(timeout=60)
async def ticked(payload: Ticked, ctx: Context) -> None:
    headers = ctx.job.headers or {}
    with journal.run(ctx, schedule=headers["cron"], tick=headers["tick"]):
        await asyncio.sleep(payload.seconds)


YEAR = "0 0 1 1 *"
EVERY = 2
"""Seconds between ticks of the schedule "often"."""
if journal.has_gate("calendar"):  # a worker with schedules; without them the other scenes come to rest
    app.cron(f"*/{EVERY} * * * * *", Ticked(seconds=0.3), name="often")
    app.cron(YEAR, Ticked(seconds=0.3), name="last")
    app.cron(YEAR, Ticked(), name="skip", missed="skip")


@app.handler(max_attempts=4, timeout=60, backoff=Backoff(base=0.05, cap=0.5))
async def work(payload: Work, ctx: Context) -> None:
    with journal.run(ctx):
        if payload.bad:
            raise Discard("bad")
        if payload.seconds:
            await asyncio.sleep(payload.seconds)
        if ctx.job.hop < payload.snoozes:
            raise Snooze(0.05)
        if ctx.attempt <= payload.fails:
            raise ValueError("as planned")


@app.handler(timeout=None)
async def block(payload: Block, ctx: Context) -> None:
    with journal.run(ctx):
        time.sleep(payload.seconds)  # what a lease must survive


@app.handler(timeout=60)
def thread(payload: Thread, ctx: Context) -> None:
    with journal.run(ctx):
        time.sleep(payload.seconds)


@app.handler(timeout=0.5, backoff=Backoff(base=0.05, jitter=0))
def stuck(payload: Stuck, ctx: Context) -> None:
    with journal.run(ctx):
        if ctx.attempt == 1:
            threading.Event().wait()


@app.handler(timeout=0.5)
async def silent(payload: Deaf, ctx: Context) -> None:
    with journal.run(ctx):
        while ctx.delivery == 1 and ctx.job.hop == 0:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if ctx.stopping:
                    raise


@app.handler(timeout=None)
async def poison(payload: Poison, ctx: Context) -> None:
    with journal.run(ctx):
        os._exit(9)


@app.handler(timeout=None, backoff=Backoff(base=0.05, jitter=0))
def hungry(payload: Hungry, ctx: Context) -> None:
    with journal.run(ctx):
        if ctx.delivery > 1 or ctx.attempt > 1 or ctx.job.hop:
            return
        limits = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (32 << 20), limits[1]))
        try:
            for size in (1 << 20, 1 << 14, 1 << 9, 1 << 5):
                with suppress(MemoryError):
                    while True:
                        taken.append(bytearray(size))
            if payload.then == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if payload.then == "raise":
                time.sleep(0.5)  # the others have to do without too, meanwhile
                raise MemoryError
        finally:
            if payload.then == "raise":
                taken.clear()
                resource.setrlimit(resource.RLIMIT_AS, limits)


@app.handler(timeout=None)
async def talking(payload: Talking, ctx: Context) -> None:
    with journal.run(ctx):
        number = 0
        while not journal.has_gate(payload.gate):
            with suppress(ClaimLost):  # as a handler that takes no care
                await ctx.emit([ctx.delivery, number])
            if number % 20 == 0:
                ctx.log.info("talks", of=ctx.delivery, number=number)
            number += 1
            await asyncio.sleep(0.001)
        await ctx.emit([ctx.delivery, "end"])


@app.handler(timeout=None)
async def gated(payload: Gated, ctx: Context) -> None:
    with journal.run(ctx):
        while not journal.has_gate(payload.gate):  # noqa: ASYNC110 - a file rings no bell
            await asyncio.sleep(0.02)


if journal.active:
    witness.install()
    failpoints.install()
    stalls.watch(Path(os.environ["CRASH_DIR"]), os.environ["STREAMWORKER_WORKER_ID"])
