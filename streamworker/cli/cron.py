"""``streamworker cron``: what an app enqueues by the calendar."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec
from cyclopts import App

from streamworker.cli.app_loader import load_app, with_own
from streamworker.cli.options import LISTING, WORKER, Listing, WorkerFlags, run
from streamworker.cli.output import Column, show
from streamworker.cron import Schedule

cron = App(name="cron", help="What is enqueued by the calendar, and when next.")

NEXT: Final = 3
"""Next ticks that are shown."""


class CronRow(msgspec.Struct, frozen=True):
    """A schedule as operators see it; moments are RFC 3339."""

    name: str
    queue: str
    kind: str
    expression: str
    tz: str
    missed: str
    last: str | None
    next: list[str]


_COLUMNS: Final[list[Column[CronRow]]] = [
    Column("name", lambda row: row.name, short=24),
    Column("queue", lambda row: row.queue, short=14),
    Column("kind", lambda row: row.kind, wide=True),
    Column("when", lambda row: f"{row.expression} {row.tz}"),
    Column("missed", lambda row: row.missed, wide=True),
    Column("last", lambda row: row.last or "never"),
    Column("next", lambda row: row.next[0]),
    Column("then", lambda row: ", ".join(row.next[1:]), rest=True),
]


@cron.default
@cron.command(name="list")
def list_(*, listing: Listing = LISTING, flags: WorkerFlags = WORKER) -> int:
    """List the schedules of the app, with their last tick and the next ones, in their own time zones."""
    settings = flags.settings()
    app = load_app(settings)
    settings = with_own(settings, app)

    async def main() -> int:
        async with app.operator(settings) as operator:

            async def rows() -> AsyncIterator[tuple[CronRow, None]]:
                now = await operator.now()
                for each in app.schedules:
                    yield _row(each, (await operator.ticks(each.job.queue)).get(each.key), now), None

            return await show(listing, rows, _COLUMNS, title="schedules")

    return run(main, endless=listing.watch)


def _row(schedule: Schedule, last: float | None, now: float) -> CronRow:
    job, upcoming = schedule.job, [at.isoformat() for at in schedule.upcoming(now, NEXT)]
    told = None if last is None else schedule.moment(last).isoformat()
    return CronRow(
        schedule.name, job.queue, job.kind, schedule.expression, schedule.zone, schedule.missed, told, upcoming
    )
