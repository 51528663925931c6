"""Ending claims in list mode; the fence is the exact string in the worker's own list."""

from __future__ import annotations

import time
from typing import Any

from streamworker.broker import Ending, scripts
from streamworker.broker.held import leased, wrapped
from streamworker.broker.keys import ListKeys, QueueKeys, worker_key
from streamworker.broker.settle import Code, freed, kept_at, note, obituary, parking, tell
from streamworker.errors import UsageError
from streamworker.job import Claim


class ListSender:
    """Claims in the list of one worker. See `Sender`.

    Args:
        client: what to send with.
        worker: whose claims these are.
    """

    def __init__(self, client: scripts.AsyncCaller, worker: str) -> None:
        self._client, self._worker = client, worker
        self.waited = False

    def _fence(self, claim: Claim) -> tuple[bytes, bytes]:
        """(member of the lease set, string in the worker's list)."""
        return leased(claim, self._worker), wrapped(claim)

    async def done(self, keys: QueueKeys, items: list[Ending]) -> list[Code]:
        """See `Sender.done`."""
        lists = as_lists(keys)
        args: list[Any] = []
        for item in items:
            args += self._fence(item.claim)
        names = [lists.claimed(self._worker), lists.leases, lists.meta]
        codes: list[Code]
        *codes, waited = await scripts.LIST_DONE(self._client, names, args)
        self.waited = bool(waited)
        return codes

    async def tell(self, keys: QueueKeys, items: list[Ending]) -> None:
        """See `Sender.tell`."""
        await tell(self._client, keys, items)

    async def finish(self, keys: QueueKeys, items: list[Ending]) -> list[Code]:
        """See `Sender.finish`."""
        lists = as_lists(keys)
        names = [lists.claimed(self._worker), lists.leases, lists.meta, lists.cancelled]
        names += kept_at(keys, items)
        args: list[Any] = []
        for item in items:
            args += (*self._fence(item.claim), item.job_id, *note(item), freed(item, keys, names))
        return list(await scripts.LIST_FINISH(self._client, names, args))

    async def park(self, keys: QueueKeys, items: list[Ending]) -> list[Code]:
        """See `Sender.park`."""
        lists = as_lists(keys)
        now = time.time()
        args: list[Any] = []
        for item in items:
            args += (*self._fence(item.claim), *parking(item, now))
        names = [lists.claimed(self._worker), lists.leases, items[0].claim.place, lists.due, lists.bodies, lists.meta]
        names += [worker_key(lists.namespace, self._worker), lists.calls]
        return list(await scripts.LIST_PARK(self._client, names, args))

    async def bury(self, keys: QueueKeys, items: list[Ending]) -> list[Code]:
        """See `Sender.bury`."""
        lists = as_lists(keys)
        args: list[Any] = []
        for item in items:
            claim = item.claim
            told = {"job": claim.body or b"", **obituary(item)}
            told |= {"deliveries": claim.count, "worker": self._worker, "entry": claim.entry}
            args = args or [2 * len(told)]
            args += (*self._fence(claim), *note(item))
            for pair in told.items():
                args += pair
        names = [lists.claimed(self._worker), lists.leases, lists.dead, lists.meta]
        names += [worker_key(lists.namespace, self._worker), *(keys.result(item.job_id) for item in items)]
        return list(await scripts.LIST_BURY(self._client, names, args))


def as_lists(keys: QueueKeys) -> ListKeys:
    """The keys as those of list mode."""
    if not isinstance(keys, ListKeys):
        raise UsageError(f"the queue {keys.queue} is not one of list mode")
    return keys
