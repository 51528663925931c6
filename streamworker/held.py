"""What the lease thread sees of a worker's runs, and what becomes of those it brings bad news of."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from streamworker.execute import Executor
from streamworker.holdings import Holdings
from streamworker.job import Claim, Interrupted
from streamworker.run import CANCELLED, Run
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")


class Held:
    """The runs of one worker. `runs` bears being called from the thread; the rest belongs to the event loop.

    Args:
        holdings: what is held.
        executor: prepares runs.
        kept: renews what goes along with claims; ``None`` if nothing does.
    """

    def __init__(
        self, holdings: Holdings, executor: Executor, kept: Callable[[Collection[Claim]], None] | None = None
    ) -> None:
        self._holdings = holdings
        self._executor = executor
        self.kept: Final = kept
        """Told, in the thread, of claims that were renewed."""

    def runs(self) -> list[Run]:
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

    def _unfinished(self, claims: list[Claim]) -> list[Run]:
        runs = [self._holdings.find(claim) for claim in claims]
        return [run for run in runs if run is not None and not run.settling and run.outcome is None]
