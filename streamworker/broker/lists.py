"""The broker on Redis lists: elements are moved into a list of the worker's own, each move one Lua script.

For producers that push JSON to ``queue:*``. What is delayed or dead lies where stream mode has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import msgspec

from streamworker.broker import Ending, Hearing, Tick, Ticked, list_listings, scripts
from streamworker.broker.bell import listen
from streamworker.broker.cancels import Cancels, cancel
from streamworker.broker.client import Address, clustered
from streamworker.broker.due import promote
from streamworker.broker.ears import Ears
from streamworker.broker.held import leased, unwrapped, wrapped
from streamworker.broker.keys import ListKeys, worker_key
from streamworker.broker.limits import Limiter
from streamworker.broker.link import Link
from streamworker.broker.list_intake import ListIntake
from streamworker.broker.list_settle import ListSender
from streamworker.broker.orphans import Orphans
from streamworker.broker.publish import Publisher
from streamworker.broker.settle import settle
from streamworker.broker.taking import Taking
from streamworker.broker.waiting import waiting
from streamworker.errors import ConfigurationError
from streamworker.job import Claim, Depth, Enqueued, Outgoing, Settled
from streamworker.limits import Answer, Asking, Hold
from streamworker.progress import Progress

RENEW_BATCH: Final = 500


class ListOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a list broker is told.

    Attributes:
        queues: (name, cap) in the order they are taken; a cap bounds what one worker runs of the queue.
        namespace: goes before every key but the lists that producers push to.
        lease: seconds a claim lives unrenewed.
        weighted: weighted order of levels instead of strict order.
    """

    queues: tuple[tuple[str, int | None], ...]
    namespace: str = ""
    lease: float = 15.0
    weighted: bool = False


class ListBroker:
    """List mode of the `Broker` protocol; one instance serves one worker, or producers."""

    def __init__(self, address: Address, options: ListOptions) -> None:
        refuse_cluster(address)
        self._options = options
        self._link = Link(address)
        self._publisher = Publisher(self._link.wires, address, lambda queue: ListKeys(queue, options.namespace))
        queues = [(ListKeys(name, options.namespace), cap) for name, cap in options.queues]
        self._keys = [keys for keys, _ in queues]
        self._homes = {place: keys for keys in self._keys for place in keys.lists}
        self._cancels = Cancels(self._link, self._keys)
        self._ears = Ears(address)
        self._orphans = Orphans(self._link, self._keys, lease=options.lease)
        self._limits = Limiter(self._link, self._keys, lease=options.lease)
        self._intake = self._make_intake(queues)

    def _make_intake(self, queues: Sequence[tuple[ListKeys, int | None]]) -> Taking:
        options = self._options
        return ListIntake(self._link, queues, orphans=self._orphans, lease=options.lease, weighted=options.weighted)

    async def open(self) -> None:
        """See `Broker.open`."""
        with self._link.watched():
            refuse_cluster(self._link.address, await self._link.commands.info("server"))
        uptime = await self._link.greet()
        # After a restart everyone alive gets one lease to renew before anybody is taken for dead.
        self._intake.rest(max(0.0, self._options.lease - uptime))

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

    async def leave(self) -> bool:
        """See `Broker.leave`."""
        mine = [keys.claimed(self._intake.consumer) for keys in self._keys]
        held = [await self._link.ask("LLEN", name) for name in mine]
        await self._link.ask("DEL", worker_key(self._options.namespace, self._intake.consumer))
        return not any(held)

    async def close(self) -> None:
        """See `Broker.close`."""
        await self._ears.close()
        await self._intake.close()
        await self._link.close()

    async def publish(self, jobs: Sequence[Outgoing]) -> list[Enqueued]:
        """See `Broker.publish`."""
        return await self._publisher.publish(jobs)

    async def propose(self, tick: Tick) -> Ticked:
        """See `Broker.propose`."""
        return await self._publisher.propose(tick)

    async def claim(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """See `Broker.claim`."""
        return await self._cancels.judged(await self._intake.claim(limit, wait, running), self._intake.marked)

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
            members, names = list(mine), [keys.leases, keys.claimed(self._intake.consumer)]
            for start in range(0, len(members), RENEW_BATCH):
                batch = members[start : start + RENEW_BATCH]
                lost += [mine[member] for member in self._link.in_thread(scripts.LIST_RENEW, names, batch)]
        return lost

    def cancelled(self, claims: Collection[Claim]) -> list[Claim]:
        """See `Broker.cancelled`."""
        return self._cancels.find(claims)

    async def cancel(self, queue: str, job_id: str) -> bool:
        """See `Broker.cancel`."""
        return await cancel(self._link, ListKeys(queue, self._options.namespace), job_id)

    def ended(self, queues: Sequence[str], job_id: str) -> AbstractAsyncContextManager[Hearing]:
        """See `Broker.ended`."""
        keys = [ListKeys(queue, self._options.namespace) for queue in queues]
        return waiting(self._link, self._ears, keys, job_id)

    def progress(self, told: Mapping[str, Progress], ended: Collection[str]) -> None:
        """See `Broker.progress`."""
        key = worker_key(self._options.namespace, self._intake.consumer)
        self._link.progress(key, self._options.lease, told, ended)

    def beat(self, report: dict[str, str | int | float]) -> None:
        """See `Broker.beat`."""
        self._link.beat(worker_key(self._options.namespace, self._intake.consumer), self._options.lease, report)

    async def settle(self, items: Sequence[Ending]) -> list[Settled]:
        """See `Broker.settle`."""
        await self._link.fresh()
        with self._link.watched():
            return await settle(ListSender(self._link.wires, self._intake.consumer), self._homes, items)

    async def limit(self, queue: str, asking: Sequence[Asking], leaving: Sequence[Hold]) -> list[Answer]:
        """See `Broker.limit`."""
        return await self._limits.ask(self._intake.consumer, queue, asking, leaving)

    def retain(self, holds: Collection[Hold]) -> None:
        """See `Broker.retain`."""
        self._limits.retain(holds)

    async def strays(self, running: Collection[Claim]) -> list[Claim]:
        """See `Broker.strays`."""
        known = {(claim.queue, claim.entry) for claim in running}
        found: list[Claim] = []
        for keys in self._keys:
            wrappers = await self._link.ask("LRANGE", keys.claimed(self._intake.consumer), 0, -1)
            claims = [unwrapped(keys, wrapper) for wrapper in wrappers]
            found += [claim for claim in claims if claim is not None and (keys.queue, claim.entry) not in known]
        return await self._cancels.judged(found, {keys.queue for keys in self._keys})

    async def tick(self) -> float:
        """See `Broker.tick`."""
        wait = await promote(self._link, self._keys)
        # Here too, because nobody claims while all slots are busy.
        self._orphans.rest_after_outage()
        return min(wait, await self._orphans.give_back(None))

    async def listen(self, parked: Callable[[float], None], cancelled: Callable[[], None] = lambda: None) -> None:
        """See `Broker.listen`."""

        def told(channel: bytes) -> None:
            self._cancels.rang(channel)
            cancelled()

        await listen(self._link.address, [keys.due for keys in self._keys], parked, self._intake, told)

    @property
    def reconnects(self) -> int:
        """See `Broker.reconnects`."""
        return self._link.reconnects()

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
