"""Handlers with process=True: what goes in and comes out, and that they are killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamworker import Handlers, Payload, ProcessContext, Retry, Snooze
from streamworker.context import Shared
from streamworker.errors import ConfigurationError, ProcessDied
from streamworker.execution import CANCELLED, Execution
from streamworker.job import Cancelled, Claim, Interrupted, Ok, Outcome, Raised, TimedOut
from streamworker.redact import describe
from streamworker.worker.calls import HandlerError
from streamworker.worker.executor import Executor
from streamworker.worker.tasks import JobTasks
from tests.conftest import eventually

pytestmark = pytest.mark.anyio


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
        self.stuck: list[Execution] = []
        self.tasks = JobTasks(10, self.executor, self, stuck=self.stuck.append, grace=5)  # type: ignore[arg-type]

    def finish(self, run: Execution) -> None:
        self.ended.append(run)

    def put(self, what: str, at: Path | str = "") -> Execution:
        return self.put_kind("work", what=what, at=str(at))

    def put_kind(self, kind: str, **payload: Any) -> Execution:
        body = json.dumps({"id": payload.get("what", kind), "kind": kind, "payload": payload}).encode()
        run = Execution(Claim("q", "normal", "stream:{q}", b"%d-0" % id(body), 1, body, b"e"))
        self.executor.prepare(run)
        self.tasks.put(run)
        return run

    async def outcome(self, run: Execution) -> Outcome | None:
        await eventually(lambda: run in self.ended, 20, 0.002)
        return run.outcome


@asynccontextmanager
async def stage(timeout: float | None = 60) -> AsyncIterator[Stage]:
    made = Stage(timeout)
    made.tasks.open()
    try:
        yield made
    finally:
        await made.tasks.close(5)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return (
        Path(f"/proc/{pid}/stat").exists()
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    )


async def begun(at: Path) -> int:
    return int(await eventually(lambda: at.exists() and at.read_text(), 20, 0.002))


async def test_a_handler_runs_in_another_process_which_is_used_again():
    async with stage() as on:
        first = await on.outcome(on.put("pid"))
        assert isinstance(first, Ok) and first.value != os.getpid()
        assert await on.outcome(on.put("facts")) == Ok(["facts", 1, False, "w", True]), "it knows its job"
        assert await on.outcome(on.put("unsendable")) == Ok(), "what it returned is lost, and the job is done"
        assert await on.outcome(on.put("signals")) == Ok("not for me"), "signals to the whole group are the worker's"
        assert await on.outcome(on.put("pid")) == first
        died = await on.outcome(on.put("die"))
        assert isinstance(died, Raised) and isinstance(died.error, ProcessDied), "the job's failure"
        second = await on.outcome(on.put("pid"))
        assert isinstance(second, Ok) and second != first


async def test_errors_come_back_as_they_are_and_odd_ones_as_text():
    async with stage() as on:
        errors = []
        for what in ("raise", "retry", "odd", "exit", "snooze"):
            outcome = await on.outcome(on.put(what))
            assert isinstance(outcome, Raised)
            errors.append(outcome.error)
        assert isinstance(errors[0], ValueError) and str(errors[0]) == "no such number"
        assert "in computes" in str(errors[0].__cause__), "the traceback of the process"
        assert isinstance(errors[1], Retry) and errors[1].after == 7
        assert isinstance(errors[2], HandlerError) and describe(errors[2]).endswith("Odd: of its own")
        assert isinstance(errors[3], SystemExit)
        assert isinstance(errors[4], Snooze) and errors[4].after == 5


async def test_code_that_never_ends_is_killed_at_the_deadline(tmp_path):
    async with stage(timeout=0.5) as on:
        run = on.put("for ever", tmp_path / "pid")
        pid = await begun(tmp_path / "pid")
        assert isinstance(await on.outcome(run), TimedOut)
        assert isinstance(await on.outcome(on.put("pid")), Ok)
        await eventually(lambda: gone(pid), 10)
        assert not on.stuck


async def test_code_that_never_ends_in_c_is_dead_within_a_second_and_its_neighbours_notice_nothing(tmp_path):
    """It holds its interpreter's lock. A neighbour in another process, and one on the event loop, outlive it."""
    until = str(tmp_path / "until")
    async with stage(timeout=1) as on:
        neighbours = [
            on.put_kind("neighbour", at=str(tmp_path / "other"), until=until),
            on.put_kind("turns", until=until),
        ]
        other = await begun(tmp_path / "other")
        run = on.put("for ever", tmp_path / "pid")
        pid = await begun(tmp_path / "pid")
        turned, began = TURNS[0], time.monotonic()
        await eventually(lambda: gone(pid), 20, 0.002)
        assert time.monotonic() - began < 1 + 1  # its timeout, and a second
        assert TURNS[0] - turned > 10
        assert isinstance(await on.outcome(run), TimedOut)
        assert not gone(other)
        (tmp_path / "until").touch()
        assert [await on.outcome(each) for each in neighbours] == [Ok(other), Ok("ended")]
        assert not on.stuck


@pytest.mark.parametrize("cause", [CANCELLED, pytest.param(Interrupted("shutdown"), marks=pytest.mark.all)])
async def test_a_cancelled_job_is_killed(tmp_path, cause):
    async with stage(timeout=None) as on:
        run = on.put("for ever", tmp_path / "pid")
        pid = await begun(tmp_path / "pid")
        run.cancel(cause)
        assert isinstance(await on.outcome(run), Cancelled | Interrupted)
        await eventually(lambda: gone(pid), 5)


async def test_progress_reaches_the_worker():
    async with stage() as on:
        run = on.put("progress")
        await eventually(lambda: run.context is not None and run.context.reported is not None, 20, 0.002)
        assert run.context is not None and run.context.reported is not None
        assert (run.context.reported.done, run.context.reported.total, run.context.reported.note) == (3, 4, "nearly")
        run.cancel(CANCELLED)
        assert await on.outcome(run) == Cancelled()


WORKER = """
import asyncio, sys
from tests.unit.test_processes import stage
async def main():
    async with stage(timeout=None) as on:
        await on.outcome(on.put("for ever", sys.argv[1]))
asyncio.run(main())
"""


async def test_it_ends_with_its_worker_whatever_it_computes(tmp_path):
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "pid")])
    try:
        pid = await begun(tmp_path / "pid")
    finally:
        worker.kill()
        worker.wait()
    await eventually(lambda: gone(pid), 10)


def test_what_another_process_cannot_import_is_refused():
    handlers: Handlers[Any] = Handlers()

    def inside(payload: Work) -> None: ...

    with pytest.raises(ConfigurationError, match="define .*inside in a module"):
        handlers.handler(process=True)(inside)

    async def waits(payload: Work) -> None: ...

    with pytest.raises(ConfigurationError, match="is async"):
        handlers.handler(process=True)(waits)  # type: ignore[call-overload]

    def several(payloads: list[Work]) -> None: ...

    with pytest.raises(ConfigurationError, match="takes batches"):
        handlers.handler(process=True, batch=3)(several)  # type: ignore[call-overload]
