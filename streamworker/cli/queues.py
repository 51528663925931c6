"""``streamworker queues``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from cyclopts import App

from streamworker.broker import Operator
from streamworker.cli.options import LISTING, SERVER, Listing, QueueName, ServerFlags, operate
from streamworker.cli.output import Column, plain, show
from streamworker.views import Pace, QueueRow, age, overview

queues = App(name="queues", help="How much is ready, running, delayed and dead in each queue.")

_Rated = tuple[QueueRow, float | None]

_COLUMNS: Final[list[Column[_Rated]]] = [
    Column("queue", lambda it: it[0].queue, short=20),
    Column("ready", lambda it: f"{it[0].ready:,}", right=True),
    Column("running", lambda it: f"{it[0].running:,}", right=True),
    Column("delayed", lambda it: f"{it[0].delayed:,}", right=True),
    Column("dead", lambda it: f"{it[0].dead:,}", right=True),
    Column("oldest", lambda it: age(it[0].oldest_age_s), right=True),
]
_RATE: Final[Column[_Rated]] = Column("jobs/s", lambda it: "" if it[1] is None else f"{it[1]:,.1f}", right=True)
_STATE: Final[Column[_Rated]] = Column("", lambda it: "paused" if it[0].paused else "")


@queues.default
@queues.command(name="list")
def list_(queue: QueueName = None, *, listing: Listing = LISTING, server: ServerFlags = SERVER) -> int:
    """List queues; --watch adds how many jobs leave them per second.

    Args:
        queue: Only this one.
    """
    pace = Pace()

    async def work(operator: Operator) -> int:
        async def rows() -> AsyncIterator[tuple[_Rated, None]]:
            names = [queue] if queue is not None else await operator.queues()
            for row in await overview(operator, names, pace if listing.watch else None):
                yield row, None

        columns = [*_COLUMNS, _RATE, _STATE] if listing.watch else [*_COLUMNS, _STATE]
        return await show(listing, rows, columns, title="queues", json=lambda it: plain(it[0]))

    return operate(server, work, endless=listing.watch)
