"""What an app offers to whoever has enqueued a job and wants to follow it, or to call it back."""

from __future__ import annotations

from time import monotonic
from typing import Any, Final, Literal, Protocol, TypeAlias

import msgspec

from streamworker import notes
from streamworker.archives import Archives
from streamworker.broker import Hearing
from streamworker.errors import JobCancelled, JobDead, ResultNotKept, ResultTimeout, UsageError
from streamworker.handlers import check_queue
from streamworker.postgres import FINAL, Archive
from streamworker.producing import Producer

Answer: TypeAlias = Literal["cancelled", "asked", "ended"]
"""What became of a call to `Follower.cancel`."""
LOOK: Final = 10.0
"""Seconds between looks while nothing is heard: what was told while the connection was down is found then."""
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
                none or for several queues; or if several queues have a job with this id.

        Returns:
            ``cancelled``: it will not run any more. ``asked``: it waits or runs, or is not known at all; whoever has it
            is told. ``ended``: the ledger says that it is over, and nothing was done.

        Raises:
            UsageError: the app is not open, or open on another event loop, or nobody can tell where the job lies.
            Unreachable: a server does not answer.
        """
        broker = self._outlet()
        if broker is None:
            raise UsageError("the app is not open: cancel inside `async with app:`")
        archive = await self._kept_archive()
        record = None if archive is None else await archive.find(job_id, queue)
        where = record.queue if record is not None else self._where(queue)
        return await cancel(archive, broker, where, job_id)

    async def result(self, job_id: str, /, *, timeout: float | None = None, queue: str | None = None) -> Any:
        """What a job's handler returned, as soon as the job has ended. Waits for an event, and polls nothing.

        With a ledger results are there for as long as it remembers the job. Without one they are kept in Redis for
        ``result_ttl`` seconds, if the handler says so; other jobs can be waited for, too, but leave nothing to return.

        Args:
            job_id: as `enqueue` returned it.
            timeout: seconds to wait at most; ``None`` waits for as long as it takes.
            queue: where the job lies; unless given, wherever the ledger says, or any queue that this app has handlers
                for. Needed if several queues have a job with this id.

        Raises:
            JobDead: the job is a dead letter.
            JobCancelled: somebody cancelled it.
            ResultNotKept: it is completed, and what its handler returned was not kept, or could not be.
            ResultTimeout: it has not ended in time; it goes on.
            UsageError: the app is not open, or open on another event loop, or nobody can tell where the job lies.
            Unreachable: a server does not answer.
        """
        broker = self._outlet()
        if broker is None:
            raise UsageError("the app is not open: wait for results inside `async with app:`")
        archive = await self._kept_archive()
        record = None if archive is None else await archive.find(job_id, queue)
        queues = [record.queue] if record is not None else [check_queue(queue)] if queue is not None else self.queues
        if not queues:
            raise UsageError("nobody here can tell where this job lies: say queue=")
        end = None if timeout is None else monotonic() + timeout
        async with broker.ended(queues, job_id) as hearing:
            return await _await_result(hearing, archive, (queues[0] if len(queues) == 1 else None, job_id), end)

    def _where(self, queue: str | None) -> str:
        """The queue of a job that no ledger knows."""
        if queue is not None:
            return check_queue(queue)
        if len(self.queues) == 1:
            return self.queues[0]
        raise UsageError(
            "nobody here can tell where this job lies: say queue=, or set DATABASE_URL if there is a ledger"
        )


async def _await_result(
    hearing: Hearing, archive: Archive | None, job: tuple[str | None, str], end: float | None
) -> Any:
    """Look, then listen, and look again when there may be something new; ``job`` is its queue, if known, and its id."""
    _, job_id = job
    while True:
        note = await _noted(hearing, archive, *job)
        look_at = monotonic() + LOOK
        while note is None:
            left = min(look_at, end if end is not None else look_at) - monotonic()
            told = await hearing.heard(max(0.0, left))
            if told is None and end is not None and monotonic() >= end:
                raise ResultTimeout(
                    f"the job {job_id} has not ended yet, or longer ago than its result is kept (result_ttl): wait for "
                    "longer, or look at it",
                    job_id,
                )
            if not told:
                break
            note = notes.read(told)
            if note is not None and note.status == "completed" and not bytes(note.result):
                # Told by a worker that keeps nothing in Redis: the ledger has it, if there is one.
                note = await _noted(hearing, archive, *job) or note
        if note is not None:
            return _value(note, job_id)


async def _noted(hearing: Hearing, archive: Archive | None, queue: str | None, job_id: str) -> notes.Note | None:
    """What is kept of a job's end, in Redis or in the ledger."""
    kept = await hearing.kept()
    note = notes.read(kept) if kept is not None else None
    if note is not None and (archive is None or note.status != "completed" or bytes(note.result)):
        return note
    record = None if archive is None else await archive.find(job_id, queue)
    if record is None or record.status not in ("completed", "dead", "cancelled"):
        return note
    lost = record.result is None and record.error is not None
    kept_none = record.status != "completed" or lost
    result = msgspec.Raw() if kept_none else msgspec.Raw(msgspec.json.encode(record.result))
    return notes.Note(record.status, result, record.error)


def _value(note: notes.Note, job_id: str) -> Any:
    if note.status == "dead":
        why = note.error or "nobody said why"
        raise JobDead(f"the job {job_id} is a dead letter ({why}): look at it, and retry or drop it", job_id, why)
    if note.status == "cancelled":
        raise JobCancelled(f"the job {job_id} was cancelled", job_id)
    if not bytes(note.result):
        why = note.error or "set result_ttl on its handler, or use the ledger"
        raise ResultNotKept(f"the job {job_id} is completed, but has no result: {why}", job_id)
    return msgspec.json.decode(note.result)


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
    record = None if archive is None else await archive.find(job_id, queue)
    if record is not None and (record.status in FINAL or record.status == "dead"):
        return "ended"
    if canceller is None:
        if archive is not None and await archive.cancel(queue, job_id):
            return "cancelled"
        raise UsageError(f"the job {job_id} may be running: set REDIS_URL, so that its worker can be told")
    if archive is None or record is None:
        return "cancelled" if await canceller.cancel(queue, job_id) else "asked"
    final = await archive.cancel(queue, job_id)
    if final and record.status == NEVER_SENT:
        return "cancelled"
    gone = await canceller.cancel(queue, job_id)
    return "cancelled" if final or gone else "asked"
