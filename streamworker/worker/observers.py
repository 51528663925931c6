"""How a worker tells its observers. Without observers there is no watch, and nothing here is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final, TypeVar

from streamworker.broker import Ending
from streamworker.execution import Execution
from streamworker.job import Dead, Outcome, Settled
from streamworker.observe import JobRun, Observer, Settlement
from streamworker.redact import name_of, text_of
from streamworker.telemetry.logs import get_logger
from streamworker.worker.batching import each_of
from streamworker.worker.executor import Ended, Executor
from streamworker.worker.settler import Settler
from streamworker.worker.tasks import Call

log = get_logger("streamworker.observer")

T = TypeVar("T")

SILENCE: Final = 10.0
"""Seconds between two lines about an observer that keeps failing."""


class ObserverDispatch:
    """Calls the observers of one worker, in their order.

    Args:
        observers: whom to tell.
        executor: runs jobs.
    """

    def __init__(self, observers: Sequence[Observer], executor: Executor) -> None:
        self._executor = executor
        self._worker_id = executor.shared.worker_id
        self._said: dict[str, float] = {}
        self._on_start = _overridden(observers, "on_start")
        self._on_outcome = _overridden(observers, "on_outcome")
        self._on_settled = _overridden(observers, "on_settled")
        self._on_dead = _overridden(observers, "on_dead")

    @property
    def starts(self) -> Call | None:
        """What the task of a job shall call so that its start is seen; ``None`` if no observer looks at starts."""
        return self.call if self._on_start else None

    async def call(self, run: Execution, ended: Ended) -> Outcome:
        """`Executor.call`, seen."""
        for each in each_of((run,)):
            seen = self._seen(each)
            each.started = monotonic()
            for told in self._on_start:
                self._tell(told, seen)
        return await self._executor.call(run, ended)

    def finished(self, run: Execution) -> None:
        """A run has its outcome."""
        run.ended = monotonic()
        if self._on_outcome:
            seen = self._seen(run)
            for told in self._on_outcome:
                self._tell(told, seen)

    def settled(
        self, batch: Sequence[Execution], items: Sequence[Ending], results: Sequence[Settled], began: float
    ) -> None:
        """A batch was settled.

        Args:
            batch: the runs.
            items: their endings.
            results: what became of each.
            began: when it was sent, in epoch seconds.
        """
        pairs: list[tuple[JobRun, Settled]] = []
        dead: list[JobRun] = []
        for run, item, result in zip(batch, items, results, strict=True):
            seen = run.seen or self._seen(run)
            seen.verdict = item.verdict
            pairs.append((seen, result))
            if result is Settled.SETTLED and isinstance(item.verdict, Dead):
                dead.append(seen)
        settlement = Settlement(pairs, began, max(0.0, time.time() - began))
        for told in self._on_settled:
            self._tell(told, settlement)
        for seen in dead:
            for told in self._on_dead:
                self._tell(told, seen)

    def _seen(self, run: Execution) -> JobRun:
        if run.seen is None:
            run.seen = JobRun(run, self._worker_id)
        seen: JobRun = run.seen
        return seen

    def _tell(self, told: Callable[[T], None], what: T) -> None:
        try:
            told(what)
        except BaseException as error:
            name = text_of(getattr(told, "__qualname__", name_of(told)))
            if monotonic() - self._said.get(name, float("-inf")) >= SILENCE:
                self._said[name] = monotonic()
                log.error("observer_failed", observer=name, error=text_of(error), exc_info=error)


def watching(observers: Sequence[Observer], executor: Executor, settler: Settler) -> ObserverDispatch | None:
    """Let a worker's parts tell the observers; without observers nothing changes.

    Args:
        observers: whom to tell.
        executor: runs jobs.
        settler: ends them.
    """
    if not observers:
        return None
    watch = ObserverDispatch(observers, executor)
    settler.settled = watch.settled
    return watch


def _overridden(observers: Sequence[Observer], name: str) -> list[Callable[[Any], None]]:
    own = getattr(Observer, name)
    return [getattr(observer, name) for observer in observers if getattr(type(observer), name) is not own]
