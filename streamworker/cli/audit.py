"""``streamworker audit``: who did what to which jobs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Final

from streamworker.cli.options import LISTING, WORKER, Listing, QueueName, Seconds, WorkerFlags, run
from streamworker.cli.output import Column, plain, show
from streamworker.postgres import AuditRow
from streamworker.views.rows import moment

_COLUMNS: Final[list[Column[AuditRow]]] = [
    Column("at", lambda row: moment((row.at or 0.0) * 1000)),
    Column("who", lambda row: row.who, short=20),
    Column("from", lambda row: row.source),
    Column("action", lambda row: row.action),
    Column("queue", lambda row: row.queue or "", short=14),
    Column("job", lambda row: row.job_id or "", short=36),
    Column("kind", lambda row: row.kind or "", wide=True),
    Column("result", lambda row: row.result, short=20),
    Column("details", lambda row: row.details or "", rest=True),
]


def audit(
    *,
    queue: QueueName = None,
    job: str | None = None,
    who: str | None = None,
    since: Seconds | None = None,
    listing: Listing = LISTING,
    flags: WorkerFlags = WORKER,
) -> int:
    """List what operators did to jobs, queues, schedules and flows, newest first. It needs the ledger.

    Args:
        queue: Only to this queue.
        job: Only to the job, or the flow, with this id.
        who: Only by this operator.
        since: Only within these seconds.
    """
    settings = flags.settings()

    async def main() -> int:
        from streamworker.operators import require_archive  # noqa: PLC0415 - it imports redis

        async with AsyncExitStack() as stack:
            archive = await require_archive(stack, settings)

            async def rows() -> AsyncIterator[tuple[AuditRow, None]]:
                after = None if since is None else time.time() - since
                async for row in archive.audit(queue=queue, job_id=job, who=who, since=after):
                    yield row, None

            return await show(listing, rows, _COLUMNS, title="actions of operators", json=_row)

    return run(main, endless=listing.watch)


def _row(row: AuditRow) -> dict[str, Any]:
    return {**plain(row), "at": moment((row.at or 0.0) * 1000)}
