"""Pipeline: the stages that a job passes in a worker, from claim to settlement. This module builds all of them.

    Fetcher → Executor.prepare → [LedgerLookup] → Admission → JobTasks → Completion → [Recorder] → Settler

Each stage gets its successor as a constructor argument, so the last one is built first. The stages in brackets exist
only in workers with a ledger; within `Admission`, `LimitGate` and `Batcher` only with handlers that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio

from streamworker.errors import ConfigurationError
from streamworker.execution import Execution
from streamworker.settings import Settings
from streamworker.worker.admission import Admission
from streamworker.worker.emission import OutputBuffer
from streamworker.worker.executor import Executor
from streamworker.worker.fetcher import Fetcher
from streamworker.worker.history_recorder import RunTallies
from streamworker.worker.host import WorkerHost, WorkerResources
from streamworker.worker.inflight import InFlight, Permits
from streamworker.worker.job_logs import LogBuffer
from streamworker.worker.lookup import LedgerLookup, RunningMarker
from streamworker.worker.observers import ObserverDispatch
from streamworker.worker.recorder import Recorder, WorkerLedger
from streamworker.worker.scheduler import DelayedPromoter
from streamworker.worker.sealed import Stages
from streamworker.worker.settler import Settler
from streamworker.worker.stored_payloads import PayloadReaper
from streamworker.worker.tasks import JobTasks

TOGETHER: Final = 100
"""Jobs that make a good batch for the ledger."""


class Pipeline:
    """The stages of one worker.

    Args:
        app: handlers and their limits.
        settings: the worker's.
        resources: broker, ledger and relay.
        executor: prepares and calls jobs.
        promoter: told when a job of this worker is due again.
        observers: called about every job, if there are any.
        buffers: what handlers emit, and what they log if that is kept; sent before their jobs are settled.
        stages: makes those that differ with encryption.
        stopping: set when nothing more is to be claimed.
        burst: set ``stopping`` when nothing is ready any more.
        stuck: called with a run that does not end.
        refused: called when the server refuses this worker for good.
    """

    def __init__(
        self,
        app: WorkerHost,
        settings: Settings,
        resources: WorkerResources,
        executor: Executor,
        promoter: DelayedPromoter,
        observers: ObserverDispatch | None,
        *,
        buffers: Sequence[OutputBuffer],
        stages: Stages,
        stopping: anyio.Event,
        burst: bool,
        stuck: Callable[[Execution], None],
        refused: Callable[[ConfigurationError], None],
    ) -> None:
        broker, concurrency = resources.broker, settings.concurrency
        self._stopping, record, in_flight = stopping, _record(resources), InFlight()
        tallies = RunTallies(durable=record is not None) if settings.history == "on" else None
        permits = Permits(broker) if any(each.quota is not None for each in app.handlers.registrations) else None

        reaper = _reaper(resources)
        told = [each for each in (tallies, reaper) if each is not None]
        settler = Settler(broker, in_flight, parked=promoter.parked, observers=observers, buffers=buffers, counts=told)
        recorder = Recorder(record, settler, in_flight, logs=_logs(buffers)) if record is not None else None
        how: dict[str, Any] = {"permits": permits, "observers": observers, "timed": tallies is not None}
        completion = stages.completion(in_flight, recorder or settler, **how)
        tasks = JobTasks(concurrency, executor, completion, stuck=stuck, grace=settings.grace)
        gates: dict[str, Any] = {"permits": permits, "concurrency": concurrency, "store": resources.store}
        admission = Admission(broker, app.handlers, executor, tasks, completion, **gates)
        lookup = LedgerLookup(record, admission, in_flight.counts) if record is not None else None
        fetcher = Fetcher(
            broker, in_flight, executor, lookup or admission, settings,
            most=most_claims(concurrency, ledger=record is not None), relay=resources.relay,
            outage=record.outage if record is not None else None, stopping=stopping, burst=burst, refused=refused,
        )  # fmt: skip

        self.fetcher: Final = fetcher
        self.lookup: Final = lookup
        self.admission: Final = admission
        self.tasks: Final = tasks
        self.completion: Final = completion
        self.recorder: Final = recorder
        self.settler: Final = settler
        self.in_flight: Final = in_flight
        self.tallies: Final = tallies
        self.reaper: Final = reaper
        self.permits: Final = permits
        self.record: Final = record
        self._marker = RunningMarker(record.ledger, tasks) if record is not None else None

    async def run(self) -> None:
        """Run the loops of all stages but the fetcher's, which ends first, until closed."""
        async with anyio.create_task_group() as loops:
            loops.start_soon(self.settler.run)
            loops.start_soon(self.admission.run)
            if self.reaper is not None:
                loops.start_soon(self.reaper.run, self._stopping)
            if self.recorder is not None and self.lookup is not None and self._marker is not None:
                loops.start_soon(self.recorder.run)
                loops.start_soon(self.lookup.run)
                loops.start_soon(self.lookup.look_for_later_hops)
                loops.start_soon(self._marker.run)

    async def close(self, within: float) -> None:
        """End the loops when all is recorded and settled; what cannot be within ``within`` seconds is handed back."""
        if self.lookup is not None:
            self.lookup.close()
        if self._marker is not None:
            self._marker.close()
        if self.recorder is not None and self.record is not None:
            with anyio.move_on_after(within):
                await self.recorder.close(within)
            self.record.ledger.abandon()
            await self.recorder.ended.wait()
        self.settler.close(within)
        self.admission.close(within)

    def abandon_waiting(self) -> list[Execution]:
        """Remove and return the runs that have not been started, from the last stage to the first."""
        waiting = self.tasks.abandon_waiting() + self.fetcher.abandon_waiting()
        waiting += self.lookup.abandon_waiting() if self.lookup is not None else []
        return waiting + self.admission.abandon_waiting()


def most_claims(concurrency: int, *, ledger: bool) -> int:
    """Most jobs of one claim.

    Half of what may run, so that Redis fetches while Python runs. With a ledger more where few may run: jobs that are
    claimed together are looked up together, and records go on meanwhile.

    Args:
        concurrency: jobs that run at once.
        ledger: whether jobs are looked up.
    """
    return max(min(concurrency, TOGETHER) if ledger else 1, concurrency // 2)


def _record(resources: WorkerResources) -> WorkerLedger | None:
    if resources.ledger is None or resources.dispatcher is None:
        return None
    return WorkerLedger(resources.ledger, resources.dispatcher)


def _logs(buffers: Sequence[OutputBuffer]) -> LogBuffer | None:
    return next((each for each in buffers if isinstance(each, LogBuffer)), None)


def _reaper(resources: WorkerResources) -> PayloadReaper | None:
    """What deletes stored payloads; ``None`` without a store."""
    if resources.store is None:
        return None
    ledger = resources.ledger
    return PayloadReaper(
        resources.store, resources.broker.payloads, ledger.payloads_in_use if ledger is not None else None
    )
