"""What people do by hand, in stream mode."""

from __future__ import annotations

from collections.abc import Sequence

from streamworker.broker import Page, PendingEntry, WorkerInfo, listings, paging, scripts
from streamworker.broker.client import Address
from streamworker.broker.intake import document
from streamworker.broker.keys import QueueKeys, worker_key
from streamworker.broker.operating import Freed, Operating, told_to_none
from streamworker.broker.settle import StreamSender
from streamworker.broker.stream import StreamOptions
from streamworker.job import Claim, Depth


class StreamOperator(Operating):
    """Stream mode of the `Operator` protocol."""

    def __init__(self, address: Address, options: StreamOptions, freed: Freed = told_to_none) -> None:
        namespace = options.namespace
        super().__init__(
            address,
            namespace,
            options.group,
            lambda queue: QueueKeys(queue, namespace),
            lease=options.lease,
            freed=freed,
        )

    async def pending(
        self,
        queue: str,
        after: str = "",
        *,
        consumer: str | None = None,
        min_idle: float = 0.0,
        only: str | None = None,
    ) -> Page[PendingEntry]:
        """See `Operator.pending`."""
        page = await paging.pending(self._desk, self._key(queue), after, consumer, min_idle, only)
        return await self._with_progress(page)

    async def _claim(self, entry: PendingEntry) -> Claim | None:
        place = self._key(entry.queue).ready(entry.level)
        args = [self._group, entry.entry_id, entry.entry_id, 1, 0, entry.worker_id]
        _, rows = await self._desk.run(scripts.PENDING, [place], args)
        if not rows:
            return None
        body = document(rows[0][4] or [])
        return Claim(entry.queue, entry.level, place, entry.entry_id.encode(), entry.deliveries, body, b"")

    def _sender(self, worker_id: str) -> StreamSender:
        return StreamSender(self._commands, self._group, worker_id)

    async def workers(self, queues: Sequence[str], *, everywhere: bool = True) -> list[WorkerInfo]:
        """See `Operator.workers`."""
        return await listings.workers(self._desk, self._keys(queues), everywhere=everywhere)

    async def prune(self, queues: Sequence[str], worker_id: str) -> bool:
        """See `Operator.prune`."""
        if await self._desk.ask("EXISTS", worker_key(self._namespace, worker_id)):
            return False
        keys = self._keys(queues)
        for place in [place for each in keys for place in each.streams]:
            _, rows = await self._desk.run(scripts.PENDING, [place], [self._group, "-", "+", 1, 0, worker_id])
            if rows:
                return False
        # Each call looks again: a name with pending entries would take them along.
        answers = [await self._desk.run(scripts.LEAVE, each.streams, [self._group, worker_id]) for each in keys]
        return all(answers)

    # -- queues and the server

    async def depth(self, queues: Sequence[str]) -> list[Depth]:
        """See `Operator.depth`."""
        return [await listings.depth(self._desk, keys) for keys in self._keys(queues)]

    async def departed(self, queues: Sequence[str]) -> list[int | None]:
        """See `Operator.departed`."""
        counts = [int(await self._desk.run(scripts.FLOW, keys.streams, [])) for keys in self._keys(queues)]
        return [count if count >= 0 else None for count in counts]

    async def queues(self) -> list[str]:
        """See `Operator.queues`."""
        return await listings.queues(self._desk)
