"""What this worker holds: every claim from its arrival until it is settled, and the counts operators see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from time import monotonic
from typing import Final

import anyio
import msgspec

from streamworker.execution import CANCELLED, Execution
from streamworker.job import Claim, Interrupted
from streamworker.telemetry.logs import get_logger
from streamworker.worker.executor import Executor

log = get_logger("streamworker.worker")

LATELY: Final = 150.0
"""Seconds for which a job that spins is told of: it waits a minute at most, and may then run on another worker."""


class Counts(msgspec.Struct):
    """What became of jobs here, since the start."""

    done: int = 0
    retried: int = 0
    released: int = 0
    dead: int = 0
    cancelled: int = 0
    lost: int = 0
    recovered: int = 0
    skipped: int = 0
    """Claims of jobs that the ledger knew as ended, or as going on elsewhere."""

    @property
    def failed(self) -> int:
        """Runs that ended in a retry or a dead letter."""
        return self.retried + self.dead


class Spinning(msgspec.Struct, frozen=True, array_like=True):
    """A job that keeps coming back at once and uncharged, and is made to wait for that.

    Attributes:
        queue: where it lies.
        kind: its kind.
        job_id: its id.
        turns: how often in a row it came back.
        wait: seconds it waits now.
    """

    queue: str
    kind: str
    job_id: str
    turns: int
    wait: float


class InFlight(Collection[Claim]):
    """Runs by claim. As a collection it is the claims, so that brokers never see runs."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, bytes], Execution] = {}
        self.busy = 0
        """Runs without an outcome: they fill slots. Finished ones only wait to be settled."""
        self.counts: Final = Counts()
        self._changed = asyncio.Event()
        self._spinning: tuple[float, Spinning] | None = None

    def spun(self, job: Spinning) -> None:
        """A job was made to wait; the one that has done so most often is told of."""
        if (worst := self.spinning()) is None or job.turns >= worst.turns or job.job_id == worst.job_id:
            self._spinning = monotonic(), job

    def spinning(self) -> Spinning | None:
        """The job that has come back most often of late, if any did too often."""
        if self._spinning is not None and monotonic() - self._spinning[0] < LATELY:
            return self._spinning[1]
        return None

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Claim]:
        return (run.claim for run in self._runs.values())

    def __contains__(self, claim: object) -> bool:
        return isinstance(claim, Claim) and (claim.place, claim.entry) in self._runs

    def admit(self, claim: Claim) -> Execution | None:
        """Take a claim in; ``None`` if its entry is here already."""
        key = (claim.place, claim.entry)
        if key in self._runs:
            return None
        run = self._runs[key] = Execution(claim)
        self.busy += 1
        return run

    def find(self, claim: Claim) -> Execution | None:
        """The run of a claim, if exactly this claim is held."""
        run = self._runs.get((claim.place, claim.entry))
        return run if run is not None and run.claim == claim else None

    def ended(self, queue: str) -> int:
        """How many runs of a queue have an outcome and only wait to be settled."""
        return sum(run.outcome is not None and run.claim.queue == queue for run in self._runs.values())

    def finished(self) -> None:
        """A run got its outcome: its slot is free."""
        self.busy -= 1
        self._changed.set()

    def forget(self, run: Execution) -> None:
        """A run is settled, or somebody else's."""
        self._runs.pop((run.claim.place, run.claim.entry), None)
        self._changed.set()

    def snapshot(self) -> list[Execution]:
        """All runs; may be called from another thread."""
        while True:
            try:
                return list(self._runs.values())
            except RuntimeError:  # the dict changed size under the copy
                continue

    def stir(self) -> None:
        """Wake whoever waits for a change."""
        self._changed.set()

    async def changed(self, timeout: float | None = None) -> None:
        """Wait until something changed since the last wait, at most ``timeout`` seconds."""
        with anyio.move_on_after(timeout):
            await self._changed.wait()
        self._changed.clear()


class LeasedSet:
    """The runs of one worker. `runs` bears being called from the thread; the rest belongs to the event loop.

    Args:
        holdings: what is held.
        executor: prepares runs.
        kept: renews what goes along with claims; ``None`` if nothing does.
    """

    def __init__(
        self, holdings: InFlight, executor: Executor, kept: Callable[[Collection[Claim]], None] | None = None
    ) -> None:
        self._holdings = holdings
        self._executor = executor
        self.kept: Final = kept
        """Told, in the thread, of claims that were renewed."""

    def runs(self) -> list[Execution]:
        """All runs, from their arrival until they are settled."""
        return self._holdings.snapshot()

    def lost(self, claims: list[Claim]) -> None:
        """The claims are somebody else's by now: nothing of what runs here may count any more."""
        for run in self._unfinished(claims):
            claim = run.claim
            log.warning("claim_lost", job_id=run.job_id, kind=run.kind, queue=claim.queue, deliveries=claim.count)
            if run.started is None:
                run.outcome = Interrupted("the claim was lost")
            else:
                run.cancel(Interrupted("the claim was lost"))

    def cancelled(self, claims: list[Claim]) -> None:
        """The jobs were cancelled: what waits does not start, what runs is told."""
        for run in self._unfinished(claims):
            if run.started is None:
                self._executor.prepare(run)
                run.outcome = CANCELLED
            else:
                run.cancel(CANCELLED)

    def _unfinished(self, claims: list[Claim]) -> list[Execution]:
        runs = [self._holdings.find(claim) for claim in claims]
        return [run for run in runs if run is not None and not run.settling and run.outcome is None]
