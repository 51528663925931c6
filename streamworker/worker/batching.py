"""Batches: jobs of one kind collected for one handler call, each settled by its own outcome.

A `BatchExecution` represents them in the worker: it runs, times out and is cancelled. Brokers and the ledger only see
its jobs. `admission.Batcher` collects them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from streamworker.context import Context
from streamworker.errors import RunEnded, Unreachable
from streamworker.execution import CANCELLED, OK, Cause, Execution
from streamworker.job import Interrupted, Ok, Outcome, Raised
from streamworker.policy import wish_in
from streamworker.postgres import Effect

ALL_LOST: Final = Interrupted("every job of the batch was lost or cancelled")
OTHER_ENDED: Final = Interrupted("the run of another job of its batch had ended")


class BatchExecution(Execution):
    """One handler call for several jobs.

    Args:
        items: prepared jobs of one kind; at least one.
    """

    __slots__ = ("items", "results")

    def __init__(self, items: Sequence[Execution]) -> None:
        first = items[0]
        super().__init__(first.claim)
        self.items = items
        self.results: list[Outcome] = []
        self.reading, self.registration, self.facts = first.reading, first.registration, first.facts
        self.payload = self
        self.special = True

    def late(self) -> bool:
        """Never: `Batcher` has dropped the jobs that have expired, each by itself."""
        return False

    def begin(self, context: Context[Any]) -> tuple[list[Any], list[Any]]:
        """Start the clock of every job; returns their payloads and contexts."""
        contexts = []
        for item in self.items:
            if item.reading is None or item.facts is None:
                raise AssertionError("the runs of a batch are prepared")
            item.context = context.beside(item.claim, item.reading, item.facts.limits)
            item.context.take_loaded(getattr(item, "loaded", None))
            contexts.append(item.context)
        for item in self.items:  # from here on they are cancelled one by one
            item.batch, item.task, item.deadline, item.started = self, self.task, self.deadline, self.started
        context.batch = contexts
        for each in contexts:
            each.batch = contexts
        return [item.payload for item in self.items], contexts

    def end(self, value: Any) -> None:
        """Take what the handler returned: ``None``, or one outcome for each job.

        Raises:
            TypeError: it returned anything else.
        """
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
        """Cancel the call; every job sees it in ``ctx.cancelled``."""
        super().cancel(cause)
        for item in self.items:
            if item.context is not None and item.outcome is None:
                item.context.cancel(type(cause).__name__)

    def shed(self) -> None:
        """A job was lost or cancelled: cancel the call once all of them are."""
        if all(item.cause is not None for item in self.items):
            self.cancel(ALL_LOST)

    def disperse(self) -> Iterator[Execution]:
        """The jobs after the call, each with its outcome."""
        for number, item in enumerate(self.items):
            if item.outcome is None:
                item.outcome = self._outcome_of(number, item)
            item.in_thread = self.in_thread
            yield item

    def _outcome_of(self, number: int, item: Execution) -> Outcome:
        if not isinstance(self.outcome, Ok) or not self.results:
            if self._ended_by_one():
                return item.cause or OTHER_ENDED  # `Recorder` corrects the one whose run ended
            return item.cause or self.outcome or ALL_LOST
        outcome = self.results[number]
        if item.cause is None:
            return outcome
        # As for a job that runs alone: what it raises after that, or returns after it looked, does not count.
        heeded = item.cause is CANCELLED and item.context is not None and item.context.heeded
        return item.cause if heeded or isinstance(outcome, Raised) else outcome

    def _ended_by_one(self) -> bool:
        """Whether the refused or lost transaction of one job ended the call: that is no outcome of the others."""
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
    """The jobs of these executions: those of a batch one by one."""
    for run in runs:
        if isinstance(run, BatchExecution):
            yield from run.items
        else:
            yield run
