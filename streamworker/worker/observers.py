"""ObserverDispatch: calls the observers of a worker. A worker without observers has none, and pays nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final, TypeVar

from streamworker.broker import SettleRequest
from streamworker.execution import Execution
from streamworker.job import Dead, Settled
from streamworker.observe import JobRun, Observer, Settlement
from streamworker.redact import name_of, text_of
from streamworker.telemetry.logs import get_logger
from streamworker.worker.batching import each_of

log = get_logger("streamworker.observer")

T = TypeVar("T")

SILENCE: Final = 10.0
"""Seconds between two log lines about an observer that keeps failing."""


class ObserverDispatch:
    """Calls the observers of one worker, in their order.

    Args:
        observers: of the app and of the worker itself.
        worker_id: the worker's.
    """

    def __init__(self, observers: Sequence[Observer], worker_id: str) -> None:
        self._worker_id = worker_id
        self._logged: dict[str, float] = {}
        self._on_start = overridden(observers, "on_start")
        self._on_outcome = overridden(observers, "on_outcome")
        self._on_settled = overridden(observers, "on_settled")
        self._on_dead = overridden(observers, "on_dead")
        self.starts: Final = bool(self._on_start)
        """Whether an observer has ``on_start``."""

    def started(self, run: Execution) -> None:
        """The handler is about to be called, in this task."""
        for each in each_of((run,)):
            seen = self._seen(each)
            each.started = monotonic()
            for method in self._on_start:
                self._call(method, seen)

    def finished(self, run: Execution) -> None:
        """A run has its outcome."""
        run.ended = monotonic()
        if self._on_outcome:
            seen = self._seen(run)
            for method in self._on_outcome:
                self._call(method, seen)

    def settled(
        self, batch: Sequence[Execution], items: Sequence[SettleRequest], results: Sequence[Settled], began: float
    ) -> None:
        """A batch was settled.

        Args:
            batch: the runs.
            items: their endings.
            results: the broker's answers.
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
        for method in self._on_settled:
            self._call(method, settlement)
        for seen in dead:
            for method in self._on_dead:
                self._call(method, seen)

    def _seen(self, run: Execution) -> JobRun:
        if run.seen is None:
            run.seen = JobRun(run, self._worker_id)
        seen: JobRun = run.seen
        return seen

    def _call(self, method: Callable[[T], None], argument: T) -> None:
        try:
            method(argument)
        except BaseException as error:
            name = text_of(getattr(method, "__qualname__", name_of(method)))
            if monotonic() - self._logged.get(name, float("-inf")) >= SILENCE:
                self._logged[name] = monotonic()
                log.error("observer_failed", observer=name, error=text_of(error), exc_info=error)


def dispatch_to(observers: Sequence[Observer], worker_id: str) -> ObserverDispatch | None:
    """The dispatch to these observers; ``None`` without any.

    Args:
        observers: of the app and of the worker itself.
        worker_id: the worker's.
    """
    return ObserverDispatch(observers, worker_id) if observers else None


def overridden(observers: Sequence[Observer], name: str) -> list[Callable[[Any], None]]:
    """The methods of this name that observers have themselves; those inherited from `Observer` do nothing."""
    own = getattr(Observer, name)
    return [getattr(observer, name) for observer in observers if getattr(type(observer), name) is not own]
