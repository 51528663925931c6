"""Handlers with process=True: what goes in and comes out, and that they are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from streamworker import Handlers, Retry, Snooze
from streamworker.errors import ConfigurationError, ProcessDied
from streamworker.execution import CANCELLED
from streamworker.job import Cancelled, Interrupted, Ok, Raised, TimedOut
from streamworker.redact import describe
from streamworker.worker.calls import HandlerError
from tests import forkserver
from tests.conftest import eventually
from tests.unit import process_stage
from tests.unit.process_stage import Work, stage

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_main_module(monkeypatch):
    """Processes import the main module as well, which is pytest's."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)


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
        turned, began = process_stage.TURNS[0], time.monotonic()
        await eventually(lambda: gone(pid), 20, 0.002)
        assert time.monotonic() - began < 1 + 1  # its timeout, and a second
        assert process_stage.TURNS[0] - turned > 10
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


async def test_it_ends_with_its_worker_whatever_it_computes(tmp_path):
    words, module = [str(tmp_path / "pid")], "tests.unit.process_stage"
    worker = forkserver.forked(words, cwd=ROOT, env=os.environ, module=module, stderr=subprocess.DEVNULL)
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
