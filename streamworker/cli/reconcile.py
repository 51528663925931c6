"""``streamworker jobs reconcile``: jobs that the ledger holds for open and that lie nowhere in Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, NamedTuple

import anyio

from streamworker.app import App
from streamworker.cli.acting import Deed, act
from streamworker.cli.options import ACTING, WORKER, Acting, QueueName, WorkerFlags
from streamworker.errors import StreamworkerError


class Missing(NamedTuple):
    """A job that is missing in Redis, unchanged in the ledger since ``before``."""

    queue: str
    job_id: str
    before: datetime


def reconcile(queue: QueueName = None, *, acting: Acting = ACTING, flags: WorkerFlags = WORKER) -> int:
    """Compare the ledger with Redis job by job, and queue again what Redis lost.

    Relays do the same by themselves one lease after Redis shows a sign of loss. Jobs that lie in Redis, ready, held or
    delayed, are left alone.

    Args:
        queue: Only this queue; all the ledger knows unless given.
    """
    settings = flags.settings()

    async def main() -> int:
        async with App[Any](settings=settings).relaying(settings) as relaying:

            async def missing() -> AsyncIterator[Missing]:
                for name in [queue] if queue is not None else await relaying.known():
                    ids, before = await relaying.missing(name)
                    for job_id in ids:
                        yield Missing(name, job_id, before)

            async def again(job: Missing) -> bool:
                lost = await relaying.outbox.lost(job.queue, [job.job_id], job.before)
                if lost.locked:
                    raise StreamworkerError("a run of it is in its transaction: try again when that has ended")
                return bool(lost.queued)

            deed = Deed("queue again", "queued again", "lost job", again, _names)
            return await act(acting, missing(), deed)

    return anyio.run(main)


def _names(job: Missing) -> dict[str, Any]:
    return {"queue": job.queue, "job_id": job.job_id}
