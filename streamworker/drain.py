"""Shutdown: let running jobs finish, hand the rest back uncharged, leave nothing pending under our name."""

from __future__ import annotations

import time
from time import monotonic
from typing import Final, Protocol

import anyio

from streamworker.broker import Broker, Ending
from streamworker.endings import ending
from streamworker.errors import HandBackFailed, Unreachable
from streamworker.execute import Executor
from streamworker.executions import Executions
from streamworker.holdings import Holdings
from streamworker.job import Interrupted, Settled, TimedOut
from streamworker.run import Run
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

HAND_BACK: Final = 5.0
"""Seconds within which what was handed back must be settled."""
UNWIND: Final = 2.0
"""Seconds a cancelled handler has to clean up after itself."""
CLEAN_UP: Final = 10.0
"""Seconds after the grace by which a worker has ended, whatever users' code does."""
HURRIED: Final = 5.0
"""Seconds after a second signal by which it has."""
LAST_CALL: Final = 1.0
"""Seconds that what was told to end, and should have, is given once more."""
SECOND_THOUGHT: Final = 0.2
"""Seconds before a server that did not let us go is asked once more."""
SHUTDOWN: Final = Interrupted("the worker shut down")


class Draining(Protocol):
    """What draining needs of a worker."""

    def finish(self, run: Run) -> None:
        """Make room for another run, and settle."""

    def abandon_waiting(self) -> list[Run]:
        """Runs that have not been started."""

    @property
    def executor(self) -> Executor:
        """Prepares runs."""


class Shutdown:
    """When a worker was told to stop, and by when it must be over.

    Args:
        grace: seconds running jobs may take to finish.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self.began: float | None = None
        """When it was told (time.monotonic)."""
        self.hurried: float | None = None
        """When it was told again."""
        self.leaving: float | None = None
        """Since when everything is handed back, and only what was opened is closed."""
        self.cut_short = False
        """Running jobs were handed back: nothing of them may go on once the worker has ended."""

    def begin(self) -> None:
        """It was told to stop; a second call changes nothing."""
        self.began = self.began or monotonic()

    def hurry(self) -> None:
        """It was told again."""
        self.hurried = self.hurried or monotonic()

    def leave(self) -> None:
        """Everything is handed back."""
        self.leaving = self.leaving or monotonic()

    def since(self, now: float) -> float:
        """Seconds since it was told."""
        return now - (self.began or now)

    def overdue(self, now: float) -> bool:
        """Closing takes too long: users' code does not end. While jobs are handed back it is the servers that count."""
        return self.leaving is not None and now > max(self.end() - LAST_CALL, self.leaving + LAST_CALL)

    def end(self, *, began: float | None = None, hurried: float | None = None) -> float:
        """By when it must be over (time.monotonic); infinity while nothing stops it.

        Args:
            began: when it was told, if the event loop does not know of it yet.
            hurried: the same for the second time.
        """
        told = [at for at in (self.began, began) if at is not None]
        again = [at for at in (self.hurried, hurried) if at is not None]
        ends = [min(told) + self._grace + CLEAN_UP] if told else []
        return min([*ends, *([min(again) + HURRIED] if again else [])], default=float("inf"))


async def drain(worker: Draining, executions: Executions, holdings: Holdings, grace: float, hurry: anyio.Event) -> bool:
    """Wait for running jobs, then cancel and hand back what is left; returns whether anything was.

    Args:
        worker: whose runs these are.
        executions: where they run.
        holdings: what is held.
        grace: seconds running jobs may take to finish.
        hurry: set by a second signal: no more waiting.
    """
    for run in [*executions.abandon_waiting(), *worker.abandon_waiting()]:
        if run.outcome is None:
            worker.executor.prepare(run)
        give_back(worker, run)
    async with anyio.create_task_group() as group:

        async def wait_no_more() -> None:
            await hurry.wait()
            group.cancel_scope.cancel()

        group.start_soon(wait_no_more)
        with anyio.move_on_after(grace):
            while any(not run.stuck for run in executions.running):
                await holdings.changed(0.25)
        group.cancel_scope.cancel()
    cut_short = list(executions.running)
    for run in cut_short:
        run.cancel(SHUTDOWN)
    with anyio.move_on_after(UNWIND):
        while any(not run.in_thread and not run.stuck for run in executions.running):
            await holdings.changed(0.05)
    for run in list(executions.running):  # threads, and handlers that cannot be cancelled: the process ends under them
        give_back(worker, run)
    return bool(cut_short)


def give_back(worker: Draining, run: Run) -> None:
    """Settle a run that did not come to an end here; one that can have no other end (undecodable) gets that."""
    if run.outcome is None:
        # A thread past its deadline is charged, or it would stick worker after worker for ever.
        limits = run.facts.limits if run.facts is not None and run.overdue(monotonic()) else None
        run.outcome = TimedOut(limits.timeout) if limits is not None and limits.timeout is not None else SHUTDOWN
    worker.finish(run)


async def end_reading(broker: Broker, ended: anyio.Event) -> None:
    """End the blocking read; told again and again, since it may begin just after it was told.

    Args:
        broker: whose.
        ended: set when nothing is claimed any more.
    """
    while not ended.is_set():
        try:
            await broker.interrupt()
        except Exception as error:  # noqa: BLE001 - then the read ends by its own timeout
            log.warning("unblock_failed", error=str(error))
        with anyio.move_on_after(0.05):
            await ended.wait()


async def take_leave(broker: Broker, executor: Executor, holdings: Holdings) -> None:
    """Leave nothing behind under our name: no pending entry, no consumer, no heartbeat.

    Raises:
        HandBackFailed: something is pending under our name still.
        StreamworkerError: the server would not, and not at the second attempt either.
    """
    try:
        await _hand_back_strays(broker, executor, holdings)
        gone = await broker.leave()
    except Unreachable:
        # A connection that was idle may be the one that a failover left behind; the next one leads to the new master.
        await anyio.sleep(SECOND_THOUGHT)
        await _hand_back_strays(broker, executor, holdings)
        gone = await broker.leave()
    if not gone or len(holdings):
        raise HandBackFailed("some jobs are still pending under this worker's name")


async def _hand_back_strays(broker: Broker, executor: Executor, holdings: Holdings) -> None:
    """What is pending under our name still is settled: what is held by its outcome, what is not goes back."""
    while runs := await _pending_runs(broker, executor, holdings):
        endings = [run.ending or ending(run, now=time.time(), jitter=0.5) for run in runs]
        refused = await _settled(broker, holdings, runs, endings)
        if refused:
            # What cannot be parked or buried where it belongs goes back to where it came from, at once and uncharged.
            for run in refused:
                run.outcome = SHUTDOWN
            endings = [ending(run, now=time.time(), jitter=0.5) for run in refused]
            if await _settled(broker, holdings, refused, endings):
                return


async def _pending_runs(broker: Broker, executor: Executor, holdings: Holdings) -> list[Run]:
    runs = []
    for claim in await broker.strays(()):
        run = holdings.find(claim) or Run(claim)
        if run.outcome is None:
            executor.prepare(run)
        if run.outcome is None:
            run.outcome = SHUTDOWN
        runs.append(run)
    return runs


async def _settled(broker: Broker, holdings: Holdings, runs: list[Run], endings: list[Ending]) -> list[Run]:
    """Settle; returns the runs that the server refused to store."""
    refused = []
    for run, answer in zip(runs, await broker.settle(endings), strict=True):
        if answer is Settled.REFUSED:
            refused.append(run)
        else:
            holdings.forget(run)
    return refused
