"""JobTasks: an asyncio task for each job, with its deadline. Completion: the stage after it."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from time import monotonic
from typing import Final

import anyio

from streamworker.execution import EXPIRED, Execution
from streamworker.job import Interrupted, Outcome, Raised, TimedOut
from streamworker.telemetry.logs import get_logger
from streamworker.worker import signals
from streamworker.worker.batching import BatchExecution
from streamworker.worker.executor import Executor
from streamworker.worker.inflight import InFlight, Permits
from streamworker.worker.job_task import JobTask
from streamworker.worker.observers import ObserverDispatch
from streamworker.worker.recorder import Recorder
from streamworker.worker.settler import Settler

log = get_logger("streamworker.worker")

WATCH_INTERVAL: Final = 0.1
"""Seconds between looks at the deadlines: timeouts are this precise, and cost no timer per job."""
OVERTAKEN: Final = Interrupted("it was claimed ahead of running jobs that go on for longer than the jobs before them")
STARTS: Final = 100
"""Most jobs that are started before the event loop turns."""
TURNS_TO_START: Final = 1 if sys.version_info >= (3, 12) else 2
"""Turns of the event loop after which a job has started that was put while a slot was free."""
TURN: Final = 0.002
"""Seconds after which no other job is started before the event loop turns: first steps of handlers can be long."""


class JobTasks:
    """Starts jobs, each in a task and a context of its own, and cancels those that pass their deadline.

    A task begins at once where Python can do that (3.12), so that a handler that awaits nothing costs no turn of the
    event loop. A job's task is a `JobTask`, whatever task factory the loop has.

    Args:
        limit: jobs that run at once.
        executor: calls handlers.
        completion: the next stage.
        stuck: called with a run that goes on ``grace`` seconds after it should have ended.
        grace: seconds a handler may overrun its deadline, or go on after its claim was lost, before it counts as stuck.
    """

    def __init__(
        self,
        limit: int,
        executor: Executor,
        completion: Completion,
        *,
        stuck: Callable[[Execution], None],
        grace: float,
    ) -> None:
        self._limit = limit
        self._executor = executor
        self._completion = completion
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
        """Begin to start jobs, in copies of the context of this call."""
        self._loop = asyncio.get_running_loop()
        self._pristine = copy_context()
        self._executor.generators.open(self._loop)
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
        self._executor.generators.close()
        self._executor.processes.close()
        return [run for task, run in tasks.items() if not task.done()]

    def put(self, run: Execution) -> None:
        """Take a prepared run in: it starts with the next turn of the event loop, if fewer than the limit run."""
        self.put_all((run,))

    def put_all(self, runs: Sequence[Execution]) -> None:
        """`put` these."""
        self._waiting += runs
        if self._waiting and not self._scheduled:
            self._schedule()

    def abandon_waiting(self) -> list[Execution]:
        """Remove and return the runs that have not been started."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def _schedule(self) -> None:
        self._scheduled = True
        # Not in the context of the job whose end may have led here.
        self._loop.call_soon(self._turn, context=self._pristine.copy())

    def _turn(self) -> None:
        """Start waiting runs, as many as one turn of the event loop may take."""
        if self._closed:
            return
        waiting, running, limit, start = self._waiting, self.running, self._limit, self._start
        until = monotonic() + TURN
        try:
            for _ in range(STARTS):
                if not waiting or len(running) >= limit:
                    return
                run = waiting.popleft()
                if run.special and run.outcome is None and run.late():
                    run.outcome = EXPIRED
                if run.outcome is not None:
                    self._completion.finish(run)
                    continue
                start(run)
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
                self._executor.call(run, self._ended),
                loop=self._loop, name=name, context=self._pristine.copy(), eager_start=True,
            )  # fmt: skip
            if not task.done():
                run.task = task
                self.running.add(run)
        else:
            context = self._pristine.copy()
            coroutine = self._executor.call(run, self._ended)
            run.task = task = JobTask(coroutine, loop=self._loop, name=name, context=context)
            task.context = context
            run.started = monotonic()  # it can be cancelled from now on
            self.running.add(run)

    def _ended(self, run: Execution, outcome: Outcome) -> None:
        """Called last by the task of a run."""
        if run.task is not None:
            self.running.discard(run)
        if run.outcome is None:  # else it was handed back while it could not be stopped
            run.outcome = outcome
            self._completion.finish(run)
        if self._waiting and not self._scheduled:
            self._schedule()

    async def _watch(self) -> None:
        again: dict[Execution, float] = {}
        first: Execution | None = None
        while True:
            await anyio.sleep(WATCH_INTERVAL)
            now = monotonic()
            if self._waiting and self._waiting[0] is first and len(self.running) >= self._limit:
                self._hand_back_waiting()
            first = self._waiting[0] if self._waiting else None
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

    def _hand_back_waiting(self) -> None:
        """Give the waiting runs back to the queue: other workers may have a free slot for them."""
        for run in self.abandon_waiting():
            if run.outcome is None:
                run.outcome = OVERTAKEN
            self._completion.finish(run)

    @staticmethod
    def _overruns_since(run: Execution, now: float) -> float | None:
        """Since when a run should have ended: its deadline, or the moment its claim was found lost."""
        if run.overdue(now):
            return run.deadline
        return run.cancelled_at if isinstance(run.cause, Interrupted) else None


class Completion:
    """Takes every job that has its outcome, whichever stage gave it that, and passes it on.

    Args:
        in_flight: what this worker holds.
        successor: the recorder in a worker with a ledger, else the settler.
        permits: of limits that its jobs hold; ``None`` if no kind has a limit.
        observers: called with the outcome, if there are any.
        timed: note when runs end.
    """

    def __init__(
        self,
        in_flight: InFlight,
        successor: Recorder | Settler,
        *,
        permits: Permits | None = None,
        observers: ObserverDispatch | None = None,
        timed: bool = False,
    ) -> None:
        self._timed = timed
        self._in_flight = in_flight
        self._successor = successor
        self._permits = permits
        self._observers = observers
        self._forked = False

    def finish(self, run: Execution) -> None:
        """Take a run that has its outcome; of a batch, each of its jobs."""
        if self._forked:
            signals.end_child(run.outcome.error if isinstance(run.outcome, Raised) else None)
        if run.special:
            if isinstance(run, BatchExecution):
                for each in run.disperse():
                    self.finish(each)
                return
            if self._permits is not None:
                self._permits.release(run)
        if self._observers is not None:
            self._observers.finished(run)
        elif self._timed:
            run.ended = monotonic()
        self._in_flight.finished()
        self._successor.add(run)

    def close_in_forked_child(self) -> None:
        """End the process with the next run: a copy of this worker must not settle its parent's jobs."""
        self._forked = True
