"""The broker on Redis lists: elements are moved into a list of the worker's own, each move one Lua script.

For producers that push JSON to ``queue:*``. What is delayed or dead lies where stream mode has it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from time import monotonic
from typing import Any, ClassVar

import msgspec

from streamworker.broker import Ending, list_listings, scripts
from streamworker.broker.client import Address, clustered
from streamworker.broker.due import promote
from streamworker.broker.held import leased, unwrapped, wrapped
from streamworker.broker.keys import ListKeys
from streamworker.broker.list_intake import ListIntake
from streamworker.broker.list_settle import ListSender
from streamworker.broker.orphans import Orphans
from streamworker.broker.serving import RENEW_BATCH, Options, Serving
from streamworker.broker.settle import settle
from streamworker.broker.standby import standby
from streamworker.broker.taking import Taking
from streamworker.broker.tidy import forget_leases, tidy_pause
from streamworker.errors import ConfigurationError
from streamworker.job import Claim, Depth, Settled


class ListBroker(Serving[ListKeys, Taking]):
    """List mode of the `Broker` protocol; one instance serves one worker, or producers."""

    _taking: ClassVar[Callable[..., Taking]] = ListIntake

    def __init__(self, address: Address, options: Options) -> None:
        refuse_cluster(address)
        super().__init__(address, options)
        self._tidy_at = 0.0

    def _key(self, queue: str) -> ListKeys:
        return ListKeys(queue, self._options.namespace)

    def _take(self, queues: Sequence[tuple[ListKeys, int | None]]) -> Taking:
        lease, weighted = self._options.lease, self._options.weighted
        self._orphans = Orphans(self._link, self._keys, lease=lease)
        alone = self._options.alone_from
        return self._taking(self._link, queues, orphans=self._orphans, lease=lease, weighted=weighted, alone_from=alone)

    @property
    def _lease_ms(self) -> int:
        return round(self._options.lease * 1000)

    async def open(self) -> None:
        """See `Broker.open`."""
        with self._link.watched():
            refuse_cluster(self._link.address, await self._link.commands.info("server"))
        await super().open()

    async def join(self, worker_id: str) -> None:
        """See `Broker.join`."""
        self._intake.consumer = self._orphans.worker = worker_id
        self._link.named(worker_id)
        if not self._keys:
            raise ConfigurationError("there is no queue to work on: register a handler, or set STREAMWORKER_QUEUES")
        for keys in self._keys:
            if ":claimed:" in keys.queue:
                raise ConfigurationError(
                    f"the queue {keys.queue} has the name of what a worker holds in list mode: leave out :claimed:"
                )
            types = {**keys.types, keys.claimed(worker_id): "list"}
            for name, wanted in types.items():
                kind = (await self._link.ask("TYPE", name)).decode()
                if kind not in (wanted, "none"):
                    raise ConfigurationError(f"the key {name} is a {kind}, not a {wanted}: rename or delete it")
            await self._intake.seal(keys)
            await self._link.run(scripts.LEASE, [keys.meta], [worker_id, self._lease_ms])

    async def leave(self) -> bool:
        """See `Broker.leave`."""
        mine = [keys.claimed(self._intake.consumer) for keys in self._keys]
        held = [await self._link.ask("LLEN", name) for name in mine]
        for keys, jobs in zip(self._keys, held, strict=True):
            if not jobs:
                await self._link.run(scripts.LEASE, [keys.meta], [self._intake.consumer, 0])
        await self._link.ask("DEL", self._name)
        return not any(held)

    async def interrupt(self) -> None:
        """See `Broker.interrupt`."""
        self._intake.interrupt()
        await self._intake.unblock()

    async def confirm(self, claim: Claim) -> Claim | None:
        """See `Broker.confirm`."""
        keys, worker = self._homes[claim.place], self._intake.consumer
        counted = msgspec.structs.replace(claim, count=claim.count + 1, suspect=False)
        args = [leased(claim, worker), wrapped(claim), leased(counted, worker), wrapped(counted)]
        confirmed = await self._link.run(scripts.LIST_CONFIRM, [keys.claimed(worker), keys.leases], args)
        return counted if confirmed else None

    def renew(self, claims: Collection[Claim]) -> list[Claim]:
        """See `Broker.renew`."""
        by_queue: dict[ListKeys, dict[bytes, Claim]] = {}
        for claim in claims:
            by_queue.setdefault(self._homes[claim.place], {})[leased(claim, self._intake.consumer)] = claim
        lost: list[Claim] = []
        for keys, mine in by_queue.items():
            members, names = list(mine), [keys.leases, keys.claimed(self._intake.consumer), keys.meta]
            for start in range(0, len(members), RENEW_BATCH):
                batch = [self._intake.consumer, self._lease_ms, *members[start : start + RENEW_BATCH]]
                lost += [mine[member] for member in self._link.in_thread(scripts.LIST_RENEW, names, batch)]
        return lost

    def standby(self, longest: float) -> bytes | None:
        """See `Broker.standby`."""
        worker = self._intake.consumer
        calls = [([keys.leases, keys.claimed(worker)], [worker, self._lease_ms]) for keys in self._keys]
        lease = self._options.lease
        return standby(self._link.address, scripts.LIST_KEEP, calls, self._name, lease=lease, longest=longest)

    async def settle(self, items: Sequence[Ending]) -> list[Settled]:
        """See `Broker.settle`."""
        await self._link.fresh()
        refusals = self._refused()
        with self._link.watched():
            return await settle(ListSender(self._link.wires, self._intake.consumer), self._homes, items, refusals)

    async def strays(self, running: Collection[Claim]) -> list[Claim]:
        """See `Broker.strays`."""
        known = {(claim.queue, claim.entry) for claim in running}
        found: list[Claim] = []
        for keys in self._keys:
            wrappers = await self._link.ask("LRANGE", keys.claimed(self._intake.consumer), 0, -1)
            secret = self._intake.secrets.get(keys.queue, b"")
            claims = [unwrapped(keys, wrapper, secret) for wrapper in wrappers]
            found += [claim for claim in claims if claim is not None and (keys.queue, claim.entry) not in known]
        return await self._cancels.judged(found, {keys.queue for keys in self._keys})

    async def tick(self) -> float:
        """See `Broker.tick`."""
        wait = await promote(self._link, self._keys)
        # Here too, because nobody claims while all slots are busy.
        self._orphans.rest_after_outage()
        if monotonic() >= self._tidy_at:
            self._tidy_at = monotonic() + tidy_pause(self._options.lease)
            for keys in self._keys:
                await forget_leases(self._link, keys, self._options.namespace, self._holds_nothing_of(keys))
        return min(wait, await self._orphans.give_back(None))

    def _holds_nothing_of(self, keys: ListKeys) -> Callable[[str], Awaitable[bool]]:
        async def gone(worker: str) -> bool:
            return not await self._link.ask("LLEN", keys.claimed(worker))

        return gone

    async def depth(self) -> list[Depth]:
        """See `Broker.depth`."""
        return [await list_listings.depth(self._link.run, keys) for keys in self._keys]


def refuse_cluster(address: Address, info: dict[str, Any] | None = None) -> None:
    """List mode moves jobs between keys that a cluster keeps on different nodes.

    Args:
        address: where it would work.
        info: INFO's section "server", once that is known.

    Raises:
        ConfigurationError: there is a cluster.
    """
    if address.spread or (info is not None and clustered(info)):
        raise ConfigurationError(
            f"list mode cannot use the Redis Cluster at {address}, whose nodes would share a queue's lists: set "
            "STREAMWORKER_MODE=stream, or use a single server or Sentinel"
        )
