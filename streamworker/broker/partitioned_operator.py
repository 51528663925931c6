"""`PartitionedOperator`: queues with partitions, as operators see and change them: each as one queue.

Rows name the queue. Handles and entry ids of partitions behind the first end in their number: ``1732380000000-0#3``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

from streamworker.broker import Finding, KindCount, Operator, Page, PendingEntry, Place, StoredJob, WorkerInfo
from streamworker.broker.cancel import cancel_in
from streamworker.broker.keys import home_name, queue_of_home
from streamworker.broker.listings import folded, partitioned
from streamworker.broker.operator import ERRORS, ListOperator, StreamOperator
from streamworker.broker.partitions import Partitions, PartitionSpec, partition_of
from streamworker.errors import UsageError
from streamworker.job import DeadError, Depth, Level, StoredDocument
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

R = TypeVar("R", PendingEntry, StoredJob)


class PartitionedOperator:
    """An `Operator` of queues with partitions, among others.

    Args:
        operator: sees each partition as a queue.
        partitions: all there are.
        told: those that the settings say, which `check` is about.
    """

    def __init__(self, operator: StreamOperator | ListOperator, partitions: Partitions, told: Partitions) -> None:
        self._operator: Final = operator
        self._partitions, self._told = partitions, told

    def __getattr__(self, name: str) -> Any:
        """Everything else is the operator's: what is about the server, a worker, or schedules."""
        return getattr(self._operator, name)

    def _homes(self, queues: Sequence[str]) -> list[str]:
        return [home for queue in queues for home in self._partitions.homes(queue)]

    async def _paged(
        self, queue: str, after: str, only: str | None, read: Callable[[str, str, str | None], Awaitable[Page[R]]]
    ) -> Page[R]:
        """A page of one partition after the other."""
        homes = self._partitions.homes(queue)
        if len(homes) == 1:
            return await read(queue, after, only)
        word, _, inside = after.partition("~")
        number, last = int(word) if word.isdigit() and len(word) < 5 else 0, len(homes) - 1
        if number > last or (after and not word.isdigit()):
            raise UsageError(f"no page begins at {after[:100]!a}: begin at the first one")
        if only is not None:
            only, number = self._place(queue, only)
            last = number
        page = await read(homes[number], inside, only)
        rows = [_shown(row, queue, number) for row in page.rows]
        if page.after is not None:
            return Page(rows, f"{number}~{page.after}", page.looked)
        return Page(rows, None if number == last else f"{number + 1}~", page.looked)

    def _place(self, queue: str, handle: str) -> tuple[str, int]:
        """(handle in its partition, the partition) of a row's handle."""
        head, mark, number = handle.rpartition("#")
        if mark and number.isdigit() and len(number) < 5 and 0 < int(number) < len(self._partitions.homes(queue)):
            return head, int(number)
        return handle, 0

    def _entry(self, entry: PendingEntry) -> PendingEntry:
        handle, number = self._place(entry.queue, entry.entry_id)
        return msgspec.structs.replace(entry, queue=home_name(entry.queue, number), entry_id=handle)

    def _job(self, job: StoredJob) -> StoredJob:
        handle, number = self._place(job.queue, job.handle)
        return msgspec.structs.replace(job, queue=home_name(job.queue, number), handle=handle)

    # -- pending

    async def pending(
        self,
        queue: str,
        after: str = "",
        *,
        consumer: str | None = None,
        min_idle: float = 0.0,
        only: str | None = None,
    ) -> Page[PendingEntry]:
        async def read(home: str, inside: str, one: str | None) -> Page[PendingEntry]:
            return await self._operator.pending(home, inside, consumer=consumer, min_idle=min_idle, only=one)

        return await self._paged(queue, after, only, read)

    async def body(self, entry: PendingEntry) -> bytes | None:
        return await self._operator.body(self._entry(entry))

    async def release(self, entry: PendingEntry) -> bool:
        return await self._operator.release(self._entry(entry))

    async def bury(self, entry: PendingEntry, reason: str) -> bool:
        return await self._operator.bury(self._entry(entry), reason)

    async def drop(self, entry: PendingEntry) -> bool:
        return await self._operator.drop(self._entry(entry))

    async def cancel(self, queue: str, job_id: str) -> bool:
        operator = self._operator
        return await cancel_in(
            self._partitions.homes(queue),
            lambda home: operator.cancel(home, job_id),
            lambda home: operator.uncancel(home, job_id),
        )

    async def uncancel(self, queue: str, job_id: str) -> bool:
        return any([await self._operator.uncancel(home, job_id) for home in self._partitions.homes(queue)])

    async def pass_on(self, queue: str, order: str, job_id: str) -> None:
        for home in self._partitions.homes(queue):
            await self._operator.pass_on(home, order, job_id)

    # -- delayed, ready and dead

    async def delayed(self, queue: str, after: str = "") -> Page[StoredJob]:
        return await self._paged(queue, after, None, lambda home, inside, _: self._operator.delayed(home, inside))

    async def delayed_job(self, queue: str, handle: str) -> StoredJob | None:
        inside, number = self._place(queue, handle)
        found = await self._operator.delayed_job(home_name(queue, number), inside)
        return None if found is None else _shown(found, queue, number)

    async def run_now(self, job: StoredJob) -> bool:
        return await self._operator.run_now(self._job(job))

    async def forget(self, job: StoredJob) -> bool:
        return await self._operator.forget(self._job(job))

    async def ready(self, queue: str, after: str = "") -> Page[StoredJob]:
        return await self._paged(queue, after, None, lambda home, inside, _: self._operator.ready(home, inside))

    async def change(
        self, job: StoredJob, body: bytes, *, queue: str, level: Level, due: float | None = None, park: bool = True
    ) -> bool:
        inside = self._job(job)
        homes = self._partitions.homes(queue)
        home = inside.queue if queue == job.queue else homes[partition_of(job.job_id or "", len(homes))]
        return await self._operator.change(inside, body, queue=home, level=level, due=due, park=park)

    async def dead(self, queue: str, after: str = "", *, only: str | None = None) -> Page[StoredJob]:
        return await self._paged(
            queue, after, only, lambda home, inside, one: self._operator.dead(home, inside, only=one)
        )

    async def errors(self, queue: str, after: str = "", *, ids: bool = False) -> list[DeadError]:
        """`DeadLetters.errors`: of all partitions, in the order of their entry ids."""
        homes = self._partitions.homes(queue)
        if len(homes) == 1:
            return await self._operator.errors(queue, after, ids=ids)
        handle, last = self._place(queue, after)
        found: list[tuple[tuple[int, int, int], DeadError]] = []
        end: tuple[int, int, int] | None = None
        for number, home in enumerate(homes):
            start = _before(handle) if handle and number > last else handle
            page = await self._operator.errors(home, start, ids=ids)
            for each in page:
                shown = each.handle if not number else f"{each.handle}#{number}"
                found.append(((*_entry_of(each.handle), number), msgspec.structs.replace(each, handle=shown)))
            if len(page) >= ERRORS:  # beyond its end this partition may have earlier ones than the others
                end = found[-1][0] if end is None else min(end, found[-1][0])
        return [each for key, each in sorted(found, key=lambda pair: pair[0]) if end is None or key <= end]

    async def replay(self, job: StoredJob) -> bool:
        return await self._operator.replay(self._job(job))

    async def erase(self, job: StoredJob) -> bool:
        return await self._operator.erase(self._job(job))

    # -- queues, workers and the server

    async def depth(self, queues: Sequence[str]) -> list[Depth]:
        return folded(await self._operator.depth(self._homes(queues)))

    async def departed(self, queues: Sequence[str]) -> list[int | None]:
        found: list[int | None] = []
        for queue in queues:
            counts = await self._operator.departed(self._partitions.homes(queue))
            known = [count for count in counts if count is not None]
            found.append(sum(known) if len(known) == len(counts) else None)
        return found

    async def waiting(self, queues: Sequence[str], limit: int) -> list[KindCount]:
        counts: Counter[tuple[str, Place, str | None]] = Counter()
        for each in await self._operator.waiting(self._homes(queues), limit):
            counts[queue_of_home(each.queue), each.place, each.kind] += each.count
        return [KindCount(queue, place, kind, count) for (queue, place, kind), count in sorted(counts.items(), key=str)]

    async def pause(self, queue: str, note: str) -> bool:
        return any([await self._operator.pause(home, note) for home in self._partitions.homes(queue)])

    async def resume(self, queue: str) -> bool:
        return any([await self._operator.resume(home) for home in self._partitions.homes(queue)])

    async def paused(self, queue: str) -> str | None:
        notes = [await self._operator.paused(home) for home in self._partitions.homes(queue)]
        return next((note for note in notes if note is not None), None)

    async def purge(self, queue: str, place: Place, limit: int) -> int:
        gone = 0
        for home in self._partitions.homes(queue):
            gone += await self._operator.purge(home, place, limit - gone) if gone < limit else 0
        return gone

    async def documents(self, queue: str) -> AsyncIterator[StoredDocument]:
        for home in self._partitions.homes(queue):
            async for found in self._operator.documents(home):
                yield msgspec.structs.replace(found, queue=queue)

    async def remove(self, found: StoredDocument) -> bool:
        home = next(
            (each for each in self._partitions.homes(found.queue)[1:] if f"{{{each}}}" in found.key), found.queue
        )
        return await self._operator.remove(msgspec.structs.replace(found, queue=home))

    async def forget_traces(self, queue: str, ids: Sequence[str]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for home in self._partitions.homes(queue):
            counts.update(await self._operator.forget_traces(home, ids))
        return dict(counts)

    async def refusal(self, queues: Sequence[str]) -> str | None:
        return await self._operator.refusal(self._homes(queues))

    async def findings(self, queues: Sequence[str]) -> list[Finding]:
        return await self._operator.findings([home for queue in queues for home in self._told.homes(queue)])

    async def workers(self, queues: Sequence[str], *, everywhere: bool = True) -> list[WorkerInfo]:
        found = await self._operator.workers(self._homes(queues), everywhere=everywhere)
        return [
            msgspec.structs.replace(each, queues=list(dict.fromkeys(queue_of_home(name) for name in each.queues)))
            for each in found
        ]

    async def prune(self, queues: Sequence[str], worker_id: str) -> bool:
        return await self._operator.prune(self._homes(queues), worker_id)


async def whole_queues(operator: StreamOperator | ListOperator, told: Iterable[PartitionSpec]) -> Operator:
    """An operator that sees each queue as one, also if the settings do not say that it has partitions.

    Args:
        operator: open; sees each partition as a queue.
        told: partitions by the settings.
    """
    told = list(told)
    counts = {queue: count for queue, count, _ in told}
    more = []
    for queue, (count, by_url) in (await partitioned(operator.session)).items():
        if count <= counts.get(queue, 1):
            continue
        if by_url:
            hint = (
                f"set STREAMWORKER_PARTITIONS={queue}=URL|URL|... as its workers have it: what is on servers that are "
                "not named here is missing"
            )
            log.warning("partitions_elsewhere", queue=queue, partitions=count, hint=hint)
        else:
            more.append((queue, count, ()))
    if not told and not more:
        return cast("Operator", operator)
    return cast("Operator", PartitionedOperator(operator, Partitions([*told, *more]), Partitions(told)))


def _shown(row: R, queue: str, number: int) -> R:
    """A row of a partition as one of its queue."""
    if isinstance(row, PendingEntry):
        handle = f"{row.entry_id}#{number}" if number else row.entry_id
        return msgspec.structs.replace(row, queue=queue, entry_id=handle)
    return msgspec.structs.replace(row, queue=queue, handle=f"{row.handle}#{number}" if number else row.handle)


def _entry_of(handle: str) -> tuple[int, int]:
    """The two numbers of an entry id."""
    moment, _, sequence = handle.partition("-")
    return (int(moment), int(sequence)) if moment.isdigit() and sequence.isdigit() else (0, 0)


def _before(handle: str) -> str:
    """The greatest entry id before another."""
    moment, sequence = _entry_of(handle)
    return f"{moment}-{sequence - 1}" if sequence else f"{max(0, moment - 1)}-{2**64 - 1}"
