"""The broker on Redis Streams: a consumer group per stream, the worker id as consumer, each move one Lua script."""

from __future__ import annotations

import asyncio
import random
import re
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from time import monotonic
from typing import Any, Final

import msgspec
from redis import exceptions as redis_errors

from streamworker.broker import listings, scripts
from streamworker.broker.base import RENEW_BATCH, RedisBroker, ScriptCall, promote
from streamworker.broker.claim import StreamOptions
from streamworker.broker.keys import UNKNOWN_EPOCH, QueueKeys, document, worker_key
from streamworker.broker.order import OrderSweeper
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.reactions import Reaction, reaction_to
from streamworker.broker.redis.session import Session
from streamworker.broker.settle import StreamSettlement
from streamworker.broker.stream_claim import ClusterStreamClaims, StreamClaims
from streamworker.errors import ConfigurationError, Unreachable
from streamworker.job import Claim, Depth
from streamworker.policy import apart_from
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")


class StreamBroker(RedisBroker[QueueKeys, StreamClaims | ClusterStreamClaims]):
    """`WorkerBroker` of stream mode; one instance serves one worker, or producers."""

    def __init__(self, address: RedisAddress, options: StreamOptions) -> None:
        self._group = options.group
        super().__init__(address, options)
        self._tidy_at = 0.0
        self._order = OrderSweeper(self._session)
        self._renewal_failed: set[object] = set()
        """Nodes of a cluster whose claims could not be renewed the last time."""
        self._confirmed_lately: deque[tuple[str, bytes, int]] = deque(maxlen=max(options.groups))

    def _key(self, queue: str) -> QueueKeys:
        return QueueKeys(queue, self._options.namespace)

    def _claim_source(self, queues: Sequence[tuple[QueueKeys, int | None]]) -> StreamClaims | ClusterStreamClaims:
        kind = ClusterStreamClaims if self._session.address.spread else StreamClaims
        return kind(self._session, queues, self._options, self._group)

    async def _create(self, keys: QueueKeys) -> str:
        foreign, trouble = await self._source.ensure(keys, await self._fresh_epoch(keys))
        if foreign:
            stream, _, group = foreign[0].partition(" ")
            raise ConfigurationError(
                f"the stream {stream} is also read by the group {group!r}, which would miss what streamworker "
                "deletes when it is done: destroy that group (XGROUP DESTROY), or give one of them another queue"
            )
        stream, _, problem = trouble[0].partition(" ") if trouble else ("", "", "")
        if trouble and reaction_to(problem) is Reaction.FULL:  # it passes: no error of the configuration
            raise Unreachable(f"Redis is out of memory and cannot make {stream}: raise maxmemory or delete keys")
        return f"the stream {stream} cannot be used: {problem}" if trouble else ""

    async def leave(self) -> bool:
        gone = True
        for keys in self._keys:
            args = [self._group, self._source.consumer]
            try:
                left = bool(await self._session.run(scripts.LEAVE, keys.streams, args))
            except Unreachable:
                if not self._session.address.spread:
                    raise
                continue  # the worker knows its claims there; the consumer is pruned when the node is back
            if left:
                await self._forget_lease(keys)
            gone = gone and left
        try:
            with self._session.watched():
                await self._session.commands.delete(self._name)
        except Unreachable:
            if not self._session.address.spread:
                raise  # else the heartbeat's node is away: it expires by itself
        return gone

    async def interrupt(self) -> None:
        self._source.interrupt()
        await self._session.unblock()

    async def confirm(self, claim: Claim) -> Claim | None:
        args = [self._group, self._source.consumer, claim.entry, claim.count]
        # After a lost reply `own_pending` decides by this whether the delivery was counted.
        self._confirmed_lately.append((claim.place, claim.entry, claim.count))
        if await self._confirmed(scripts.CONFIRM, [claim.place], args):
            return msgspec.structs.replace(claim, count=claim.count + 1, suspect=False)
        return None

    async def renew(self, claims: Collection[Claim]) -> list[Claim]:
        by_home: dict[object, dict[str, dict[bytes, Claim]]] = {}
        for claim in claims:
            places = by_home.setdefault(self._session.address.home(claim.place), {})
            places.setdefault(claim.place, {})[claim.entry] = claim
        lost: list[Claim] = []
        down: dict[object, Unreachable] = {}

        async def renewed(home: object, by_place: dict[str, dict[bytes, Claim]]) -> None:
            try:
                for place, mine in by_place.items():
                    lost.extend(await self._renew(place, mine))
            except Unreachable as error:  # claims on other nodes of a cluster must not expire with these
                down[home] = error

        # At once: while one node hangs, leases on the others must not expire.
        await asyncio.gather(*(renewed(home, places) for home, places in by_home.items()))
        homes = by_home.keys()
        if down and len(down) == len(homes):
            raise next(iter(down.values()))
        for away, problem in down.items():
            if away not in self._renewal_failed:  # once an outage: it is tried again every third of a lease
                log.warning("renewal_failed", error=str(problem))
        for node in (self._renewal_failed & homes) - down.keys():
            log.info("renewal_back", node=str(node))
        self._renewal_failed = (self._renewal_failed - homes) | down.keys()
        return lost

    async def _renew(self, place: str, mine: dict[bytes, Claim]) -> list[Claim]:
        """Renew claims of one stream; returns those that are lost."""
        lost: list[Claim] = []
        meta, entries = self._keys_by_place[place].meta, list(mine)
        for start in range(0, len(entries), RENEW_BATCH):
            args: list[Any] = [self._group, self._source.consumer, int(self._options.lease * 1000)]
            for entry in entries[start : start + RENEW_BATCH]:
                args += (entry, mine[entry].count)
            lost += [mine[entry] for entry in await self._session.in_thread(scripts.RENEW, [place, meta], args)]
        return lost

    def _renewals(self) -> tuple[scripts.LuaScript, list[ScriptCall]]:
        args = [self._group, self._source.consumer, int(self._options.lease * 1000)]
        return scripts.KEEP, [([place], args) for place in self._keys_by_place]

    def _sender(self) -> StreamSettlement:
        return StreamSettlement(self._session.pool, self._group, self._source.consumer)

    async def own_pending(self, running: Collection[Claim]) -> list[Claim]:
        found: list[Claim] = []
        for keys, level, place in self._source.ready_keys:
            mine = [claim.entry for claim in running if claim.place == place]
            epoch = self._source.epochs.get(place, UNKNOWN_EPOCH)
            secret = self._source.secrets.get(keys.queue, b"")
            args = [self._group, self._source.consumer, *mine]
            try:
                pending = await self._session.run(scripts.OWN_PENDING, [place], args)
            except Unreachable:
                if not self._session.address.spread:
                    raise
                continue  # claims on other nodes are found all the same; these when their node is back
            for entry, count, fields in pending:
                # A counted claim is at most one delivery below a suspect. From there on it was only reserved, unless
                # its confirmation succeeded.
                counted = (place, entry, count - 1) in self._confirmed_lately
                suspect = count >= apart_from(self._options.groups) - 1 and not counted
                body = document(fields)
                found.append(Claim(keys.name, level, place, entry, count, body, epoch, suspect, secret=secret))
        return await self._cancels.judged(found, {keys.queue for keys in self._keys})

    async def promote(self) -> float:
        wait = await self._move(await promote(self._session, self._keys))
        if monotonic() >= self._tidy_at:
            await self._tidy()
        return wait

    async def _tidy(self) -> None:
        lease = self._options.lease
        self._tidy_at = monotonic() + tidy_pause(lease)
        for keys in self._keys:
            for name in await tidy(self._session, keys, self._group, namespace=self._options.namespace, idle=2 * lease):
                log.info("consumer_pruned", queue=keys.queue, consumer=name)

            async def gone(name: str, keys: QueueKeys = keys) -> bool:
                return bool(await self._session.run(scripts.LEAVE, keys.streams, [self._group, name]))

            await forget_leases(self._session, keys, self._options.namespace, gone)
            await self._order.sweep(keys)
        self._tidy_at = self._order.next_look(self._tidy_at)

    async def depth(self) -> list[Depth]:
        return listings.folded([await listings.depth(self._session.run, keys, self._group) for keys in self._keys])


LEASES: Final = 10
"""Most names of one queue in one look."""
_LINE: Final = re.compile(rb"(\S+) \d+\n")


def tidy_pause(lease: float) -> float:
    """Seconds between two looks, for workers of that lease."""
    return max(2.0, min(60.0, 4 * lease)) * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load


async def tidy(session: Session, keys: QueueKeys, group: str, *, namespace: str, idle: float) -> list[str]:
    """Delete consumers of dead workers from one queue's groups.

    Args:
        session: the connections.
        keys: the queue's keys.
        group: the consumer group.
        namespace: prefix of every key.
        idle: seconds for which a consumer must have been idle.

    Returns:
        The names of the deleted consumers.
    """
    silent: dict[str, float] = {}
    for stream in keys.streams:
        for info in await _consumers(session, stream, group):
            name = info["name"].decode(errors="replace")
            silent[name] = min(silent.get(name, float("inf")), info["idle"] / 1000)
    gone = []
    for name in [name for name, seconds in silent.items() if seconds > idle]:
        with session.watched():
            alive = await session.commands.exists(worker_key(namespace, name))
        # The script checks again for pending entries: deleting a consumer deletes them with it.
        if not alive and await session.run(scripts.LEAVE, keys.streams, [group, name]):
            gone.append(name)
    return gone


async def forget_leases(
    session: Session, keys: QueueKeys, namespace: str, gone: Callable[[str], Awaitable[bool]]
) -> None:
    """Delete the stored leases of some dead workers without claims.

    Args:
        session: the connections.
        keys: the queue's keys.
        namespace: prefix of every key.
        gone: whether a worker has no claims.
    """
    names = [
        name.decode(errors="replace") for name in _LINE.findall(await session.ask("HGET", keys.meta, "leases") or b"")
    ]
    for name in random.sample(names, min(LEASES, len(names))):  # the next look takes others
        if not await session.ask("EXISTS", worker_key(namespace, name)) and await gone(name):
            await session.run(scripts.LEASE, [keys.meta], [name, 0])


async def _consumers(session: Session, stream: str, group: str) -> list[dict[str, Any]]:
    try:
        with session.watched():
            return list(await session.commands.xinfo_consumers(stream, group))
    except Exception as error:
        if isinstance(error.__cause__, redis_errors.ResponseError):
            return []  # no such stream or group: the next claim makes it
        raise
