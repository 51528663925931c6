"""What a worker runs: a task for each job, as many at once as CONCURRENCY allows, and the watch over deadlines."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from time import monotonic
from typing import Any, Final, TypeAlias

import anyio

from streamworker.execution import Execution
from streamworker.job import Interrupted, Outcome, TimedOut
from streamworker.telemetry.logs import get_logger
from streamworker.worker.executor import Ended, Executor
from streamworker.worker.job_task import JobTask

log = get_logger("streamworker.worker")

WATCH_INTERVAL: Final = 0.1
"""Seconds between looks at the deadlines: timeouts are this precise, and cost no timer per job."""
STARTS: Final = 100
"""Most jobs that are started before the event loop turns."""
TURN: Final = 0.002
"""Seconds after which no other job is started before the event loop turns: first steps of handlers can be long."""

Call: TypeAlias = Callable[[Execution, Ended], Coroutine[Any, Any, Outcome]]


class JobTasks:
    """Starts runs, each in a task and a context of its own, and minds their deadlines.

    A task begins at once where Python can do that (3.12), so that a handler that awaits nothing costs no turn of the
    event loop. Task factories are not asked: a job's task is a `JobTask` whatever the process uses elsewhere.

    Args:
        limit: jobs that run at once.
        executor: prepares runs.
        call: what a task does with a run; `Executor.call` unless given.
        finished: told of every run that has an outcome.
        admit: asked before a run that is `Execution.special`; False puts it aside for later.
        stuck: told of a run that goes on ``grace`` seconds after it should have ended.
        grace: seconds a handler may overrun its deadline, or go on after its claim was lost, before it counts as stuck.
    """

    def __init__(
        self,
        limit: int,
        executor: Executor,
        *,
        call: Call | None = None,
        finished: Callable[[Execution], None],
        admit: Callable[[Execution], bool],
        stuck: Callable[[Execution], None],
        grace: float,
    ) -> None:
        self._limit = limit
        self._prepare = executor.prepare
        self._generators = executor.generators
        self._call = call or executor.call
        self._finished = finished
        self._admit = admit
        self._stuck = stuck
        self._grace = grace
        self._waiting: deque[Execution] = deque()
        self._scheduled = True  # until it is open
        self._closed = False
        self._pristine = copy_context()
        self._loop: asyncio.AbstractEventLoop
        self._watcher: asyncio.Task[None] | None = None
        self.running: set[Execution] = set()
        """Runs whose handler has begun and not ended."""

    def open(self) -> None:
        """Start what waits; jobs run in copies of the context that this is called in."""
        self._loop = asyncio.get_running_loop()
        self._pristine = copy_context()
        self._generators.open(self._loop)
        self._watcher = asyncio.create_task(self._watch())
        self._schedule()

    async def close(self, within: float) -> list[Execution]:
        """End the tasks; returns the runs whose handlers did not end ``within`` seconds."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        tasks = {run.task: run for run in self.running if run.task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=within)
        self._generators.close()
        return [run for task, run in tasks.items() if not task.done()]

    def put(self, run: Execution) -> None:
        """Take a run in: it starts with the next turn of the event loop, if no more than the limit run."""
        self._waiting.append(run)
        if not self._scheduled:
            self._schedule()

    def abandon_waiting(self) -> list[Execution]:
        """Runs that have not been started; they do not wait any more afterwards."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def _schedule(self) -> None:
        self._scheduled = True
        # In a copy: what decoding a payload does to its context must not reach the contexts of jobs.
        self._loop.call_soon(self._turn, context=self._pristine.copy())

    def _turn(self) -> None:
        """Start what waits, as much as one turn of the event loop may take."""
        if self._closed:
            return
        waiting, running, limit = self._waiting, self.running, self._limit
        until = monotonic() + TURN
        try:
            for _ in range(STARTS):
                if not waiting or len(running) >= limit:
                    return
                run = waiting.popleft()
                if run.facts is None and run.outcome is None:
                    self._prepare(run)
                if run.outcome is not None:
                    self._finished(run)
                elif not run.special or self._admit(run):
                    self._start(run)
                    if run.started is not None and run.started > until:
                        return
        finally:
            self._scheduled = False
            if waiting and len(running) < limit:
                self._schedule()

    def _start(self, run: Execution) -> None:
        name = run.registration.kind if run.registration is not None else None
        if sys.version_info >= (3, 12):
            task = JobTask(
                self._call(run, self._ended),
                loop=self._loop, name=name, context=self._pristine.copy(), eager_start=True,
            )  # fmt: skip
            if not task.done():
                run.task = task
                self.running.add(run)
        else:
            context = self._pristine.copy()
            run.task = task = JobTask(self._call(run, self._ended), loop=self._loop, name=name, context=context)
            task.context = context
            run.started = monotonic()  # it can be cancelled from now on
            self.running.add(run)

    def _ended(self, run: Execution, outcome: Outcome) -> None:
        """Called by the task of a run, last."""
        if run.task is not None:
            self.running.discard(run)
        if run.outcome is None:  # else it was given back while it could not be stopped
            run.outcome = outcome
            self._finished(run)
        if self._waiting and not self._scheduled:
            self._schedule()

    async def _watch(self) -> None:
        again: dict[Execution, float] = {}
        while True:
            await anyio.sleep(WATCH_INTERVAL)
            now = monotonic()
            for run in list(self.running):
                since = self._overruns_since(run, now)
                if since is None:
                    continue
                cause = TimedOut(since - (run.started or since)) if run.overdue(now) else run.cause
                # Again once a second, because a handler may swallow a cancellation and go on.
                if cause is not None and again.get(run, 0.0) <= now:
                    again[run] = now + 1.0
                    run.cancel(cause)
                if now > since + self._grace and not run.stuck:
                    run.stuck = True
                    self._stuck(run)
            if again:
                again = {run: at for run, at in again.items() if run in self.running}

    @staticmethod
    def _overruns_since(run: Execution, now: float) -> float | None:
        """Since when a run should have ended: its deadline, or when it was told that its claim is lost."""
        if run.overdue(now):
            return run.deadline
        return run.told if isinstance(run.cause, Interrupted) else None
