"""InFlight: every claim that this worker holds, from its arrival until it is settled, and its counts for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from time import monotonic
from typing import Final

import anyio
import msgspec

from streamworker.broker import Limiter
from streamworker.execution import CANCELLED, Execution
from streamworker.job import Claim, Interrupted
from streamworker.limits import Permit
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

SPINNING_SHOWN: Final = 150.0
"""Seconds for which a spinning job is reported: it waits a minute at most, and may then run on another worker."""


class WorkerCounts(msgspec.Struct):
    """How many jobs ended how on this worker, since its start."""

    done: int = 0
    retried: int = 0
    released: int = 0
    dead: int = 0
    cancelled: int = 0
    expired: int = 0
    lost: int = 0
    recovered: int = 0
    skipped: int = 0
    """Claims of jobs that have ended according to the ledger, or go on elsewhere."""

    @property
    def failed(self) -> int:
        """Runs that ended in a retry or a dead letter."""
        return self.retried + self.dead


class SpinningJob(msgspec.Struct, frozen=True, array_like=True):
    """A job that is released again and again within a second, and therefore waits longer each time.

    Attributes:
        queue: its queue.
        kind: its kind.
        job_id: its id.
        turns: how often in a row it was released.
        wait: seconds it waits now.
    """

    queue: str
    kind: str
    job_id: str
    turns: int
    wait: float


class InFlight(Collection[Claim]):
    """Runs by claim. As a collection it holds the claims, so that brokers never see runs."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, bytes], Execution] = {}
        self.busy = 0
        """Runs without an outcome: they count against CONCURRENCY. Finished ones only wait to be settled."""
        self.counts: Final = WorkerCounts()
        self._changed = asyncio.Event()
        self._stirred = False  # like `_changed`, and a quarter of its price in every job
        self._spinning: tuple[float, SpinningJob] | None = None

    def spun(self, job: SpinningJob) -> None:
        """A spinning job was made to wait; the one that spins most is reported."""
        if (worst := self.spinning()) is None or job.turns >= worst.turns or job.job_id == worst.job_id:
            self._spinning = monotonic(), job

    def spinning(self) -> SpinningJob | None:
        """The job that spun most lately; ``None`` if none did."""
        if self._spinning is not None and monotonic() - self._spinning[0] < SPINNING_SHOWN:
            return self._spinning[1]
        return None

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Claim]:
        return (run.claim for run in self._runs.values())

    def __contains__(self, claim: object) -> bool:
        return isinstance(claim, Claim) and (claim.place, claim.entry) in self._runs

    def admit(self, claims: Sequence[Claim]) -> list[Execution]:
        """Add claims; returns their runs, without those of entries that are held already."""
        held = self._runs
        runs = {(claim.place, claim.entry): Execution(claim) for claim in claims}
        if not held.keys().isdisjoint(runs):
            runs = {key: run for key, run in runs.items() if key not in held}
        held.update(runs)
        self.busy += len(runs)
        return list(runs.values())

    def find(self, claim: Claim) -> Execution | None:
        """The run of a claim, if exactly this claim is held."""
        run = self._runs.get((claim.place, claim.entry))
        return run if run is not None and run.claim == claim else None

    def of_job(self, entry: bytes) -> Execution | None:
        """The run whose claim has this entry, compared by identity: `job_task.JOB` is it. Threads may ask."""
        return next((run for run in list(self._runs.values()) if run.claim.entry is entry), None)

    def ended(self, queue: str) -> int:
        """How many runs of a queue have their outcome and only wait to be settled."""
        return sum(run.outcome is not None and run.claim.queue == queue for run in self._runs.values())

    def finished(self) -> None:
        """A run got its outcome: another may be claimed."""
        self.busy -= 1
        if not self._stirred:
            self.stir()

    def forget(self, *runs: Execution) -> None:
        """Remove runs: they are settled, or other workers have their claims."""
        held = self._runs
        for run in runs:
            claim = run.claim
            held.pop((claim.place, claim.entry), None)
        if not self._stirred:
            self.stir()

    def snapshot(self) -> list[Execution]:
        """All runs; may be called from another thread."""
        while True:
            try:
                return list(self._runs.values())
            except RuntimeError:  # the dict changed size under the copy
                continue

    def stir(self) -> None:
        """Wake those who wait in `changed`."""
        self._stirred = True
        self._changed.set()

    async def changed(self, timeout: float | None = None) -> None:
        """Wait until something changed since the last wait, at most ``timeout`` seconds."""
        with anyio.move_on_after(timeout):
            await self._changed.wait()
        self._stirred = False
        self._changed.clear()


class Permits:
    """Permits of limits: those that jobs of this worker hold, and those to be given back to the broker.

    Args:
        broker: renews them.
    """

    def __init__(self, broker: Limiter) -> None:
        self._broker = broker
        self._held: dict[tuple[str, bytes], Permit] = {}
        self.leaving: list[Permit] = []
        """To be given back with the next request."""
        self.wake: Final = asyncio.Event()
        """Set with each release."""

    def grant(self, run: Execution, permit: Permit) -> None:
        """This run holds a permit from now on."""
        self._held[run.claim.place, run.claim.entry] = permit

    def release(self, run: Execution) -> None:
        """Give back the permit of a run that has ended. One of a thread that still runs stays until it expires."""
        permit = self._held.pop((run.claim.place, run.claim.entry), None)
        if permit is not None and not run.in_thread:
            self.leaving.append(permit)
            self.wake.set()

    def given_back(self, permits: Collection[Permit]) -> None:
        """These need not be given back any more."""
        self.leaving = [permit for permit in self.leaving if permit not in permits]

    async def retain(self, claims: Collection[Claim]) -> None:
        """Renew the permits of these claims; called in the lease thread, after their leases."""
        find = self._held.get
        held = [permit for claim in claims if (permit := find((claim.place, claim.entry))) is not None]
        if held:
            await self._broker.renew_permits(held)


class LeasedSet:
    """The in-flight set as the lease thread uses it: renewals, lost leases, cancellations.

    `runs` and `permits.retain` may be called in the thread; the rest belongs to the event loop.

    Args:
        in_flight: what is held.
        permits: renewed along with the claims; ``None`` if no kind has a limit.
    """

    def __init__(self, in_flight: InFlight, permits: Permits | None = None) -> None:
        self._in_flight = in_flight
        self.permits: Final = permits

    def runs(self) -> list[Execution]:
        """All runs, from their arrival until they are settled."""
        return self._in_flight.snapshot()

    def lost(self, claims: list[Claim]) -> None:
        """Another worker has these claims by now: what runs here must not count any more."""
        for run in self._unfinished(claims):
            claim = run.claim
            log.warning("claim_lost", job_id=run.job_id, kind=run.kind, queue=claim.queue, deliveries=claim.count)
            if run.started is None:
                run.outcome = Interrupted("the claim was lost")
            else:
                run.cancel(Interrupted("the claim was lost"))

    def cancelled(self, claims: list[Claim]) -> None:
        """These jobs were cancelled: those that wait do not start, handlers that run are cancelled."""
        for run in self._unfinished(claims):
            if run.started is None:
                run.outcome = CANCELLED
            else:
                run.cancel(CANCELLED)

    def _unfinished(self, claims: list[Claim]) -> list[Execution]:
        runs = [self._in_flight.find(claim) for claim in claims]
        return [run for run in runs if run is not None and not run.settling and run.outcome is None]
