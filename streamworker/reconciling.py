"""Comparing the ledger with what lies in Redis, job by job: what should be there and is not is queued again."""

from __future__ import annotations

from datetime import datetime

from streamworker.handover import Dispatcher, Lost, Outbox
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.relay")


async def missing(outbox: Outbox, dispatcher: Dispatcher, queue: str, before: datetime) -> list[str]:
    """Ids of a queue's open jobs that lie nowhere in Redis; jobs that moved on since ``before`` are left out.

    Read in pages: a page of ids of the ledger is held in memory, and compared with all that lies in the queue. What
    seems lost is looked for once more: a job may have moved past the look.
    """
    found: list[str] = []
    after = ""
    while True:
        page = await outbox.open_ids(queue, after, before)
        if not page:
            return found
        after = page[-1]
        unseen = set(page)
        for _ in range(2):
            if unseen:
                async for ids in dispatcher.ids(queue):
                    unseen.difference_update(ids)
        found += sorted(unseen)


async def reconcile(outbox: Outbox, dispatcher: Dispatcher, queue: str, before: datetime) -> Lost:
    """Queue what is missing again."""
    gone = await outbox.lost(queue, await missing(outbox, dispatcher, queue, before), before)
    if gone.queued:
        log.warning("jobs_lost_by_redis", queue=queue, jobs=len(gone.queued), hint="they are dispatched again")
    return gone
