"""A fixed pool of tasks that runs claims, and the watch over their deadlines.

One line feeds the pool: a memory stream costs ten times as much as a hop through it, a task a job twice as much. A task
whose handler left a context variable behind is replaced, so that no job sees what another one set.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from time import monotonic
from typing import Final

import anyio

from streamworker.execute import Executor
from streamworker.job import Outcome, Raised, TimedOut
from streamworker.run import Run
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

WATCH_INTERVAL: Final = 0.1
"""Seconds between looks at the deadlines: timeouts are this precise, and cost no timer per job."""


class Line:
    """Runs that wait for a slot.

    An `asyncio.Queue` wakes a task for every run, which costs as much as running a handler that awaits nothing. Here
    one slot is called, and who was called calls two more as long as runs wait: jobs that await begin as fast as slots
    wake, and jobs that await nothing are all run by the first, while the others find the line empty.
    """

    def __init__(self) -> None:
        self._runs: deque[Run] = deque()
        self._sleepers: deque[asyncio.Future[None]] = deque()
        self._called = 0

    def put(self, run: Run) -> None:
        """Join the line."""
        self._runs.append(run)
        if not self._called:
            self._call(1)

    async def get(self) -> Run:
        """The first in line, as soon as there is one."""
        runs = self._runs
        while not runs:
            sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._sleepers.append(sleeper)
            try:
                await sleeper
            except asyncio.CancelledError:
                if not sleeper.cancelled():  # called, and cannot come: somebody else has to
                    self._called -= 1
                    self._call(1)
                raise
            self._called -= 1
            if len(runs) > 1:
                self._call(2)
        run = runs.popleft()
        if runs and not self._called:
            self._call(1)
        return run

    def clear(self) -> list[Run]:
        """Everyone who waits; nobody does afterwards."""
        waiting = list(self._runs)
        self._runs.clear()
        return waiting

    def _call(self, slots: int) -> None:
        wanted = min(slots, len(self._runs) - self._called)
        while wanted > 0 and self._sleepers:
            sleeper = self._sleepers.popleft()
            if not sleeper.done():  # else its task was cancelled, and has not run since
                sleeper.set_result(None)
                self._called += 1
                wanted -= 1


class Slots:
    """Runs claims.

    Args:
        count: tasks, and so jobs that run at once.
        executor: what a task does with a claim.
        finished: told of every run that has an outcome.
        isolate: asked before a run that is `Run.special`; False puts it aside for later.
        stuck: told of a thread that outlived its deadline by more than ``grace``.
        grace: seconds a thread may overrun its deadline before it counts as stuck.
    """

    def __init__(
        self,
        count: int,
        executor: Executor,
        *,
        finished: Callable[[Run], None],
        isolate: Callable[[Run], bool],
        stuck: Callable[[Run], None],
        grace: float,
    ) -> None:
        self._count = count
        self._finished = finished
        self._isolate = isolate
        self._stuck = stuck
        self._grace = grace
        self.call: Callable[[Run], Awaitable[Outcome]] = executor.call
        """Runs a prepared run to its outcome; replaced, before `open`, where somebody watches."""
        self.prepare: Callable[[Run], None] = executor.prepare
        """Makes a run ready for its handler; replaced, before `open`, where that is done earlier."""
        self._line = Line()
        self._pristine = copy_context()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._closing = False
        self.running: set[Run] = set()
        """Runs whose handler has begun and not ended."""

    def put(self, run: Run) -> None:
        """Hand over a run; the next free task takes it."""
        self._line.put(run)

    def open(self) -> None:
        """Start the tasks. They are in no task group: one that a handler keeps from ending must not keep the worker."""
        self._pristine = copy_context()
        for _ in range(self._count):
            self._spawn()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self, within: float) -> list[Run]:
        """End the tasks; returns the runs whose handlers did not end ``within`` seconds."""
        self._closing = True
        if self._watcher is not None:
            self._watcher.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=within)
        return [run for run in self.running if run.task in self._tasks]

    def _spawn(self) -> None:
        task = asyncio.create_task(self._slot(), context=self._pristine.copy())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A slot gives way to a fresh one, whatever it ended of."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("slot_failed", error=str(error), exc_info=error)
        if not self._closing:
            self._spawn()

    def drain_queue(self) -> list[Run]:
        """Runs that no task has taken yet; they are no longer waiting afterwards."""
        return self._line.clear()

    async def _slot(self) -> None:
        call, get, running, finished = self.call, self._line.get, self.running, self._finished
        prepare, task = self.prepare, asyncio.current_task()
        pristine = copy_context()
        while True:
            run = await get()
            if run.facts is None and run.outcome is None:
                prepare(run)
            if run.outcome is None:
                if run.special and not self._isolate(run):
                    continue
                running.add(run)
                run.task = task
                try:
                    outcome = await call(run)
                except asyncio.CancelledError as error:
                    if self._closing:
                        raise
                    outcome = self._cancelled_itself(error)
                finally:
                    running.discard(run)
                if run.outcome is not None:
                    continue  # given back while it could not be stopped
                run.outcome = outcome
            finished(run)
            if _changed(pristine):
                return

    @staticmethod
    def _cancelled_itself(error: asyncio.CancelledError) -> Raised:
        """A handler that cancelled the task it runs in has failed; the task goes on."""
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()
        return Raised(error)

    async def _watch(self) -> None:
        again: dict[Run, float] = {}
        while True:
            await anyio.sleep(WATCH_INTERVAL)
            now = monotonic()
            for run in list(self.running):
                if not run.overdue(now) or run.deadline is None or run.started is None:
                    continue
                if run.in_thread:
                    if run.context is not None and run.context.told != TimedOut.__name__:
                        run.cancel(TimedOut(run.deadline - run.started))
                    if now > run.deadline + self._grace and not run.stuck:
                        run.stuck = True
                        self._stuck(run)
                elif again.get(run, 0.0) <= now:
                    # Once a second, because a handler may swallow a cancellation and go on.
                    again[run] = now + 1.0
                    run.cancel(TimedOut(run.deadline - run.started))
            if again:
                again = {run: at for run, at in again.items() if run in self.running}


def _changed(pristine: Context) -> bool:
    """Whether a job left a context variable behind; unchanged contexts share one tree, which makes this cheap."""
    try:
        return copy_context() != pristine
    except Exception:  # noqa: BLE001 - values of other people are compared; one that cannot be is not what we began with
        return True
