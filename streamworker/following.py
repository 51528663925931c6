"""What an app offers to whoever has enqueued a job and wants to follow it, or to call it back."""

from __future__ import annotations

from typing import Final, Literal, Protocol, TypeAlias

from streamworker.archives import Archives
from streamworker.errors import UsageError
from streamworker.handlers import check_queue
from streamworker.postgres import FINAL, Archive
from streamworker.producing import Producer

Answer: TypeAlias = Literal["cancelled", "asked", "ended"]
"""What became of a call to `Follower.cancel`."""
NEVER_SENT: Final = "queued"
"""The status of a job that has not left the ledger."""


class Canceller(Protocol):
    """Who can cancel what lies in Redis: a broker, or an operator."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """See `Broker.cancel`."""


class Follower(Producer, Archives):
    """Follows jobs. An `App` says where they are."""

    def __init__(self) -> None:
        Producer.__init__(self)
        Archives.__init__(self)

    @property
    def queues(self) -> list[str]:
        """The queues this app has handlers for."""
        raise NotImplementedError

    async def cancel(self, job_id: str, /, *, queue: str | None = None) -> Answer:
        """Keep a job from running, or end it while it runs.

        A delayed job is deleted. A waiting one never starts: the worker that comes to it lets it go. A running one is
        told within a second: ``ctx.cancelled`` is true from then on, a handler that awaits is cancelled, and the job
        ends as cancelled, which is no failure: no retry, no dead letter. A handler that ends regularly all the same,
        without having looked, has done its work.

        Args:
            job_id: as `enqueue` returned it.
            queue: where it lies. Needed only if there is no ledger that knows the job, and this app has handlers for
                none or for several queues.

        Returns:
            ``cancelled``: it will not run any more. ``asked``: it waits or runs, or is not known at all; whoever has it
            is told. ``ended``: the ledger says that it is over, and nothing was done.

        Raises:
            UsageError: the app is not open, or nobody can tell where the job lies.
            Unreachable: a server does not answer.
        """
        broker, _ = self._outlet()
        if broker is None:
            raise UsageError("the app is not open: cancel inside `async with app:`")
        archive = await self._kept_archive()
        record = None if archive is None else await archive.find(job_id)
        where = record.queue if record is not None else self._where(queue)
        return await cancel(archive, broker, where, job_id)

    def _where(self, queue: str | None) -> str:
        """The queue of a job that no ledger knows."""
        if queue is not None:
            return check_queue(queue)
        if len(self.queues) == 1:
            return self.queues[0]
        raise UsageError(
            "nobody here can tell where this job lies: say queue=, or set DATABASE_URL if there is a ledger"
        )


async def cancel(archive: Archive | None, canceller: Canceller | None, queue: str, job_id: str) -> Answer:
    """Cancel a job, in the ledger first: whatever happens in Redis afterwards, nobody runs it again.

    Args:
        archive: the ledger, if there is one.
        canceller: for what lies in Redis; ``None`` where nobody said where that is.
        queue: of the job.
        job_id: which.

    Raises:
        UsageError: the job may be running, and nobody said where Redis is.
    """
    record = None if archive is None else await archive.find(job_id)
    if record is not None and (record.status in FINAL or record.status == "dead"):
        return "ended"
    if canceller is None:
        if archive is not None and await archive.cancel(job_id):
            return "cancelled"
        raise UsageError(f"the job {job_id} may be running: set REDIS_URL, so that its worker can be told")
    if archive is None or record is None:
        return "cancelled" if await canceller.cancel(queue, job_id) else "asked"
    final = await archive.cancel(job_id)
    if final and record.status == NEVER_SENT:
        return "cancelled"
    gone = await canceller.cancel(record.queue, job_id)
    return "cancelled" if final or gone else "asked"
