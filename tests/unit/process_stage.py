"""Handlers with process=True, and the part of a worker that calls them.

Each of their processes imports this module: it takes no more of the tests along than it must. As a program it is a
worker whose handler never ends: ``python -m tests.unit.process_stage PATH`` writes the pid of its process there.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from streamworker import Handlers, Payload, ProcessContext, Retry, Snooze
from streamworker.context import Shared
from streamworker.execution import Execution
from streamworker.job import Claim, Outcome
from streamworker.worker.executor import Executor
from streamworker.worker.tasks import JobTasks


class Work(Payload, kind="work", queue="q"):
    what: str = ""
    at: str = ""


class Odd(Exception):
    """Cannot be made anew from its arguments."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def for_ever() -> None:
    """Holds the interpreter lock of its process, in C."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def signalled() -> str:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    return "not for me"


def raises(error: BaseException) -> None:
    raise error


DOES: dict[str, Any] = {
    "pid": os.getpid,
    "for ever": for_ever,
    "raise": lambda: raises(ValueError("no such number")),
    "retry": lambda: raises(Retry(7, "later")),
    "snooze": lambda: raises(Snooze(5)),
    "odd": lambda: raises(Odd(reason="of its own")),
    "exit": lambda: sys.exit(3),
    "die": killed,
    "unsendable": object,
    "signals": signalled,
}


def computes(payload: Work, ctx: ProcessContext) -> Any:
    """A handler that does what its payload says."""
    if payload.at:
        Path(payload.at).write_text(str(os.getpid()))
    if payload.what == "facts":
        return [ctx.job.id, ctx.attempt, ctx.last_attempt, ctx.worker_id, ctx.deadline is not None]
    if payload.what == "progress":
        ctx.progress(3, 4, "nearly")
        time.sleep(60)
    return DOES[payload.what]()


class Neighbour(Payload, kind="neighbour", queue="q"):
    at: str
    until: str


class Turns(Payload, kind="turns", queue="q"):
    until: str


def waits(payload: Neighbour) -> int:
    """A neighbour in a process of its own."""
    Path(payload.at).write_text(str(os.getpid()))
    while not Path(payload.until).exists():
        time.sleep(0.01)
    return os.getpid()


TURNS = [0]


async def turns(payload: Turns) -> str:
    """A neighbour on the event loop."""
    while not os.path.exists(payload.until):  # noqa: ASYNC240, PTH110 - a moment
        await asyncio.sleep(0.01)
        TURNS[0] += 1
    return "ended"


class Stage:
    def __init__(self, timeout: float | None) -> None:
        handlers: Handlers[Any] = Handlers()
        handlers.handler(process=True, timeout=timeout, max_attempts=9)(computes)
        handlers.handler(process=True, timeout=60)(waits)
        handlers.handler(timeout=60)(turns)
        self.executor = Executor(handlers, Shared("w", None))
        self.ended: list[Execution] = []
        self._news = asyncio.Event()
        self.stuck: list[Execution] = []
        self.tasks = JobTasks(10, self.executor, self, stuck=self.stuck.append, grace=5)  # type: ignore[arg-type]

    def finish(self, run: Execution) -> None:
        self.ended.append(run)
        self._news.set()

    def put(self, what: str, at: Path | str = "") -> Execution:
        return self.put_kind("work", what=what, at=str(at))

    def put_kind(self, kind: str, **payload: Any) -> Execution:
        body = json.dumps({"id": payload.get("what", kind), "kind": kind, "payload": payload}).encode()
        run = Execution(Claim("q", "normal", "stream:{q}", b"%d-0" % id(body), 1, body, b"e"))
        self.executor.prepare(run)
        self.tasks.put(run)
        return run

    async def outcome(self, run: Execution) -> Outcome | None:
        async with asyncio.timeout(20):
            while run not in self.ended:
                self._news.clear()
                await self._news.wait()
        return run.outcome


@asynccontextmanager
async def stage(timeout: float | None = 60) -> AsyncIterator[Stage]:
    made = Stage(timeout)
    made.tasks.open()
    try:
        yield made
    finally:
        await made.tasks.close(5)


async def never_ends(path: str) -> None:
    """A worker."""
    async with stage(timeout=None) as on:
        await on.outcome(on.put("for ever", path))


if __name__ == "__main__":
    from tests.unit import process_stage  # by its name, as processes import it

    asyncio.run(process_stage.never_ends(sys.argv[1]))
