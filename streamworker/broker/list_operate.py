"""What people do by hand, in list mode."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from redis.exceptions import NoPermissionError

from streamworker.broker import Page, PendingEntry, WorkerInfo, list_listings
from streamworker.broker.client import Address, understood
from streamworker.broker.keys import ListKeys, worker_key
from streamworker.broker.list_settle import ListSender
from streamworker.broker.lists import refuse_cluster
from streamworker.broker.operating import Freed, Operating, told_to_none
from streamworker.broker.serving import Options
from streamworker.job import Claim, Depth


class ListOperator(Operating):
    """List mode of the `Operator` protocol."""

    def __init__(self, address: Address, options: Options, freed: Freed = told_to_none) -> None:
        refuse_cluster(address)
        namespace = options.namespace
        super().__init__(
            address, namespace, "", lambda queue: ListKeys(queue, namespace), lease=options.lease, freed=freed
        )

    async def open(self) -> None:
        """See `Operating.open`."""
        with understood(self._address), suppress(NoPermissionError):  # not everybody may ask for INFO
            refuse_cluster(self._address, await self._commands.info("server"))
        await super().open()

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
        # One page for all: what is claimed is no more than the workers have slots.
        del after
        (keys,) = self._lists([queue])
        held = await list_listings.pending(self._desk, keys, consumer)
        rows = [each for each in held if each.idle_ms >= min_idle * 1000 and only in (None, each.entry_id)]
        return await self._with_progress(Page(rows, None, len(held)))

    async def _claim(self, entry: PendingEntry) -> Claim | None:
        (keys,) = self._lists([entry.queue])
        wanted = (entry.entry_id.encode(), entry.deliveries)
        async for claim in list_listings.held(self._desk, keys, entry.worker_id):
            if (claim.entry, claim.count) == wanted:
                return claim
        return None

    def _sender(self, worker_id: str) -> ListSender:
        return ListSender(self._commands, worker_id)

    async def workers(self, queues: Sequence[str], *, everywhere: bool = True) -> list[WorkerInfo]:
        """See `Operator.workers`."""
        return await list_listings.workers(self._desk, self._lists(queues), everywhere=everywhere)

    async def prune(self, queues: Sequence[str], worker_id: str) -> bool:
        """See `Operator.prune`: a name that holds nothing lies nowhere."""
        if await self._desk.ask("EXISTS", worker_key(self._namespace, worker_id)):
            return False
        return not any([await self._desk.ask("LLEN", keys.claimed(worker_id)) for keys in self._lists(queues)])

    async def depth(self, queues: Sequence[str]) -> list[Depth]:
        """See `Operator.depth`."""
        return [await list_listings.depth(self._desk.run, keys) for keys in self._lists(queues)]

    async def departed(self, queues: Sequence[str]) -> list[int | None]:
        """See `Operator.departed`."""
        answers = await self._desk.gather([("HGET", keys.meta, "left") for keys in self._lists(queues)])
        return [None if isinstance(answer, Exception) else int(answer or 0) for answer in answers]

    async def queues(self) -> list[str]:
        """See `Operator.queues`."""
        return await list_listings.queues(self._desk)

    def _lists(self, queues: Sequence[str]) -> list[ListKeys]:
        return [ListKeys(queue, self._namespace) for queue in queues]
