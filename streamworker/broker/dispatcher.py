"""The relay's `Dispatcher` on Redis: it adds jobs of the ledger at most once, and notices lost ones.

An addition is remembered until `forget`. Each attempt of a relay is valid for a few seconds, by the server's clock (the
script refuses later ones), and another relay takes the row over only after that. So at any moment at most one attempt
per (id, hop) can add the job, and none is left once the ledger has noted the addition. If a relay dies in between, the
relay that takes the row over finds the job remembered.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from hashlib import sha1
from math import ceil
from time import monotonic
from typing import Any, Final

import msgspec

from streamworker.broker import listings, scripts
from streamworker.broker.base import promote
from streamworker.broker.cancel import RedisEndedPayloads
from streamworker.broker.keys import ListKeys, QueueKeys, of_due_member
from streamworker.broker.listings import derived_from
from streamworker.broker.order import in_lines
from streamworker.broker.partitions import WHOLE, Partitions, Router, fresh_epoch, named
from streamworker.broker.publisher import Publisher
from streamworker.broker.pubsub import subscriber_of
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.session import OperatorSession, Session, text
from streamworker.broker.schedules import RedisSchedules
from streamworker.codec import MOST_HOPS, derived_id, id_in, read
from streamworker.errors import InvalidJob, StreamworkerError
from streamworker.job import LEVELS, CronTick, CronTickResult
from streamworker.relay import Dispatch, Dispatched, Pulse

HELD: Final = -2
"""The answer for a job whose deduplication key another job holds."""
FORGET: Final = 30 * 86_400_000
"""Milliseconds after which even additions that no relay noted are forgotten."""
MEMBERS: Final = 1000
MOST_COPIES: Final = 200_000
"""Most jobs of a queue whose hops are kept from one look to the next."""
REMEMBERED: Final = 10
"""A look is kept for so many times the seconds it took."""


class _Copies:
    """Hops of the jobs in a queue, as one look at all of it found them.

    Args:
        wanted: ids that are kept even beyond `MOST_COPIES`.
    """

    def __init__(self, wanted: Mapping[str, int]) -> None:
        self._wanted = wanted
        self._began = monotonic()
        self.until = 0.0
        """Monotonic seconds until which the look is used."""
        self.hops: dict[str, int] = {}
        self.parked: dict[str, set[bytes]] = {}

    def entries(self, page: Sequence[tuple[str, int]]) -> None:
        """Add ready and claimed jobs, with their hops."""
        for job_id, hop in page:
            if hop and (job_id in self._wanted or len(self.hops) < MOST_COPIES):
                self.hops[job_id] = max(hop, self.hops.get(job_id, 0))

    def members(self, page: Sequence[tuple[str, bytes]]) -> None:
        """Add delayed jobs; their documents are read only when they are asked for."""
        for job_id, member in page:
            if job_id in self._wanted or len(self.parked) < MOST_COPIES:
                self.parked.setdefault(job_id, set()).add(member)

    def close(self) -> None:
        """The look is complete."""
        if max(len(self.hops), len(self.parked)) < MOST_COPIES:
            now = monotonic()
            self.until = now + max(0.2, REMEMBERED * (now - self._began))


class RedisDispatcher:
    """The `Dispatcher` of both modes; ``keys`` makes the difference.

    Args:
        address: the server.
        keys: the keys of a queue, by its name.
        group: the consumer group of streams.
        namespace: prefix of every key.
        parts: the partitions of queues that have some.
    """

    def __init__(
        self,
        address: RedisAddress,
        keys: Callable[[str], QueueKeys],
        *,
        group: str,
        namespace: str,
        parts: Partitions = WHOLE,
    ) -> None:
        self._session = Session(address)
        self._keys = keys
        self._group = group
        self._operator_session = OperatorSession(self._session.commands, address, group, namespace)
        self._router = Router(self._session, keys, parts)
        self._publisher = Publisher(self._session.pool, address, keys)
        self._subscriber = subscriber_of(self._session)
        self.schedules: Final = RedisSchedules(self._session, keys, namespace, self._subscriber)
        self.payloads: Final = RedisEndedPayloads(self._session, self._all_homes, self._subscriber)
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
        await self._subscriber.close()
        await self._session.close()

    async def dispatch(self, queue: str, jobs: Sequence[Dispatch], until: float) -> Dispatched | None:
        if queue not in self._router.partitions:
            return await self._dispatch(queue, jobs, until)
        told = [named(job.body, job.id, None if job.key is None else job.key.name) for job in jobs]
        by_home: dict[str, list[int]] = {}
        for index, home in enumerate(await self._router.homes(queue, told)):
            by_home.setdefault(home, []).append(index)
        (before,) = await self.pulses([queue])
        if not before.epoch:
            await self.found(queue)
            (before,) = await self.pulses([queue])
        there, held, error = [False] * len(jobs), [False] * len(jobs), ""
        for home, indexes in by_home.items():
            # A job that needs the queue's identity needs that of its partition: the queue's is made of them.
            some = [jobs[index] for index in indexes]
            own = await self._epoch_of(home)
            some = [
                msgspec.structs.replace(job, epoch=own) if job.epoch and job.epoch == before.epoch else job
                for job in some
            ]
            done = await self._dispatch(home, some, until)
            if done is None:
                return None  # what was added is remembered, so that the next try adds nothing twice
            error = error or done.error
            for number, index in enumerate(indexes):
                there[index], held[index] = done.there[number], done.held[number]
        # The identity from before: what a partition lost meanwhile is dispatched again.
        return Dispatched(before.epoch, there, held, error)

    async def _epoch_of(self, home: str) -> str:
        return text(await self._session.ask("HGET", self._keys(home).meta, "epoch") or b"")

    async def _dispatch(self, queue: str, jobs: Sequence[Dispatch], until: float) -> Dispatched | None:
        """`dispatch` of one partition."""
        keys = self._keys(queue)
        home = self._session.address.home(keys.meta)
        if home not in self._clocks:
            await self._pulses([queue])
        names = [keys.meta, keys.relayed, *keys.places]
        for _ in range(2):
            args: list[Any] = [keys.shape, round(until * 1000 + self._clocks[home]), secrets.token_hex(8), FORGET]
            for job in jobs:
                args += (LEVELS.index(job.level) + 3, f"{job.id}/{job.hop}", job.body, job.epoch, job.id)
                key = job.key
                args += (
                    ("", 0, 0) if key is None else (key.name, int(key.until is not None), ceil(key.life * 1000) or 1)
                )
            now, done, epoch, results = await self._session.run(scripts.DISPATCH, names, args)
            self._clocks[home] = now - monotonic() * 1000
            if done != b"groups":
                break
            await self._found(queue)
        if done != b"added":
            return None
        errors = [result for result in results if isinstance(result, bytes)]
        there = [result in (0, 1) for result in results]
        held = [result == HELD for result in results]
        return Dispatched(text(epoch), there, held, text(errors[0]) if errors else "")

    async def forget(self, queue: str, jobs: Sequence[Dispatch]) -> None:
        for home in self._router.partitions.homes(queue) if jobs else ():
            await self._operator_session.ask("ZREM", self._keys(home).relayed, *(f"{job.id}/{job.hop}" for job in jobs))

    async def pulses(self, queues: Sequence[str]) -> list[Pulse]:
        partitions = self._router.partitions
        found = {
            pulse.queue: pulse for pulse in await self._pulses([h for each in queues for h in partitions.homes(each)])
        }
        return [_pulse_of(queue, [found[home] for home in partitions.homes(queue)]) for queue in queues]

    async def _pulses(self, queues: Sequence[str]) -> list[Pulse]:
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
        for home in self._router.partitions.homes(queue):
            await self._found(home)

    async def _found(self, queue: str) -> None:
        keys = self._keys(queue)
        fresh = await fresh_epoch(self._session, keys, self._keys(keys.name))
        if keys.shape == "list":
            await self._operator_session.ask("HSETNX", keys.meta, "epoch", fresh)
            return
        names = [keys.meta, keys.ids, *keys.streams]
        _, _, trouble, _ = await self._session.run(scripts.GROUPS, names, [self._group, fresh])
        if trouble:
            stream, _, problem = text(trouble[0]).partition(" ")
            raise StreamworkerError(f"the stream {stream} cannot be used: {problem}")

    async def hold(self, queue: str, *, held: bool) -> None:
        for keys in map(self._keys, self._router.partitions.homes(queue)):
            await self._session.run(scripts.HOLD, [keys.meta, keys.due], [int(held)])

    async def ids(self, queue: str) -> AsyncIterator[list[str]]:
        """`Dispatcher.ids`: delayed, ready, delayed again, so that a job that moves meanwhile is read once."""
        for keys in map(self._keys, self._router.partitions.homes(queue)):
            async for members in self._parked(keys):
                yield [job_id for job_id, _ in members]
            async for entries in self._entries(keys):
                yield [job_id for job_id, _ in entries]
            async for members in self._parked(keys):
                yield [job_id for job_id, _ in members]

    async def later(self, queue: str, hops: Mapping[str, int]) -> set[str]:
        homes = self._router.partitions.homes(queue)
        return set().union(*[await self._later(home, hops) for home in homes])

    async def _later(self, queue: str, hops: Mapping[str, int]) -> set[str]:
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
        """Read all of a queue, in the order of `ids`."""
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
        """(ids with a later hop, whether a delayed job has moved since the look)."""
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

    async def _entries(self, keys: QueueKeys) -> AsyncIterator[list[tuple[str, int]]]:
        """(id, hop) of all jobs in lines, ready and claimed, in pages; in the order in which jobs move."""
        page: list[tuple[str, int]] = []
        async for body in in_lines(self._operator_session, keys):
            name, hop = _hop_of(body)
            page += [(name, hop)] if name else []
            if len(page) >= listings.PAGE:
                yield page
                page = []
        yield page
        async for entries in self._listed(keys) if isinstance(keys, ListKeys) else self._streamed(keys):
            yield entries

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

    async def _listed(self, keys: ListKeys) -> AsyncIterator[list[tuple[str, int]]]:
        # From the left, where new jobs are pushed: elements that move meanwhile move towards us, or away for good.
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

    async def _all_homes(self) -> list[QueueKeys]:
        homes = self._router.partitions.homes
        return [self._keys(home) for queue in await self.queues() for home in homes(queue)]

    async def promote(self, queues: Sequence[str]) -> float:
        return await promote(
            self._session, [self._keys(home) for queue in queues for home in self._router.partitions.homes(queue)]
        )

    async def offer_tick(self, tick: CronTick) -> CronTickResult:
        return await self._publisher.offer_tick(tick)

    async def queues(self) -> list[str]:
        if isinstance(self._keys("any"), ListKeys):
            return await listings.list_queues(self._operator_session)
        return await listings.queues(self._operator_session)


def _pulse_of(queue: str, parts: Sequence[Pulse]) -> Pulse:
    """The pulse of a queue by those of its partitions, which have one epoch unless one of them lost its data."""
    first, *others = parts
    strange = [f"{pulse.queue} {pulse.epoch}" for pulse in others if pulse.epoch not in ("", first.epoch)]
    epoch = first.epoch
    if epoch and strange:
        epoch += "-" + sha1(" ".join(strange).encode(), usedforsecurity=False).hexdigest()[:12]
    servers = dict.fromkeys(pulse.server for pulse in parts)
    server = first.server if len(servers) == 1 else sha1("".join(servers).encode(), usedforsecurity=False).hexdigest()
    return Pulse(queue, epoch, sum(pulse.relayed for pulse in parts), server, held=any(pulse.held for pulse in parts))


def _hop_of(body: bytes | None) -> tuple[str | None, int]:
    """(id, hop) of a document; (``None``, 0) if it cannot be read."""
    try:
        document = read(body or b"")
    except InvalidJob:
        return None, 0
    # After an absurd hop documents count from 0 again, so that the hop says nothing about their order.
    return id_in(document), 0 if (document.hop or 0) > MOST_HOPS else document.hop or 0
