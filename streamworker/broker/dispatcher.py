"""The relay's side of Redis: jobs out of the ledger are added at most once, and lost ones are noticed.

How long must an addition be remembered? Each attempt of a relay is valid for a few seconds, by the server's clock (the
script refuses later ones); a row is only taken over by another relay after that. So at any moment at most one attempt
per (id, hop) can still add something, and once the ledger knows that the job is there, none is left: the memory ends
with `forget`. What a relay that dies in between leaves behind is found there by whoever takes the row over.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

from streamworker.broker import CronTick, CronTickResult, listings, scripts
from streamworker.broker.base import Publisher, promote
from streamworker.broker.keys import ListKeys, QueueKeys, of_due_member
from streamworker.broker.listings import derived_from
from streamworker.broker.redis.client import Address
from streamworker.broker.redis.session import OperatorSession, Session, text
from streamworker.codec import MOST_HOPS, derived_id, id_in, read
from streamworker.errors import InvalidJob, StreamworkerError
from streamworker.job import LEVELS
from streamworker.relay import Dispatch, Dispatched, Pulse

FORGET: Final = 30 * 86_400_000
"""Milliseconds after which even what no relay ever noted is forgotten."""
MEMBERS: Final = 1000
MOST_COPIES: Final = 200_000
"""Most jobs of a queue whose hops are remembered from one look to the next."""
REMEMBERED: Final = 10
"""How many times as long as a look took it is remembered."""


class _Copies:
    """What a look at a whole queue found of jobs that were put on a stream before.

    Args:
        wanted: ids that are kept however many there are.
    """

    def __init__(self, wanted: Mapping[str, int]) -> None:
        self._wanted = wanted
        self._began = monotonic()
        self.until = 0.0
        """Seconds of the monotonic clock up to which this is taken for true."""
        self.hops: dict[str, int] = {}
        self.parked: dict[str, set[bytes]] = {}

    def entries(self, page: Sequence[tuple[str, int]]) -> None:
        """Ready and held ones, with their hops."""
        for job_id, hop in page:
            if hop and (job_id in self._wanted or len(self.hops) < MOST_COPIES):
                self.hops[job_id] = max(hop, self.hops.get(job_id, 0))

    def members(self, page: Sequence[tuple[str, bytes]]) -> None:
        """Delayed ones, whose documents are not looked at before they are asked for."""
        for job_id, member in page:
            if job_id in self._wanted or len(self.parked) < MOST_COPIES:
                self.parked.setdefault(job_id, set()).add(member)

    def close(self) -> None:
        """That was all."""
        if max(len(self.hops), len(self.parked)) < MOST_COPIES:
            now = monotonic()
            self.until = now + max(0.2, REMEMBERED * (now - self._began))


class RedisDispatcher:
    """The `Dispatcher` of both modes: ``keys`` knows where ready jobs lie.

    Args:
        address: where Redis is.
        keys: the keys of a queue, by its name.
        group: the consumer group of streams.
        namespace: goes before every key.
    """

    def __init__(self, address: Address, keys: Callable[[str], QueueKeys], *, group: str, namespace: str) -> None:
        self._session = Session(address)
        self._keys = keys
        self._group = group
        self._operator_session = OperatorSession(self._session.commands, address, group, namespace)
        self._publisher = Publisher(self._session.pool, address, keys)
        self._clocks: dict[object, float] = {}
        self._copies: dict[str, _Copies] = {}

    async def open(self) -> None:
        """Check the server.

        Raises:
            ConfigurationError: a server answers that cannot be used.
            Unreachable: none does.
        """
        await self._session.greet()

    async def close(self) -> None:
        await self._session.close()

    async def dispatch(self, queue: str, jobs: Sequence[Dispatch], until: float) -> Dispatched | None:
        keys = self._keys(queue)
        home = self._session.address.home(keys.meta)
        if home not in self._clocks:
            await self.pulses([queue])
        names = [keys.meta, keys.relayed, *keys.places]
        for _ in range(2):
            args: list[Any] = [keys.shape, round(until * 1000 + self._clocks[home]), secrets.token_hex(8), FORGET]
            for job in jobs:
                args += (LEVELS.index(job.level) + 3, f"{job.id}/{job.hop}", job.body)
            now, done, epoch, results = await self._session.run(scripts.DISPATCH, names, args)
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
        if jobs:
            await self._operator_session.ask(
                "ZREM", self._keys(queue).relayed, *(f"{job.id}/{job.hop}" for job in jobs)
            )

    async def pulses(self, queues: Sequence[str]) -> list[Pulse]:
        # All queues in one call, unless a cluster keeps them in different slots.
        together = [[queue] for queue in queues] if self._session.address.spread else [queues] if queues else []
        found = []
        for group in together:
            names = [self._keys(queue).meta for queue in group]
            now, server, *rows = await self._session.run(scripts.PULSE, names, [])
            self._clocks[self._session.address.home(names[0])] = now - monotonic() * 1000
            for queue, (epoch, relayed, held) in zip(group, rows, strict=True):
                found.append(Pulse(queue, text(epoch), relayed, text(server), held=bool(held)))
        return found

    async def found(self, queue: str) -> None:
        keys, fresh = self._keys(queue), secrets.token_hex(8)
        if keys.shape == "list":
            await self._operator_session.ask("HSETNX", keys.meta, "epoch", fresh)
            return
        names = [keys.meta, keys.ids, *keys.streams]
        _, _, trouble, _ = await self._session.run(scripts.GROUPS, names, [self._group, fresh])
        if trouble:
            stream, _, problem = text(trouble[0]).partition(" ")
            raise StreamworkerError(f"the stream {stream} cannot be used: {problem}")

    async def hold(self, queue: str, *, held: bool) -> None:
        keys = self._keys(queue)
        await self._session.run(scripts.HOLD, [keys.meta, keys.due], [int(held)])

    async def ids(self, queue: str) -> AsyncIterator[list[str]]:
        """See `Dispatcher.ids`: delayed, ready, delayed again, so that a job that moves meanwhile is met on the way."""
        keys = self._keys(queue)
        async for members in self._parked(keys):
            yield [job_id for job_id, _ in members]
        async for entries in self._entries(keys):
            yield [job_id for job_id, _ in entries]
        async for members in self._parked(keys):
            yield [job_id for job_id, _ in members]

    async def later(self, queue: str, hops: Mapping[str, int]) -> set[str]:
        keys = self._keys(queue)
        found: set[str] = set()
        for _ in range(2):
            copies = self._copies.get(queue)
            if copies is None or copies.until < monotonic():
                copies = self._copies[queue] = await self._looked(keys, hops)
            found, moved = await self._later_in(keys, copies, hops)
            if not moved:
                break
            copies.until = 0.0
        return found

    async def _looked(self, keys: QueueKeys, wanted: Mapping[str, int]) -> _Copies:
        """A look at all of a queue, in the order of `ids`."""
        copies = _Copies(wanted)
        async for members in self._parked(keys):
            copies.members(members)
        async for entries in self._entries(keys):
            copies.entries(entries)
        async for members in self._parked(keys):
            copies.members(members)
        copies.close()
        return copies

    async def _later_in(self, keys: QueueKeys, copies: _Copies, hops: Mapping[str, int]) -> tuple[set[str], bool]:
        """(ids with a later hop, whether one that was delayed has moved on since the look)."""
        found = {job_id for job_id, hop in hops.items() if copies.hops.get(job_id, 0) > hop}
        parked = [(job_id, each) for job_id in hops if job_id not in found for each in copies.parked.get(job_id, ())]
        moved = False
        for start in range(0, len(parked), MEMBERS):
            some = parked[start : start + MEMBERS]
            bodies = await self._operator_session.ask("HMGET", keys.bodies, *(member for _, member in some))
            for (job_id, _), body in zip(some, bodies, strict=True):
                if body is None:
                    moved = True
                elif _hop_of(body)[1] > hops[job_id]:
                    found.add(job_id)
        return found, moved

    def _entries(self, keys: QueueKeys) -> AsyncIterator[list[tuple[str, int]]]:
        """(id, hop) of all ready and held jobs, in pages."""
        return self._lying(keys) if isinstance(keys, ListKeys) else self._streamed(keys)

    async def _parked(self, keys: QueueKeys) -> AsyncIterator[list[tuple[str, bytes]]]:
        cursor: Any = 0
        while True:
            cursor, pairs = await self._operator_session.ask("ZSCAN", keys.due, cursor, "COUNT", MEMBERS)
            yield [(of_due_member(text(member))[1], member) for member, _ in pairs]
            if not int(cursor):
                return

    async def _streamed(self, keys: QueueKeys) -> AsyncIterator[list[tuple[str, int]]]:
        for level in LEVELS:
            place, start = keys.stream(level), "-"
            epoch = await derived_from(self._operator_session, keys, level)
            while True:
                page = await self._operator_session.ask("XRANGE", place, start, "+", "COUNT", listings.PAGE)
                named = [(entry, *_hop_of((fields or {}).get(b"job"))) for entry, fields in page]
                yield [(name or derived_id(place, epoch, entry), hop) for entry, name, hop in named]
                if len(page) < listings.PAGE:
                    break
                start = f"({text(page[-1][0])}"

    async def _lying(self, keys: ListKeys) -> AsyncIterator[list[tuple[str, int]]]:
        # From the left, where new ones come in: what moves on meanwhile moves towards us, or away for good.
        for place in keys.places:
            start = 0
            while True:
                page = await self._operator_session.ask("LRANGE", place, start, start + listings.PAGE - 1)
                yield [(name, hop) for name, hop in map(_hop_of, page) if name]
                if len(page) < listings.PAGE:
                    break
                start += listings.PAGE
        for worker in await listings.holders(self._operator_session, keys):
            page = []
            async for claim in listings.claimed(self._operator_session, keys, worker):
                name, hop = _hop_of(claim.body)
                page.append((name or claim.entry.decode(), hop))
            yield page

    async def promote(self, queues: Sequence[str]) -> float:
        return await promote(self._session, [self._keys(queue) for queue in queues])

    async def offer_tick(self, tick: CronTick) -> CronTickResult:
        return await self._publisher.offer_tick(tick)

    async def queues(self) -> list[str]:
        if isinstance(self._keys("any"), ListKeys):
            return await listings.list_queues(self._operator_session)
        return await listings.queues(self._operator_session)


def _hop_of(body: bytes | None) -> tuple[str | None, int]:
    """(id, hop) of a document; (``None``, 0) if it cannot be read."""
    try:
        document = read(body or b"")
    except InvalidJob:
        return None, 0
    # Behind an absurd hop documents count anew, so that it says nothing of what came later.
    return id_in(document), 0 if (document.hop or 0) > MOST_HOPS else document.hop or 0
