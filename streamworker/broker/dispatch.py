"""The relay's side of Redis: jobs out of the ledger are added at most once, and lost ones are noticed.

How long must an addition be remembered? Each attempt of a relay is valid for a few seconds, by the server's clock (the
script refuses later ones); a row is only taken over by another relay after that. So at any moment at most one attempt
per (id, hop) can still add something, and once the ledger knows that the job is there, none is left: the memory ends
with `forget`. What a relay that dies in between leaves behind is found there by whoever takes the row over.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic
from typing import Any, Final

from streamworker.broker import Tick, Ticked, list_listings, listings, scripts
from streamworker.broker.client import Address
from streamworker.broker.due import promote
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.link import Link
from streamworker.broker.listings import Desk, derived_from, text
from streamworker.broker.publish import Publisher
from streamworker.codec import derived_id, glance
from streamworker.errors import StreamworkerError
from streamworker.handover import Dispatch, Dispatched, Pulse
from streamworker.job import LEVELS

FORGET: Final = 30 * 86_400_000
"""Milliseconds after which even what no relay ever noted is forgotten."""
MEMBERS: Final = 1000


class RedisDispatcher:
    """The `Dispatcher` of both modes: ``keys`` knows where ready jobs lie.

    Args:
        address: where Redis is.
        keys: the keys of a queue, by its name.
        group: the consumer group of streams.
        namespace: goes before every key.
    """

    def __init__(self, address: Address, keys: Callable[[str], QueueKeys], *, group: str, namespace: str) -> None:
        self._link = Link(address)
        self._keys = keys
        self._group = group
        self._desk = Desk(self._link.commands, address, group, namespace)
        self._publisher = Publisher(self._link.wires, address, keys)
        self._clocks: dict[object, float] = {}

    async def open(self) -> None:
        """Check the server.

        Raises:
            ConfigurationError: a server answers that cannot be used.
            Unreachable: none does.
        """
        await self._link.greet()

    async def close(self) -> None:
        """See `Dispatcher.close`."""
        await self._link.close()

    async def dispatch(self, queue: str, jobs: Sequence[Dispatch], until: float) -> Dispatched | None:
        """See `Dispatcher.dispatch`."""
        keys = self._keys(queue)
        home = self._link.address.home(keys.meta)
        if home not in self._clocks:
            await self.pulses([queue])
        names = [keys.meta, keys.relayed, *keys.places]
        for _ in range(2):
            args: list[Any] = [keys.shape, round(until * 1000 + self._clocks[home]), secrets.token_hex(8), FORGET]
            for job in jobs:
                args += (LEVELS.index(job.level) + 3, f"{job.id}/{job.hop}", job.body)
            now, done, epoch, results = await self._link.run(scripts.DISPATCH, names, args)
            self._clocks[home] = now - monotonic() * 1000
            if done != b"groups":
                break
            await self.found(queue)
        if done != b"added":
            return None
        errors = [result for result in results if isinstance(result, bytes)]
        there = [not isinstance(result, bytes) for result in results]
        return Dispatched(text(epoch), there, text(errors[0]) if errors else "")

    async def forget(self, queue: str, jobs: Sequence[Dispatch]) -> None:
        """See `Dispatcher.forget`."""
        if jobs:
            await self._desk.ask("ZREM", self._keys(queue).relayed, *(f"{job.id}/{job.hop}" for job in jobs))

    async def pulses(self, queues: Sequence[str]) -> list[Pulse]:
        """See `Dispatcher.pulses`."""
        # All queues in one call, unless a cluster keeps them in different slots.
        together = [[queue] for queue in queues] if self._link.address.spread else [queues] if queues else []
        found = []
        for group in together:
            names = [self._keys(queue).meta for queue in group]
            now, server, *rows = await self._link.run(scripts.PULSE, names, [])
            self._clocks[self._link.address.home(names[0])] = now - monotonic() * 1000
            for queue, (epoch, relayed, held) in zip(group, rows, strict=True):
                found.append(Pulse(queue, text(epoch), relayed, text(server), held=bool(held)))
        return found

    async def found(self, queue: str) -> None:
        """See `Dispatcher.found`."""
        keys, fresh = self._keys(queue), secrets.token_hex(8)
        if keys.shape == "list":
            await self._desk.ask("HSETNX", keys.meta, "epoch", fresh)
            return
        names = [keys.meta, keys.ids, *keys.streams]
        _, _, trouble, _ = await self._link.run(scripts.GROUPS, names, [self._group, fresh])
        if trouble:
            stream, _, problem = text(trouble[0]).partition(" ")
            raise StreamworkerError(f"the stream {stream} cannot be used: {problem}")

    async def hold(self, queue: str, *, held: bool) -> None:
        """See `Dispatcher.hold`."""
        keys = self._keys(queue)
        await self._link.run(scripts.HOLD, [keys.meta, keys.due], [int(held)])

    async def ids(self, queue: str) -> AsyncIterator[list[str]]:
        """See `Dispatcher.ids`: delayed, ready, delayed again, so that a job that moves meanwhile is met on the way."""
        keys = self._keys(queue)
        async for page in self._parked(keys):
            yield page
        async for page in self._lying(keys) if isinstance(keys, ListKeys) else self._streamed(keys):
            yield page
        async for page in self._parked(keys):
            yield page

    async def _parked(self, keys: QueueKeys) -> AsyncIterator[list[str]]:
        cursor: Any = 0
        while True:
            cursor, pairs = await self._desk.ask("ZSCAN", keys.due, cursor, "COUNT", MEMBERS)
            # A member is LEVEL/JOBID/random.
            yield [text(member).partition("/")[2].rpartition("/")[0] for member, _ in pairs]
            if not int(cursor):
                return

    async def _streamed(self, keys: QueueKeys) -> AsyncIterator[list[str]]:
        for level in LEVELS:
            place, start = keys.stream(level), "-"
            epoch = await derived_from(self._desk, keys, level)
            while True:
                page = await self._desk.ask("XRANGE", place, start, "+", "COUNT", listings.PAGE)
                named = [(entry, glance((fields or {}).get(b"job"))[0]) for entry, fields in page]
                yield [name or derived_id(place, epoch, entry) for entry, name in named]
                if len(page) < listings.PAGE:
                    break
                start = f"({text(page[-1][0])}"

    async def _lying(self, keys: ListKeys) -> AsyncIterator[list[str]]:
        # From the left, where new ones come in: what moves on meanwhile moves towards us, or away for good.
        for place in keys.places:
            start = 0
            while True:
                page = await self._desk.ask("LRANGE", place, start, start + listings.PAGE - 1)
                yield [name for name in (glance(body)[0] for body in page) if name]
                if len(page) < listings.PAGE:
                    break
                start += listings.PAGE
        held = await list_listings.pending(self._desk, keys, None)
        yield [entry.job_id for entry in held if entry.job_id is not None]

    async def promote(self, queues: Sequence[str]) -> float:
        """See `Dispatcher.promote`."""
        return await promote(self._link, [self._keys(queue) for queue in queues])

    async def propose(self, tick: Tick) -> Ticked:
        """See `Broker.propose`."""
        return await self._publisher.propose(tick)

    async def queues(self) -> list[str]:
        """See `Dispatcher.queues`."""
        if isinstance(self._keys("any"), ListKeys):
            return await list_listings.queues(self._desk)
        return await listings.queues(self._desk)
