"""The broker on Redis Streams: a consumer group per stream, the worker id as consumer name, every move one Lua script."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final

import anyio
import msgspec
import structlog

from streamworker.broker import Ending, scripts
from streamworker.broker.client import Address, understood
from streamworker.broker.keys import QueueKeys, worker_key
from streamworker.broker.order import Order
from streamworker.broker.publish import Publisher
from streamworker.broker.settle import settle
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable
from streamworker.job import LEVELS, Claim, Depth, Enqueued, Level, Outgoing, Settled
from streamworker.policy import SUSPECT_DELIVERIES

log = structlog.get_logger("streamworker.broker")

BLOCK: Final = 5.0
"""Most seconds of one blocking read: Redis 6.2 does not tell a blocked reader that its stream is gone."""
PROMOTE_BATCH: Final = 500
IDLE_TICK: Final = 5.0
"""Most seconds between looks at the due sets; jobs parked from elsewhere ring the bell."""
TROUBLE_PAUSE: Final = 60.0


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
        self._address = address
        self._options = options
        self._commands = address.commands()
        self._publisher = Publisher(self._commands, address, options.namespace)
        self._keys = [QueueKeys(name, options.namespace) for name, _ in options.queues]
        self._order = Order(len(self._keys), weighted=options.weighted)
        self._all = [keys.meta for keys in self._keys] + [stream for keys in self._keys for stream in keys.streams]
        self._spots: list[tuple[str, Level, str]] = [
            (keys.queue, level, keys.stream(level)) for keys in self._keys for level in LEVELS
        ]
        self._homes = {place: keys for keys in self._keys for place in keys.streams}
        self._epochs: dict[str, bytes] = {}
        self._consumer = ""
        self._sweep_at = [0.0] * len(self._keys)
        self._down_since: float | None = None
        self._stirred = anyio.Event()
        self._blind_until: dict[str, float] = {}
        self._paused: frozenset[str] = frozenset()
        self._interrupted = False
        self._reader = address.reader(BLOCK)
        self._lease_client = address.blocking()
        self.missing = 0
        """Entries that were deleted underneath their claim, since the start."""

    # -- opening and closing

    async def open(self) -> None:
        """See `Broker.open`."""
        with understood(self._address):
            info = await self._commands.info("server")
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
            raise ConfigurationError(f"Redis at {self._address} is version {version}: streamworker needs 6.2 or newer")
        # After a restart everyone alive gets one lease to renew before anybody is taken for dead.
        self._rest(max(0.0, self._options.lease - float(info.get("uptime_in_seconds", 0))))

    async def join(self, worker_id: str) -> None:
        """See `Broker.join`."""
        self._consumer = worker_id
        address = self._address.renamed(worker_id)
        self._reader, self._lease_client = address.reader(BLOCK), address.blocking()
        for keys in self._keys:
            foreign = await self._ensure(keys)
            if foreign:
                stream, _, group = foreign[0].partition(" ")
                raise ConfigurationError(
                    f"the stream {stream} is also read by the group {group!r}, which would lose what streamworker deletes when done: "
                    f"destroy that group (XGROUP DESTROY), or give one of them another queue"
                )

    async def leave(self) -> bool:
        """See `Broker.leave`."""
        gone = True
        for keys in self._keys:
            gone = bool(await self._run(scripts.LEAVE, keys.streams, [self._options.group, self._consumer])) and gone
        with understood(self._address):
            await self._commands.delete(worker_key(self._options.namespace, self._consumer))
        return gone

    async def close(self) -> None:
        """See `Broker.close`."""
        await self._reader.close()
        await self._commands.aclose()
        self._lease_client.close()

    # -- the six verbs

    async def publish(self, jobs: Sequence[Outgoing]) -> list[Enqueued]:
        """See `Broker.publish`."""
        return await self._publisher.publish(jobs)

    async def claim(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """See `Broker.claim`."""
        now = monotonic()
        claims = await self._sweep(limit, running, now) if min(self._sweep_at) <= now else []
        if len(claims) < limit:
            claims += await self._take(limit - len(claims), running)
        if not claims and wait > 0 and not self._interrupted:
            claims = await self._wait(wait, running)
        return claims

    async def interrupt(self) -> None:
        """See `Broker.interrupt`."""
        self._interrupted = True
        self._stirred.set()
        if self._reader.client_id is not None:
            with understood(self._address):
                await self._commands.client_unblock(self._reader.client_id)

    async def confirm(self, claim: Claim) -> Claim | None:
        """See `Broker.confirm`."""
        args = [self._options.group, self._consumer, claim.entry, claim.count]
        if await self._run(scripts.CONFIRM, [claim.place], args):
            return msgspec.structs.replace(claim, count=claim.count + 1)
        return None

    def renew(self, claims: Collection[Claim]) -> list[Claim]:
        """See `Broker.renew`."""
        lost: list[Claim] = []
        by_place: dict[str, dict[bytes, Claim]] = {}
        for claim in claims:
            by_place.setdefault(claim.place, {})[claim.entry] = claim
        with self._link():
            for place, mine in by_place.items():
                entries = list(mine)
                for start in range(0, len(entries), 500):
                    args: list[Any] = [self._options.group, self._consumer]
                    for entry in entries[start : start + 500]:
                        args += (entry, mine[entry].count)
                    reply = scripts.RENEW.blocking(self._lease_client.execute_command, [place], args)
                    lost += [mine[entry] for entry in reply]
        return lost

    def beat(self, report: dict[str, str | int | float]) -> None:
        """See `Broker.beat`."""
        args: list[Any] = [max(1000, int(self._options.lease * 1000))]
        for name, value in report.items():
            args += (name, value)
        with self._link():
            key = worker_key(self._options.namespace, self._consumer)
            scripts.BEAT.blocking(self._lease_client.execute_command, [key], args)

    async def settle(self, items: Sequence[Ending]) -> list[Settled]:
        """See `Broker.settle`."""
        with self._link():
            return await settle(self._commands, self._options.group, self._consumer, self._homes, items)

    async def strays(self, running: Collection[Claim]) -> list[Claim]:
        """See `Broker.strays`."""
        found: list[Claim] = []
        for queue, level, place in self._spots:
            mine = [claim.entry for claim in running if claim.place == place]
            epoch = self._epochs.get(queue, b"")
            for entry, count, fields in await self._run(
                scripts.STRAYS, [place], [self._options.group, self._consumer, *mine]
            ):
                suspect = count >= SUSPECT_DELIVERIES
                found.append(Claim(queue, level, place, entry, count, _document(fields), epoch, suspect))
        return found

    async def tick(self) -> float:
        """See `Broker.tick`."""
        wait = IDLE_TICK
        for keys in self._keys:
            moved, soonest = await self._run(scripts.PROMOTE, [keys.due, keys.bodies, *keys.streams], [PROMOTE_BATCH])
            if moved >= PROMOTE_BATCH:
                return 0.0
            if soonest >= 0:
                wait = min(wait, soonest / 1000)
        return wait

    async def depth(self) -> list[Depth]:
        """See `Broker.depth`."""
        with understood(self._address):
            return [await depth(self._commands, keys, self._options.group) for keys in self._keys]

    # -- claiming, piece by piece

    async def _take(self, limit: int, running: Collection[Claim], *, healed: bool = False) -> list[Claim]:
        queues, budgets = len(self._keys), self._order.budgets(limit)
        args = [
            self._options.group,
            self._consumer,
            limit,
            queues,
            len(budgets),
            *self._allowances(limit, running),
            *budgets,
        ]
        reply = await self._read(scripts.CLAIM, self._all, args + self._order.steps)
        taken, trouble, paused = reply
        self._paused = frozenset(self._keys[index - 1].queue for index in paused)
        claims: list[Claim] = []
        for index, epoch, entries in taken:
            queue, level, place = self._spots[index - queues - 1]
            self._epochs[queue] = epoch
            claims += [Claim(queue, level, place, entry, 1, _document(fields), epoch) for entry, fields in entries]
        if trouble and await self._heal(trouble) and not healed and len(claims) < limit:
            claims += await self._take(limit - len(claims), running, healed=True)
        return claims

    def _allowances(self, limit: int, running: Collection[Claim]) -> list[int]:
        caps = [cap for _, cap in self._options.queues]
        if not any(caps):
            return [limit] * len(caps)
        used = Counter(claim.queue for claim in running)
        return [limit if cap is None else max(0, cap - used[name]) for name, cap in self._options.queues]

    async def _heal(self, trouble: list[tuple[int, bytes]]) -> bool:
        """Make missing groups anew; what cannot be healed is said now and then, and read around."""
        healed = False
        for index, error in trouble:
            message = error.decode(errors="replace")
            if index > len(self._keys) and message.startswith("NOGROUP"):
                keys = self._homes[self._all[index - 1]]
                await self._ensure(keys)
                log.warning("group_recreated", queue=keys.queue, stream=self._all[index - 1])
                healed = True
            elif self._blind_until.get(self._all[index - 1], 0.0) < monotonic():
                log.error("stream_unreadable", key=self._all[index - 1], error=message)
                self._blind_until[self._all[index - 1]] = monotonic() + TROUBLE_PAUSE
        return healed

    async def _ensure(self, keys: QueueKeys) -> list[str]:
        epoch, foreign = await self._run(
            scripts.GROUPS, [keys.meta, *keys.streams], [self._options.group, secrets.token_hex(8)]
        )
        self._epochs[keys.queue] = epoch
        return [name.decode(errors="replace") for name in foreign]

    async def _sweep(self, limit: int, running: Collection[Claim], now: float) -> list[Claim]:
        claims: list[Claim] = []
        for index, keys in enumerate(self._keys):
            if self._sweep_at[index] > now or len(claims) >= limit:
                continue
            reservable = not any(claim.suspect for claim in (*running, *claims))
            allowed = min(limit - len(claims), self._allowances(limit, running)[index])
            if allowed <= 0 or keys.queue in self._paused:
                self._sweep_at[index] = now + 1.0
                continue
            held = [
                f"{keys.streams.index(claim.place) + 2}:{claim.entry.decode()}"
                for claim in running
                if claim.queue == keys.queue
            ]
            args = [
                self._options.group,
                self._consumer,
                int(self._options.lease * 1000),
                allowed,
                SUSPECT_DELIVERIES,
                int(reservable),
            ]
            wait, entries, missing = await self._read(scripts.SWEEP, [keys.meta, *keys.streams], args + held)
            self._sweep_at[index] = now + wait / 1000
            self.missing += missing
            for stream, entry, count, fields, epoch, suspect in entries:
                level = LEVELS[stream - 2]
                claims.append(
                    Claim(keys.queue, level, keys.stream(level), entry, count, _document(fields), epoch, bool(suspect))
                )
        return claims

    def _rest(self, seconds: float) -> None:
        self._sweep_at = [max(at, monotonic() + seconds) for at in self._sweep_at]

    async def _wait(self, wait: float, running: Collection[Claim]) -> list[Claim]:
        """Block until a new entry comes, at most until the next sweep is due."""
        wait = max(0.01, min(wait, BLOCK, min(self._sweep_at) - monotonic()))
        allowance = dict(zip((keys.queue for keys in self._keys), self._allowances(1, running), strict=True))
        places = [
            place
            for queue, _, place in self._spots
            if allowance[queue] and queue not in self._paused and self._blind_until.get(place, 0.0) < monotonic()
        ]
        command = (
            "XREADGROUP",
            "GROUP",
            self._options.group,
            self._consumer,
            "BLOCK",
            int(wait * 1000),
            "COUNT",
            1,
            "STREAMS",
        )
        if not places:  # all paused, capped or unreadable: nothing to block on
            with anyio.move_on_after(min(wait, 1.0)):
                await self._stirred.wait()
            return []
        try:
            with self._link():
                reply = await self._reader.execute_command(*command, *places, *(">" for _ in places))
        except StreamworkerError as error:
            if str(error.__cause__).startswith(("NOGROUP", "UNBLOCKED")):
                return []  # the next claim heals it
            raise
        claims: list[Claim] = []
        for name, entries in reply or ():
            place = name.decode()
            keys = self._homes[place]
            level = LEVELS[keys.streams.index(place)]
            epoch = self._epochs.get(keys.queue, b"")
            claims += [Claim(keys.queue, level, place, entry, 1, _document(fields), epoch) for entry, fields in entries]
        return claims

    # -- the link to the server

    async def _read(self, script: scripts.Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        with self._link():
            reply = await script(self._reader, keys, args)
        if self._down_since is not None:
            outage, self._down_since = monotonic() - self._down_since, None
            if outage > self._options.lease / 3:
                # Nobody could renew meanwhile: no one is taken for dead before everyone had a lease to come back.
                self._rest(self._options.lease)
        return reply

    async def _run(self, script: scripts.Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        with self._link():
            return await script(self._commands, keys, args)

    @contextmanager
    def _link(self) -> Iterator[None]:
        started = monotonic()
        try:
            with understood(self._address):
                yield
        except Unreachable:
            if self._down_since is None:
                self._down_since = started
            raise


def _document(fields: list[bytes] | None) -> bytes | None:
    """The bytes of the field ``job``; ``None`` if the entry has none."""
    if not fields:
        return None
    if fields[0] == b"job":
        return fields[1]
    for index in range(2, len(fields), 2):
        if fields[index] == b"job":
            return fields[index + 1]
    return None


async def depth(client: scripts.AsyncCaller, keys: QueueKeys, group: str) -> Depth:
    """How much lies in one queue."""
    names = [*keys.streams, keys.due, keys.dead, keys.meta]
    entries, pending, delayed, dead, oldest, paused = await scripts.DEPTH(client, names, [group])
    age = oldest / 1000 if oldest >= 0 else None
    return Depth(keys.queue, max(0, entries - pending), pending, delayed, dead, age, paused=bool(paused))
