"""The broker on Redis Streams: a consumer group per stream, the worker id as consumer, each move one Lua script."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Any, Final

import msgspec

from streamworker.broker import Ending, Hearing, Tick, Ticked, scripts
from streamworker.broker.bell import listen
from streamworker.broker.cancels import Cancels, cancel
from streamworker.broker.client import Address
from streamworker.broker.due import promote
from streamworker.broker.ears import Ears
from streamworker.broker.intake import UNKNOWN_EPOCH, Intake, document
from streamworker.broker.intakes import Intakes
from streamworker.broker.keys import QueueKeys, worker_key
from streamworker.broker.limits import Limiter
from streamworker.broker.link import Link
from streamworker.broker.publish import Publisher
from streamworker.broker.settle import StreamSender, settle
from streamworker.broker.tidy import tidy
from streamworker.broker.waiting import waiting
from streamworker.errors import ConfigurationError, Unreachable
from streamworker.job import Claim, Depth, Enqueued, Outgoing, Settled
from streamworker.limits import Answer, Asking, Hold
from streamworker.policy import SUSPECT_DELIVERIES
from streamworker.progress import Progress
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

RENEW_BATCH: Final = 500


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream broker is told.

    Attributes:
        queues: (name, cap) in the order they are taken; a cap bounds what one worker runs of the queue.
        group: the consumer group.
        namespace: goes before every key, as it is.
        lease: seconds a claim lives unrenewed.
        weighted: weighted order of levels instead of strict order.
    """

    queues: tuple[tuple[str, int | None], ...]
    group: str = "workers"
    namespace: str = ""
    lease: float = 15.0
    weighted: bool = False


class StreamBroker:
    """Stream mode of the `Broker` protocol; one instance serves one worker, or producers."""

    def __init__(self, address: Address, options: StreamOptions) -> None:
        self._options = options
        self._link = Link(address)
        self._publisher = Publisher(self._link.wires, address, lambda queue: QueueKeys(queue, options.namespace))
        queues = [(QueueKeys(name, options.namespace), cap) for name, cap in options.queues]
        self._keys = [keys for keys, _ in queues]
        self._homes = {place: keys for keys in self._keys for place in keys.streams}
        self._cancels = Cancels(self._link, self._keys)
        self._ears = Ears(address)
        self._tidy_at = 0.0
        self._last_confirmed: tuple[str, bytes, int] | None = None
        intake = Intakes if address.spread else Intake
        self._limits = Limiter(self._link, self._keys, lease=options.lease)
        self._intake = intake(self._link, queues, group=options.group, lease=options.lease, weighted=options.weighted)

    async def open(self) -> None:
        """See `Broker.open`."""
        uptime = await self._link.greet()
        # After a restart everyone alive gets one lease to renew before anybody is taken for dead.
        self._intake.rest(max(0.0, self._options.lease - uptime))

    async def join(self, worker_id: str) -> None:
        """See `Broker.join`."""
        self._intake.consumer = worker_id
        self._link.named(worker_id)
        if not self._keys:
            raise ConfigurationError("there is no queue to work on: register a handler, or set STREAMWORKER_QUEUES")
        for keys in self._keys:
            foreign, trouble = await self._intake.ensure(keys)
            if trouble:
                stream, _, problem = trouble[0].partition(" ")
                raise ConfigurationError(f"the stream {stream} cannot be used: {problem}")
            if foreign:
                stream, _, group = foreign[0].partition(" ")
                raise ConfigurationError(
                    f"the stream {stream} is also read by the group {group!r}, which would miss what streamworker "
                    "deletes when it is done: destroy that group (XGROUP DESTROY), or give one of them another queue"
                )

    async def leave(self) -> bool:
        """See `Broker.leave`."""
        gone = True
        for keys in self._keys:
            args = [self._options.group, self._intake.consumer]
            gone = bool(await self._link.run(scripts.LEAVE, keys.streams, args)) and gone
        with self._link.watched():
            await self._link.commands.delete(worker_key(self._options.namespace, self._intake.consumer))
        return gone

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
        await self._link.unblock()

    async def confirm(self, claim: Claim) -> Claim | None:
        """See `Broker.confirm`."""
        args = [self._options.group, self._intake.consumer, claim.entry, claim.count]
        # Remembered, because a lost reply leaves it to `strays` to see whether this delivery was counted. One is
        # enough: suspects run alone.
        self._last_confirmed = (claim.place, claim.entry, claim.count)
        if await self._link.run(scripts.CONFIRM, [claim.place], args):
            return msgspec.structs.replace(claim, count=claim.count + 1, suspect=False)
        return None

    def renew(self, claims: Collection[Claim]) -> list[Claim]:
        """See `Broker.renew`."""
        lost: list[Claim] = []
        by_place: dict[str, dict[bytes, Claim]] = {}
        for claim in claims:
            by_place.setdefault(claim.place, {})[claim.entry] = claim
        down: dict[object, Unreachable] = {}
        for place, mine in by_place.items():
            home = self._link.address.home(place)
            if home in down:
                continue
            entries = list(mine)
            for start in range(0, len(entries), RENEW_BATCH):
                args: list[Any] = [self._options.group, self._intake.consumer]
                for entry in entries[start : start + RENEW_BATCH]:
                    args += (entry, mine[entry].count)
                try:
                    lost += [mine[entry] for entry in self._link.in_thread(scripts.RENEW, [place], args)]
                except Unreachable as error:  # claims on other nodes of a cluster must not run out with these
                    down[home] = error
                    break
        for problem in down.values():
            raise problem
        return lost

    def cancelled(self, claims: Collection[Claim]) -> list[Claim]:
        """See `Broker.cancelled`."""
        return self._cancels.find(claims)

    async def cancel(self, queue: str, job_id: str) -> bool:
        """See `Broker.cancel`."""
        return await cancel(self._link, QueueKeys(queue, self._options.namespace), job_id)

    def ended(self, queues: Sequence[str], job_id: str) -> AbstractAsyncContextManager[Hearing]:
        """See `Broker.ended`."""
        keys = [QueueKeys(queue, self._options.namespace) for queue in queues]
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
            sender = StreamSender(self._link.wires, self._options.group, self._intake.consumer)
            return await settle(sender, self._homes, items)

    async def limit(self, queue: str, asking: Sequence[Asking], leaving: Sequence[Hold]) -> list[Answer]:
        """See `Broker.limit`."""
        return await self._limits.ask(self._intake.consumer, queue, asking, leaving)

    def retain(self, holds: Collection[Hold]) -> None:
        """See `Broker.retain`."""
        self._limits.retain(holds)

    async def strays(self, running: Collection[Claim]) -> list[Claim]:
        """See `Broker.strays`."""
        found: list[Claim] = []
        for keys, level, place in self._intake.spots:
            mine = [claim.entry for claim in running if claim.place == place]
            epoch = self._intake.epochs.get(keys.queue, UNKNOWN_EPOCH)
            args = [self._options.group, self._intake.consumer, *mine]
            for entry, count, fields in await self._link.run(scripts.STRAYS, [place], args):
                # Claimed for real, a count is at most one below a suspect's; from there on it was only reserved, unless
                # it is the one whose confirmation got through.
                counted = self._last_confirmed == (place, entry, count - 1)
                suspect = count >= SUSPECT_DELIVERIES - 1 and not counted
                found.append(Claim(keys.queue, level, place, entry, count, document(fields), epoch, suspect))
        return await self._cancels.judged(found, {keys.queue for keys in self._keys})

    async def tick(self) -> float:
        """See `Broker.tick`."""
        wait = await promote(self._link, self._keys)
        if monotonic() >= self._tidy_at:
            await self._tidy()
        return wait

    async def _tidy(self) -> None:
        lease = self._options.lease
        self._tidy_at = monotonic() + max(2.0, min(60.0, 4 * lease)) * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load
        for keys in self._keys:
            for name in await tidy(
                self._link, keys, self._options.group, namespace=self._options.namespace, idle=2 * lease
            ):
                log.info("consumer_pruned", queue=keys.queue, consumer=name)

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
        return [await depth(self._link, keys, self._options.group) for keys in self._keys]


async def depth(link: Link, keys: QueueKeys, group: str) -> Depth:
    """How much lies in one queue."""
    names = [*keys.streams, keys.due, keys.dead, keys.meta]
    entries, pending, delayed, dead, oldest, paused, inactive = await link.run(scripts.DEPTH, names, [group])
    age = oldest / 1000 if oldest >= 0 else None
    return Depth(
        keys.queue, max(0, entries - pending), pending, delayed, dead, age, bool(paused or inactive), bool(inactive)
    )
