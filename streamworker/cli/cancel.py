"""``streamworker jobs cancel``: in the ledger, in Redis, or in both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec

from streamworker import following
from streamworker.app import App as StreamworkerApp
from streamworker.broker import Operator
from streamworker.cli.acting import Deed, act
from streamworker.cli.jobs import CONDITIONS, OPEN, Conditions, NamedIds, narrowed, redis_too, unambiguous
from streamworker.cli.options import ACTING, WORKER, Acting, QueueName, WorkerFlags
from streamworker.errors import UsageError
from streamworker.postgres import Archive, Status, Wanted
from streamworker.settings import EMBEDDED


def cancel(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    conditions: Conditions = CONDITIONS,
    all: bool = False,  # noqa: A002 - the flag's name
    acting: Acting = ACTING,
    flags: WorkerFlags = WORKER,
) -> int:
    """Keep jobs from running, and end those that run. Without a ledger, and for jobs that it does not know, --queue
    has to say where they lie.

    Args:
        ids: Job ids.
        queue: Of this queue.
        all: All that wait.
    """
    wanted = narrowed(conditions.wanted(queue, ids + named, OPEN), everything=all, verb="cancel")

    async def work(archive: Archive | None, operator: Operator | None) -> int:
        def barred(job: _Target) -> str | None:
            return None if job.status in (*OPEN, "running", None) else f"it is {job.status}"

        async def do(job: _Target) -> bool:
            return await following.cancel(archive, operator, job.queue, job.job_id) != "ended"

        deed = Deed("cancel", "cancelled", "job", do, msgspec.structs.asdict, barred)
        return await act(acting, _targets(archive, wanted, queue), deed, wanted.ids)

    settings = flags.settings()

    async def main() -> int:
        app = StreamworkerApp[Any](settings=settings)
        async with redis_too(settings) as operator:
            if settings.ledger != "off" and (settings.database_url or settings.redis_url == EMBEDDED):
                async with app.archive(settings) as archive:
                    return await work(archive, operator)
            if queue is None or not wanted.ids:
                raise UsageError("there is no ledger (DATABASE_URL is not set): say which jobs, and --queue")
            return await work(None, operator)

    return anyio.run(main)


class _Target(msgspec.Struct, frozen=True):
    """A job to be cancelled; ``kind`` and ``status`` as the ledger knows them."""

    queue: str
    job_id: str
    kind: str | None
    status: Status | None


async def _targets(archive: Archive | None, wanted: Wanted, queue: str | None) -> AsyncIterator[_Target]:
    """What the ledger knows of it, and what else was named: that can only lie in Redis."""
    known = set()
    if archive is not None:
        async for job in unambiguous(archive, wanted):
            known.add(job.id)
            yield _Target(job.queue, job.id, job.kind, job.status)
    if queue is not None:
        for job_id in sorted(wanted.ids - known):
            yield _Target(queue, job_id, None, None)
