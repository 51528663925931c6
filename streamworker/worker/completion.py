"""Completion: the stage that a job enters when it has its outcome, on its way to be recorded and settled."""

from __future__ import annotations

from streamworker.execution import Execution
from streamworker.job import Raised
from streamworker.worker import signals
from streamworker.worker.batching import BatchExecution
from streamworker.worker.inflight import InFlight, Permits
from streamworker.worker.observers import ObserverDispatch
from streamworker.worker.recorder import Recorder
from streamworker.worker.settler import Settler


class Completion:
    """Takes every job that has its outcome, whichever stage gave it that, and passes it on.

    Args:
        in_flight: what this worker holds.
        successor: the recorder in a worker with a ledger, else the settler.
        permits: of limits that its jobs hold; ``None`` if no kind has a limit.
        observers: called with the outcome, if there are any.
    """

    def __init__(
        self,
        in_flight: InFlight,
        successor: Recorder | Settler,
        *,
        permits: Permits | None = None,
        observers: ObserverDispatch | None = None,
    ) -> None:
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
        self._in_flight.finished()
        self._successor.add(run)

    def close_in_forked_child(self) -> None:
        """End the process with the next run: a copy of this worker must not settle its parent's jobs."""
        self._forked = True
