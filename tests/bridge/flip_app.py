"""The app of the flip: every run leaves two lines in the file FLIP_RUNS, each one write(2) with O_APPEND."""

from __future__ import annotations

import asyncio
import json
import os
import time

from streamworker import App, Backoff, Context, Payload, Snooze

app = App()
_fd = (
    os.open(os.environ["FLIP_RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if "FLIP_RUNS" in os.environ else -1
)


class Work(Payload, kind="work", queue="q"):
    """One job.

    Attributes:
        n: its number.
        seconds: how long it takes.
        fails: attempts that raise before one succeeds.
        snoozes: hops that snooze before one runs.
        child: enqueues another, numbered ``-n``, in the mode its worker has.
    """

    n: int
    seconds: float = 0.0
    fails: int = 0
    snoozes: int = 0
    child: bool = False


@app.handler(max_attempts=5, timeout=60, backoff=Backoff(base=0.25, cap=2))
async def work(payload: Work, ctx: Context) -> None:
    facts = {
        "n": payload.n, "worker": ctx.worker_id, "mode": os.environ["STREAMWORKER_MODE"], "delivery": ctx.delivery,
        "attempt": ctx.attempt, "hop": ctx.job.hop, "id": ctx.job.id,
    }  # fmt: skip
    _write("started", facts)
    try:
        await asyncio.sleep(payload.seconds)
        if ctx.job.hop < payload.snoozes:
            raise Snooze(0.3)
        if ctx.attempt <= payload.fails:
            raise ValueError("as planned")
        if payload.child:
            # A deduplication key: should this run be repeated, the child is not.
            await app.enqueue(Work(n=-payload.n), key=f"child-{payload.n}")
    except BaseException as error:
        _write("cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__, facts)
        raise
    _write("finished", facts)


def _write(what: str, facts: dict[str, object]) -> None:
    os.write(_fd, (json.dumps({**facts, "what": what, "mono": time.monotonic()}) + "\n").encode())
