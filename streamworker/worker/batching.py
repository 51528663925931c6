"""Batches: jobs of one kind gathered for one call of their handler, each settled by its own outcome.

A `BatchExecution` takes their place in the worker and is what runs, times out and is cancelled; no broker and no ledger
ever sees it. Kinds that are not gathered never come here, and without any such kind there are no timers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from streamworker.context import Context
from streamworker.errors import RunEnded, Unreachable
from streamworker.execution import CANCELLED, Cause, Execution
from streamworker.handlers import Registration
from streamworker.job import Interrupted, Ok, Outcome, Raised
from streamworker.policy import wish_in
from streamworker.postgres import Effect
from streamworker.worker.executor import OK

ALL_LOST = Interrupted("every job of the batch was lost or cancelled")


OTHER_ENDED = Interrupted("the run of another job of its batch had ended")


class BatchExecution(Execution):
    """The runs of one call, as one.

    Args:
        items: prepared, of one kind; at least one.
    """

    __slots__ = ("items", "results")

    def __init__(self, items: Sequence[Execution]) -> None:
        first = items[0]
        super().__init__(first.claim)
        self.items = items
        self.results: list[Outcome] = []
        self.reading, self.registration, self.facts = first.reading, first.registration, first.facts
        self.payload = self
        self.special = self.passed = True

    def begin(self, context: Context[Any]) -> tuple[list[Any], list[Any]]:
        """See `gathering.Batch`."""
        contexts = []
        for item in self.items:
            if item.reading is None or item.facts is None:
                raise AssertionError("the runs of a batch are prepared")
            item.context = context.beside(item.claim, item.reading, item.facts.limits)
            contexts.append(item.context)
        for item in self.items:  # from here on they are cancelled one by one
            item.batch, item.task, item.deadline, item.started = self, self.task, self.deadline, self.started
        context.batch = contexts
        return [item.payload for item in self.items], contexts

    def end(self, value: Any) -> None:
        """See `gathering.Batch`."""
        if value is None:
            self.results = [OK] * len(self.items)
            return
        if not isinstance(value, list | tuple) or len(value) != len(self.items):
            what = f"{len(value)} outcomes" if isinstance(value, list | tuple) else type(value).__name__
            raise TypeError(
                f"a handler of {len(self.items)} jobs returned {what}: return None, or one outcome for each"
            )
        self.results = [_outcome(each) for each in value]

    def cancel(self, cause: Cause) -> None:
        """See `Execution.cancel`; every job is told."""
        super().cancel(cause)
        for item in self.items:
            if item.context is not None and item.outcome is None:
                item.context.cancel(type(cause).__name__)

    def shed(self) -> None:
        """One of its jobs was lost or cancelled: the others go on, while there are any."""
        if all(item.cause is not None for item in self.items):
            self.cancel(ALL_LOST)

    def disperse(self) -> Iterator[Execution]:
        """The call has ended: its jobs, each with its outcome."""
        for number, item in enumerate(self.items):
            if item.outcome is None:
                item.outcome = self._outcome_of(number, item)
            item.in_thread = self.in_thread
            yield item

    def _outcome_of(self, number: int, item: Execution) -> Outcome:
        if not isinstance(self.outcome, Ok) or not self.results:
            if self._ended_by_one():
                return item.cause or OTHER_ENDED  # the recorder knows better of the one whose run ended
            return item.cause or self.outcome or ALL_LOST
        outcome = self.results[number]
        if item.cause is None:
            return outcome
        # As for a job that runs alone: whatever it raises then, or returns after it looked, is not its end.
        heeded = item.cause is CANCELLED and item.context is not None and item.context.heeded
        return item.cause if heeded or isinstance(outcome, Raised) else outcome

    def _ended_by_one(self) -> bool:
        """Whether the call ended because one of its jobs may do nothing more: an ending belongs to its job."""
        if not isinstance(self.outcome, Raised):
            return False
        effects = {item.context.effect for item in self.items if item.context is not None}
        error = self.outcome.error
        ended = isinstance(error, RunEnded) and not effects.isdisjoint((Effect.ENDED, Effect.BUSY))
        return ended or (isinstance(error, Unreachable) and Effect.LOST in effects)


def _outcome(value: Any) -> Outcome:
    if isinstance(value, BaseException):
        return Raised(wish_in(value))
    return OK if value is None else Ok(value)


def each_of(runs: Iterable[Execution]) -> Iterator[Execution]:
    """The jobs among what runs: those of batches one by one."""
    for run in runs:
        if isinstance(run, BatchExecution):
            yield from run.items
        else:
            yield run


class Batcher:
    """Gathers runs until there are enough, or the first has waited long enough.

    Args:
        most: jobs that the worker runs at once: no batch waits for more.
        put: starts a batch.
        finished: told of runs that have an outcome already.
    """

    def __init__(self, most: int, put: Callable[[Execution], None], finished: Callable[[Execution], None]) -> None:
        self._most = most
        self._put = put
        self._finished = finished
        self._open: dict[Registration, list[Execution]] = {}
        self._timers: dict[Registration, asyncio.TimerHandle] = {}

    def may_run(self, run: Execution) -> bool:
        """Whether it may run as it is; one that is to be gathered waits here, and runs in its batch."""
        registration = run.registration
        if registration is None or registration.together is None or isinstance(run, BatchExecution):
            return True
        if run.suspect:
            self._put(BatchExecution([run]))  # alone
            return False
        waiting = self._open.setdefault(registration, [])
        waiting.append(run)
        if len(waiting) >= min(registration.together.batch, self._most):
            self._close(registration)
        elif len(waiting) == 1:
            later = asyncio.get_running_loop().call_later
            self._timers[registration] = later(registration.together.linger, self._close, registration)
        return False

    def abandon_waiting(self) -> list[Execution]:
        """Runs that wait for others; they do not wait any more afterwards."""
        waiting = [run for runs in self._open.values() for run in runs]
        for timer in self._timers.values():
            timer.cancel()
        self._open, self._timers = {}, {}
        return waiting

    def _close(self, registration: Registration) -> None:
        timer = self._timers.pop(registration, None)
        if timer is not None:
            timer.cancel()
        waiting = self._open.pop(registration, [])
        for run in waiting:
            if run.outcome is not None:  # lost or cancelled while it waited
                self._finished(run)
        if left := [run for run in waiting if run.outcome is None]:
            self._put(BatchExecution(left))
