"""What lies between claiming, running and settling: nothing, or the stages of a worker that has a ledger.

With a ledger jobs are looked up before they run, and recorded before they are settled. Without one a run goes straight
from the claim loop to its task and from there to the settle loop, as if these stages did not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import anyio

from streamworker.batches import each_of
from streamworker.bookkeeping.later import LaterHops
from streamworker.bookkeeping.lookup import Lookup
from streamworker.bookkeeping.noting import Noting
from streamworker.bookkeeping.outage import Outage
from streamworker.bookkeeping.recorder import Recorder, decided
from streamworker.execute import Executor
from streamworker.executions import Executions
from streamworker.handover import Dispatcher
from streamworker.holdings import Holdings
from streamworker.postgres import Ledger
from streamworker.run import Run
from streamworker.settler import Settler

TOGETHER: Final = 100
"""Jobs that make a good batch."""


class Stages(Protocol):
    """What a worker knows of them.

    Attributes:
        put: takes a claimed run on its way to its task.
        finish: takes a run that has its outcome.
        closed: whether nothing may be claimed right now; ``None`` if that never happens.
    """

    put: Callable[[Run], None]
    finish: Callable[[Run], None]
    closed: Callable[[], bool] | None

    def most(self, limit: int) -> int:
        """Most jobs of one claim: what all stages get through best."""

    def abandon_waiting(self) -> list[Run]:
        """Runs that were not started yet; they do not wait any more afterwards."""

    async def run(self) -> None:
        """Run until closed."""

    async def close(self, within: float) -> None:
        """End them; what cannot be recorded ``within`` seconds is handed back."""


def stages(
    record: tuple[Ledger, Dispatcher] | None,
    executor: Executor,
    executions: Executions,
    settler: Settler,
    holdings: Holdings,
) -> Stages:
    """The stages of a worker.

    Args:
        record: the ledger, if there is one, and what looks for the jobs that it knows.
        executor: prepares runs.
        executions: where runs go that may run.
        settler: where runs go that have ended.
        holdings: what is held.
    """
    if record is None:
        return Straight(executions, settler)
    return Bookkeeping(*record, executor, executions, settler, holdings)


class Straight:
    """No ledger."""

    def __init__(self, executions: Executions, settler: Settler) -> None:
        self.put: Callable[[Run], None] = executions.put
        self.finish: Callable[[Run], None] = settler.add
        self.closed: Callable[[], bool] | None = None

    def most(self, limit: int) -> int:
        """Half of what may run, so that Redis fetches while Python runs what came before."""
        return max(1, limit // 2)

    def abandon_waiting(self) -> list[Run]:
        """See `Stages.abandon_waiting`."""
        return []

    async def run(self) -> None:
        """See `Stages.run`."""

    async def close(self, within: float) -> None:
        """See `Stages.close`."""


class Bookkeeping:
    """Lookup before running, record before settling, and the slow loop beside them."""

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        executor: Executor,
        executions: Executions,
        settler: Settler,
        holdings: Holdings,
    ) -> None:
        self._ledger = ledger
        outage, later = Outage(), LaterHops(ledger, dispatcher)
        self._lookup = Lookup(ledger, executor, executions.put, later=later, counts=holdings.counts, outage=outage)
        self._recorder = Recorder(ledger, settler, holdings, outage, later)
        self._noting = Noting(ledger, lambda: list(each_of(executions.running)))
        self.put: Callable[[Run], None] = self._lookup.put
        self.finish: Callable[[Run], None] = self._recorder.add
        self.closed: Callable[[], bool] | None = outage.is_on
        settler.judge = decided

    def most(self, limit: int) -> int:
        """More where few may run: what is claimed together is looked up together, and records go on meanwhile."""
        return max(min(limit, TOGETHER), limit // 2)

    def abandon_waiting(self) -> list[Run]:
        """See `Stages.abandon_waiting`."""
        return self._lookup.abandon()

    async def run(self) -> None:
        """See `Stages.run`."""
        async with anyio.create_task_group() as loops:
            loops.start_soon(self._lookup.run)
            loops.start_soon(self._lookup.weigh)
            loops.start_soon(self._recorder.run)
            loops.start_soon(self._noting.run)

    async def close(self, within: float) -> None:
        """See `Stages.close`."""
        self._lookup.close()
        self._noting.close()
        with anyio.move_on_after(within):
            await self._recorder.close(within)
        self._ledger.abandon()
        await self._recorder.ended.wait()
