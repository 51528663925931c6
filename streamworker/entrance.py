"""What a special run has to pass before its handler is called.

Jobs with a ``run_at`` wait for the server's word that it has come, suspects run alone, kinds with limits wait for their
turn, and those that are called for several jobs wait for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from time import time
from typing import Protocol

import anyio

from streamworker import codec
from streamworker.batches import Batches, Carrier
from streamworker.errors import Unreachable
from streamworker.gate import Gate
from streamworker.handlers import Handlers
from streamworker.job import Claim, Postponed
from streamworker.limits import Limiting
from streamworker.pause import Pause
from streamworker.run import Run
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")


class Asked(Limiting, Protocol):
    """What is asked of the broker before a run may start."""

    async def clock(self, queue: str) -> float:
        """See `Broker.clock`."""


class DueCheck:
    """Lets runs with a ``run_at`` through when it has come by the server's clock; this machine's may be wrong.

    Group commit, as at the gate: while one question is on its way the next gathers.

    Args:
        broker: asked.
        put: starts a run that may run; it is prepared again then.
        finished: told of runs that have an outcome: it is not their time yet.
    """

    def __init__(self, broker: Asked, put: Callable[[Run], None], finished: Callable[[Run], None]) -> None:
        self._broker, self._put, self._finished = broker, put, finished
        self._waiting: list[Run] = []
        self._wake = asyncio.Event()
        self._closing = anyio.Event()
        self._give_up_at = float("inf")

    def may_run(self, run: Run) -> bool:
        """Whether the run need not be asked about; if it must, it waits here until it gets an answer."""
        if run.due or run.reading is None or run.reading.run_at is None or isinstance(run, Carrier):
            return True
        self._waiting.append(run)
        self._wake.set()
        return False

    def abandon_waiting(self) -> list[Run]:
        """Runs that wait for an answer; they do not wait any more afterwards."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def close(self, within: float) -> None:
        """End the loop when nothing waits, at the latest in ``within`` seconds."""
        self._give_up_at = anyio.current_time() + within
        self._closing.set()
        self._wake.set()

    async def run(self) -> None:
        """Ask until closed; an error is followed by a pause, and the question asked again."""
        pause = Pause(longest=5.0)
        while self._waiting or not self._closing.is_set():
            if not self._waiting:
                await self._wake.wait()
                self._wake.clear()
                continue
            try:
                await self._turn(self._waiting[0].claim.queue)
                pause.reset()
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; what waits is asked about again
                if not isinstance(error, Unreachable):
                    log.error("due_check_failed", jobs=len(self._waiting), error=str(error))
                await pause.wait(self._closing, least=0.2)
            if anyio.current_time() > self._give_up_at:
                return

    async def _turn(self, queue: str) -> None:
        """One question, about all runs of one queue that wait when it is asked."""
        asked = {run for run in self._waiting if run.claim.queue == queue}
        now = await self._broker.clock(queue)
        mine = [run for run in self._waiting if run in asked]  # others were handed back meanwhile
        self._waiting = [run for run in self._waiting if run not in asked]
        for run in mine:
            left = ((codec.when(run.reading) if run.reading is not None else None) or 0.0) - now
            if left > 0 and run.outcome is None:
                run.outcome = Postponed(time() + left)  # parking counts from now on, by whatever this clock shows
            if run.outcome is not None:  # or its claim was lost
                self._finished(run)
                continue
            run.due, run.facts = True, None
            self._put(run)


class Entrance:
    """Asked before a run starts that is `Run.special`; costs nothing where there are none.

    Args:
        broker: knows about limits, and what time it is.
        handlers: whether any kind has one, or is called for several jobs at once.
        limit: jobs that the worker runs at once.
        isolate: asked before a suspect runs; False puts it aside for later.
        put: starts a run.
        finished: told of runs that have an outcome without having run.
    """

    def __init__(
        self,
        broker: Asked,
        handlers: Handlers[object],
        *,
        limit: int,
        isolate: Callable[[Run], bool],
        put: Callable[[Run], None],
        finished: Callable[[Run], None],
    ) -> None:
        self._isolate = isolate
        limited = any(registration.quota is not None for registration in handlers.registrations)
        gathering = any(registration.together is not None for registration in handlers.registrations)
        self._finished = finished
        self._due = DueCheck(broker, put, finished)
        self._gate = Gate(broker, put, finished) if limited else None
        self._batches = Batches(limit, put, finished) if gathering else None
        self.kept: Callable[[Collection[Claim]], None] | None = self._gate.retain if self._gate is not None else None
        """What the lease thread renews along with claims."""

    def may_run(self, run: Run) -> bool:
        """Whether a prepared special run may run now; if not, it waits here or elsewhere, and comes again."""
        if not self._due.may_run(run):
            return False
        if run.suspect and not self._isolate(run):
            return False
        if self._gate is not None and not self._gate.may_run(run):
            return False
        return self._batches is None or self._batches.may_run(run)

    def left(self, run: Run) -> bool:
        """A special run has its outcome. True if it stood for others, which are finished by that, each for itself."""
        if isinstance(run, Carrier):
            for item in run.disperse():
                self._finished(item)
            return True
        if self._gate is not None:
            self._gate.leave(run)
        return False

    def abandon_waiting(self) -> list[Run]:
        """Runs that wait here; they do not wait any more afterwards."""
        waiting = self._due.abandon_waiting()
        waiting += self._gate.abandon_waiting() if self._gate is not None else []
        return waiting + (self._batches.abandon_waiting() if self._batches is not None else [])

    async def run(self) -> None:
        """Run until closed."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._due.run)
            if self._gate is not None:
                group.start_soon(self._gate.run)

    def close(self, within: float) -> None:
        """End it when all is given back, at the latest in ``within`` seconds."""
        self._due.close(within)
        if self._gate is not None:
            self._gate.close(within)
