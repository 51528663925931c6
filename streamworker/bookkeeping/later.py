"""Whether a job really goes on elsewhere, where the ledger knows a later hop of it than the claim that is held.

An entry of an earlier hop is let go unrun only if the later one is in Redis. It need not be: Redis may have failed over
to a replica that lagged, and an id may be used anew. Then the claim that is held is the job. It goes on above all that
the ledger knows, so that it can be recorded, and a later hop that turns up after all is the earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streamworker.handover import Dispatcher
from streamworker.postgres import FINAL, Known, Ledger, Status
from streamworker.run import Run
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

SUPERSEDED: Final = "superseded"
"""A later hop of the job is known, and really is there, or moves: this one is let go, and the other goes on."""
SENT_BY_LEDGER: Final[tuple[Status, ...]] = ("queued", "dispatching")
"""The later hop is on its way out of the ledger: it cannot be lost by Redis."""
_HIGHEST: Final = 2**63 - 2


class LaterHops:
    """Tells twins that really are there from those that Redis lost.

    Args:
        ledger: is asked again after the look.
        dispatcher: looks into queues.
    """

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher) -> None:
        self._ledger = ledger
        self._dispatcher = dispatcher

    async def elsewhere(self, doubts: Sequence[tuple[Run, Known]]) -> list[str]:
        """Why each run is let go; empty for one that goes on: it is above what is known of its job from here on.

        Args:
            doubts: runs, and the later hop that is known of their jobs.
        """
        if not doubts:
            return []
        hops: dict[str, dict[str, int]] = {}
        for run, known in doubts:
            if known.status not in (*SENT_BY_LEDGER, "dead"):
                queue = hops.setdefault(run.claim.queue, {})
                queue[run.job_id] = min(hop_of(run), queue.get(run.job_id, _HIGHEST))
        there = {queue: await self._dispatcher.later(queue, ids) for queue, ids in hops.items()}
        # A later hop leaves Redis only after its end was recorded: what is not there may have ended before the look.
        now = await self._ledger.lookup([(run.claim.queue, run.job_id) for run, _ in doubts])
        answers = []
        for run, known in doubts:
            found = now.get((run.claim.queue, run.job_id), known)
            if found.status in FINAL:
                answers.append(str(found.status))
            elif found != known or known.status in SENT_BY_LEDGER or run.job_id in there.get(run.claim.queue, ()):
                answers.append(SUPERSEDED)
            else:
                outrank(run, known)
                answers.append("")
        return answers


def hop_of(run: Run) -> int:
    """The hop of a run; 0 if its document says none."""
    return 0 if run.reading is None else run.reading.hop or 0


def outrank(run: Run, known: Known) -> None:
    """Put a run above what is known of its job, so that what becomes of it counts."""
    if run.reading is not None:
        log.info(
            "job_outranks", job_id=run.job_id, kind=run.kind, queue=run.claim.queue, status=known.status,
            hop=hop_of(run), known_hop=known.hop,
        )  # fmt: skip
        run.reading.hop = min(known.hop, _HIGHEST) + 1
