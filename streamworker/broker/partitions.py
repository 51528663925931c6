"""Partitions: one queue over several slots of a cluster, the home of each job, and order keys that move to new homes.

To Redis each partition is a queue of its own, with its own keys, scripts and groups. What makes them one queue is here,
in `PartitionedOperator` beside it, and in the names: claims, documents and rows of the ledger name the queue.

The home of a job is found by its order key, else its fair key, else its deduplication key, else its id: the first four
bytes of the SHA-1 of that text, as a big-endian number, modulo the number of partitions. Producers in any language
can do that; a job that was added to another partition runs there, unless its order key belongs elsewhere: then it is
moved. So at most one partition starts jobs of an order key:

- Each partition knows the numbers of partitions that its queue has had (`lua/resize.lua`). It gives an order key
  that is free to a job only if the key belongs to it by the last number; other jobs wait in line there until a worker
  has stored them in their home (`JobMover`).
- A queue that grows gives an order key that is held to the jobs behind it, in the old partition. Producers that know of
  the growth ask the old homes of a key first (`lua/stay.lua`), and follow it there while it is held. An old home that
  says no has learnt the new number, so that it cannot take the key afterwards.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha1
from time import monotonic
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import msgspec

from streamworker import codec
from streamworker.broker import scripts
from streamworker.broker.keys import ELSEWHERE, QueueKeys, home_name, of_line, partitioned_queues
from streamworker.broker.publisher import Publisher
from streamworker.errors import InvalidJob, StreamworkerError, Unreachable
from streamworker.job import Enqueued, PackedJob
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

ARRIVAL: Final = 3_600_000
"""Milliseconds for which a partition remembers that a moved job was stored."""
MOVES: Final = 200
"""Most jobs that one look of a `JobMover` moves."""
TELL_AGAIN: Final = 5.0
"""Seconds between tries to tell a partition the numbers while its server is away."""
LOOKED_AT: Final = 8
"""Most partitions of one look."""
LOOK_EVERY: Final = 1.0
"""Seconds between two looks for jobs that have to move."""


PartitionSpec: TypeAlias = tuple[str, int, tuple[str, ...]]
"""(queue, number of partitions, URL of the server of each behind the first; none if all are at one address)."""


class PartitionSession(Protocol):
    """A session of a broker or an operator."""

    async def ask(self, *command: Any) -> Any:
        """Send one command."""

    async def run(self, script: scripts.LuaScript, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script."""


class KeysOf(Protocol):
    """Makes the keys of a queue or partition, by its home."""

    def __call__(self, queue: str, /) -> QueueKeys:
        """The keys."""


def partition_of(value: str | bytes, count: int) -> int:
    """The partition of a value, of so many."""
    encoded = value.encode(errors="surrogatepass") if isinstance(value, str) else value
    return int.from_bytes(sha1(encoded, usedforsecurity=False).digest()[:4]) % count


class Named(NamedTuple):
    """What the home of a job is found by.

    Attributes:
        by: the first it has of order key, fair key, deduplication key and id.
        order: its order key.
        key: its deduplication key.
    """

    by: str
    order: str | None
    key: str | None


def named(body: bytes, job_id: str, key: str | None) -> Named:
    """`Named` of a document."""
    if b'_key"' not in body:
        return Named(key or job_id, None, key)
    try:
        document = codec.read(body)
    except InvalidJob:
        return Named(key or job_id, None, key)
    order = document.order_key or None
    return Named(order or document.fair_key or key or job_id, order, key)


class Partitions:
    """The partitions of the queues that have some.

    Args:
        told: by the settings.
    """

    def __init__(self, told: Iterable[PartitionSpec]) -> None:
        specs = list(told)
        self._counts: Final = {queue: count for queue, count, _ in specs if count > 1}
        self._placed: Final = {queue for queue, _, servers in specs if servers}

    def __contains__(self, queue: str) -> bool:
        return queue in self._counts

    def __bool__(self) -> bool:
        return bool(self._counts)

    @property
    def queues(self) -> list[str]:
        """Names of the queues with partitions."""
        return list(self._counts)

    def knows(self, queue: str, number: int) -> bool:
        """Whether it is known on which server a partition is; of a queue that has grown, some may not be."""
        return queue not in self._placed or number < self._counts[queue]

    def placed(self, queue: str) -> bool:
        """Whether the servers of its partitions are given by URL."""
        return queue in self._placed

    def homes(self, queue: str) -> list[str]:
        """The homes of a queue: its own name if it has no partitions."""
        return [home_name(queue, number) for number in range(self._counts.get(queue, 1))]


WHOLE: Final = Partitions(())
"""No queue has partitions."""


class Router:
    """Finds the homes of jobs, and tells partitions how many there are.

    Args:
        session: sends the commands.
        keys: the keys of a queue, by its home.
        partitions: by the settings.
    """

    def __init__(self, session: PartitionSession, keys: KeysOf, partitions: Partitions) -> None:
        self._session, self._keys, self.partitions = session, keys, partitions
        self._sizes: dict[str, list[int]] = {}
        self._untold: dict[str, tuple[float, list[str]]] = {}
        """Partitions whose servers were away, by queue, and the monotonic seconds of the next try."""

    async def sizes(self, queue: str) -> list[int]:
        """The numbers of partitions that a queue has had, the last one that of today; told to all partitions once."""
        known = self._sizes.get(queue)
        if known is not None:
            if self._untold and (untold := self._untold.get(queue)) is not None and untold[0] < monotonic():
                await self._tell(queue, " ".join(map(str, known)), untold[1])
            return known
        homes = self.partitions.homes(queue)
        first = self._keys(homes[0])
        used = [first.meta, first.due, *first.places]
        text = (await self._session.run(scripts.RESIZE, [first.order, *used], [len(homes)])).decode()
        await self._tell(queue, text, homes[1:])
        found = [int(number) for number in text.split()]
        with suppress(StreamworkerError):  # out of memory, or no right to: operators need the number in their settings
            told = b"%d%b" % (found[-1], ELSEWHERE if self.partitions.placed(queue) else b"")
            await self._session.ask("HSET", partitioned_queues(first.namespace), queue, told)
        if found[-1] > len(homes):
            hint = f"jobs in the others wait for workers that have STREAMWORKER_PARTITIONS={queue}={found[-1]}"
            log.warning("partitions_unserved", queue=queue, partitions=found[-1], here=len(homes), hint=hint)
        self._sizes[queue] = found
        return found

    async def _tell(self, queue: str, text: str, homes: Sequence[str]) -> None:
        """Tell partitions the numbers; those whose servers are away later."""
        away = []
        for home in homes:
            try:
                await self._session.run(scripts.RESIZE, [self._keys(home).order], [text])
            except Unreachable as error:  # `stay` tells it, too: no job goes past an old home that does not know
                log.warning("partition_away", queue=queue, partition=home, error=str(error))
                away.append(home)
        self._untold.pop(queue, None)
        if away:
            self._untold[queue] = (monotonic() + TELL_AGAIN, away)

    async def homes(self, queue: str, jobs: Sequence[Named]) -> list[str]:
        """The home of each job."""
        sizes = await self.sizes(queue)
        if not self.partitions.knows(queue, sizes[-1] - 1):  # workers that know it move what belongs there
            sizes = [len(self.partitions.homes(queue))]
        numbers = [partition_of(job.by, sizes[-1]) for job in jobs]
        if len(sizes) > 1:
            await self._stay(queue, sizes, jobs, numbers)
        return [home_name(queue, number) for number in numbers]

    async def _stay(self, queue: str, sizes: list[int], jobs: Sequence[Named], numbers: list[int]) -> None:
        """Jobs whose keys an old home still holds go there, the oldest first."""
        waiting = {index for index, job in enumerate(jobs) if job.order is not None or job.key is not None}
        asked: set[tuple[int, int]] = set()
        for size in sizes[:-1]:
            by_home: dict[int, list[int]] = {}
            for index in waiting:
                old = partition_of(jobs[index].by, size)
                if old != numbers[index] and (old, index) not in asked:
                    asked.add((old, index))
                    by_home.setdefault(old, []).append(index)
            for old, indexes in by_home.items():
                keys = self._keys(home_name(queue, old))
                orders = dict.fromkeys(each for index in indexes if (each := jobs[index].order) is not None)
                dedup = dict.fromkeys(each for index in indexes if (each := jobs[index].key) is not None)
                names = [keys.order, *(keys.key(each) for each in dedup)]
                answers = await self._session.run(scripts.STAY, names, [" ".join(map(str, sizes)), *orders])
                held = {each for each, answer in zip(orders, answers, strict=False) if answer}
                kept = {each for each, answer in zip(dedup, answers[len(orders) :], strict=True) if answer}
                for index in indexes:
                    if jobs[index].order in held or jobs[index].key in kept:
                        numbers[index] = old
                        waiting.discard(index)


class PartitionedPublisher(Publisher):
    """`Publisher` of queues with partitions among others.

    Args:
        client: sends the commands.
        address: names the server in errors.
        keys: the keys of a queue, by its home.
        router: finds homes.
    """

    def __init__(self, client: scripts.AsyncCaller, address: object, keys: KeysOf, router: Router) -> None:
        super().__init__(client, address, keys)
        self._router = router

    async def publish(self, jobs: Sequence[PackedJob]) -> list[Enqueued]:
        by_queue: dict[str, list[int]] = {}
        for index, job in enumerate(jobs):
            if job.queue in self._router.partitions:
                by_queue.setdefault(job.queue, []).append(index)
        routed = list(jobs)
        for queue, indexes in by_queue.items():
            told = [named(jobs[index].body, jobs[index].id, jobs[index].key) for index in indexes]
            for index, home in zip(indexes, await self._router.homes(queue, told), strict=True):
                routed[index] = msgspec.structs.replace(jobs[index], queue=home)
        return await super().publish(routed)


async def fresh_epoch(session: PartitionSession, keys: QueueKeys, first: QueueKeys) -> str:
    """An epoch for a partition that has none: that of its queue's first one, unless it had one before.

    So partitions of different epochs say that one of them lost its data.

    Args:
        session: sends the commands.
        keys: of the partition.
        first: of its queue's first one.
    """
    mark = f"made:{keys.queue}"
    # Looked at before it is written: out of memory, workers of partitions that are there can still start.
    if keys != first and not await session.ask("HEXISTS", first.meta, mark):
        epoch: bytes | None = await session.ask("HGET", first.meta, "epoch")
        if epoch and await session.ask("HSETNX", first.meta, mark, "1"):
            return epoch.decode()
    return secrets.token_hex(8)


class JobMover:
    """Moves jobs whose order keys belong to other partitions to their homes.

    Args:
        session: sends the commands.
        keys: the keys of a queue, by its home.
        partitions: by the settings.
        homes: the partitions that are looked at, in turns.
    """

    def __init__(self, session: PartitionSession, keys: KeysOf, partitions: Partitions, homes: Sequence[str]) -> None:
        self._session, self._keys, self._partitions, self._homes = session, keys, partitions, list(homes)
        self._next = secrets.randbelow(len(self._homes)) if self._homes else 0
        self._away = False

    async def move(self) -> float:
        """Move some; returns the seconds until the next look."""
        left, failure = MOVES, None
        for _ in range(min(LOOKED_AT, len(self._homes))):
            self._next = (self._next + 1) % len(self._homes)
            keys = self._keys(self._homes[self._next])
            try:
                left -= await self._move_from(keys, left)
            except Unreachable as error:  # a node of a cluster: other partitions go on
                failure = error
        if failure is not None and not self._away:  # once an outage: it is tried again every second
            log.warning("jobs_not_moved", error=str(failure))
        self._away = failure is not None
        return 0.0 if left <= 0 else LOOK_EVERY

    async def _move_from(self, keys: QueueKeys, most: int) -> int:
        if most <= 0 or not await self._session.ask("EXISTS", keys.moving):
            return 0
        _, flat = await self._session.ask("HSCAN", keys.moving, 0, "COUNT", MOVES)
        # With RESP2 a flat list; redis-py makes a dict of it where it knows the command.
        orders = list(flat) if isinstance(flat, dict) else flat[::2]
        count = 0
        for order in orders:
            token: bytes = b""
            while count < most and (first := await self._session.run(scripts.DEPART, [keys.meta], [order, token])):
                token, element = first
                level, _, body = of_line(element)
                number = partition_of(order, int(token.split()[1]))
                if not self._partitions.knows(keys.name, number):
                    break  # workers that know its server move it
                target = self._keys(home_name(keys.name, number))
                names, origin = [target.meta, target.arrived], b" ".join((keys.queue.encode(), order, token))
                await self._session.run(scripts.ARRIVE, names, [keys.shape, origin, level, body, ARRIVAL])
                count += 1
            if count >= most and token:
                await self._session.run(scripts.DEPART, [keys.meta], [order, token])
        return count
