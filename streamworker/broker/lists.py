"""The broker on Redis lists: elements are moved into a list of the worker's own, each move one Lua script.

For producers that push JSON to ``queue:*``. Delayed jobs and dead letters are under the keys of stream mode.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, ClassVar, Final

import anyio
import msgspec
from redis.exceptions import ResponseError

from streamworker.broker import SettleRequest, listings, scripts
from streamworker.broker.base import RENEW_BATCH, RedisBroker, ScriptCall, promote
from streamworker.broker.claim import LEAVE, RESERVE, ClaimSource, Options
from streamworker.broker.keys import ListKeys, QueueKeys, lease_of, leased, unwrapped, worker_key, wrapped
from streamworker.broker.order import OrderSweeper
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.cluster import ClusterReader
from streamworker.broker.redis.connection import Reader
from streamworker.broker.redis.reactions import Reaction, clustered, reaction_to, row_of, understood
from streamworker.broker.redis.session import BLOCK, Session
from streamworker.broker.settle import (
    Code,
    appended_to,
    dead_letter_fields,
    freed,
    kept_at,
    lines_of,
    note,
    parking,
    tell,
)
from streamworker.broker.stream import forget_leases, tidy_pause
from streamworker.errors import ConfigurationError, StreamworkerError, UsageError
from streamworker.job import Claim, Depth
from streamworker.results import BOUNDS, OutputBatch
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")


class ListClaims(ClaimSource):
    """`ClaimSource` that takes elements of ``queues`` for one worker.

    Args:
        session: the connections.
        queues: (keys, cap) in claim order.
        options: the broker's.
        reclaimer: releases expired claims.
    """

    def __init__(
        self,
        session: Session,
        queues: Sequence[tuple[ListKeys, int | None]],
        options: Options,
        reclaimer: Reclaimer,
    ) -> None:
        super().__init__(session, queues, options, HEADS)
        self._lists: Final[list[ListKeys]] = [keys for keys, _ in queues]
        self._reclaimer = reclaimer
        self._wake_lists = WakeLists(session, len(self.ready_keys))
        self._for_others: frozenset[str] = frozenset()

    async def reclaim(self, limit: int, running: Collection[Claim]) -> list[Claim]:  # noqa: ARG002 - they run on their own
        """Expired claims go to the right ends of their lists, and are taken from there before all others."""
        await self._reclaimer.give_back(running)
        return []

    async def take(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """Take elements, in order."""
        await self._seal_again()
        keys = [each.meta for each in self._lists] + [each.leases for each in self._lists]
        keys += [each.claimed(self.consumer) for each in self._lists] + [place for _, _, place in self.ready_keys]
        budgets = self._order.budgets(limit)
        held = [claim.entry for claim in running]
        args: list[Any] = [self.consumer, limit, len(self._lists), len(budgets), secrets.token_hex(6)]
        wish = self._about_suspects(0, running)
        staying = [number for number, each in enumerate(self._lists, 1) if self.turns.refuses(each.name)]
        args += [self._apart_from, " ".join(map(str, [wish, *staying])), *self._group_here(running), len(held)]
        args += [*self._bounds(limit, running), *budgets, *held, *self._order.walk()]
        answer = await self._session.read(scripts.FAIR_TAKE if self._lined else scripts.LIST_TAKE, keys, args)
        taken, trouble, paused, _, passed, suspects, cancelled, granted, sealed, fair = answer
        self.secrets.update(zip((each.queue for each in self._lists), sealed, strict=True))
        if wish == RESERVE and taken and not taken[0][1][0][2]:
            wish = LEAVE  # not idle any more
        self._left_to_others(0, suspects, wish, granted=bool(granted))  # of any queue: this script reads all of them
        self._paused = frozenset(index - 1 for index in paused)
        self.marked = frozenset(self._keys[index - 1].queue for index in cancelled)
        first = HEADS * len(self._lists) + 1
        self._for_others = frozenset(self.ready_keys[index - first][2] for index in passed)
        claims: list[Claim] = []
        for index, rows in taken:
            home, level, place = self.ready_keys[index - first]
            name, secret = home.name, self.secrets[home.queue]
            claims += [
                Claim(name, level, place, entry, count, body, b"", bool(suspect), False, secret)
                for entry, count, suspect, body in rows
            ]
        for index, error in trouble:
            self._judge(keys[index - 1], index, error.decode(errors="replace"))
        if fair or self._lined:
            claims += await self._lined_up(fair, limit - len(claims), [*running, *claims])
        return claims

    def _judge(self, key: str, index: int, message: str) -> None:
        """Log a key that cannot be used, and do not wait on its queue meanwhile; raise what is not about one key."""
        if reaction_to(message) not in (Reaction.KEY, Reaction.REFUSE, Reaction.FULL):
            with self._session.watched():  # not about this key: an error of the whole server that the script passed on
                raise ResponseError(message)
        self._complain(key, message)
        heads = HEADS * len(self._lists)
        if index <= heads:
            for place in self._lists[(index - 1) % len(self._lists)].lists:
                self._unreadable_until[place] = self._unreadable_until[key]

    async def wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """Wait until a list has an element, and take it."""
        wait = max(0.01, min(wait, BLOCK, min(self._reclaimer.look_at) - monotonic()))
        ready_keys = self._open(running)
        open_ = [place for place in ready_keys if place not in self._for_others]
        if len(open_) < len(ready_keys):
            wait = min(wait, PASSED_PAUSE)
        if not open_:
            await self._idle(wait)
            return []
        try:
            awake = await self._wake_lists.wait(open_, wait)
        except StreamworkerError as error:
            cause = error.__cause__
            if cause is not None and reaction_to(cause) is Reaction.KEY:
                return []  # the next look at the lists finds out which
            raise
        return await self.take(limit, running) if awake and not self._interrupted.is_set() else []

    def rest(self, seconds: float) -> None:
        self._drain_no_more()
        self._reclaimer.rest(seconds)

    def _rest_after_outage(self) -> None:
        self._reclaimer.rest_after_outage()

    async def end_wait(self) -> None:
        """End the current wait; the blocking reads go on."""
        self._wake_lists.wake()

    async def unblock(self) -> None:
        """End the blocking reads."""
        await self._wake_lists.unblock()

    async def close(self) -> None:
        await self._wake_lists.close()


MOST: Final = 10_000
"""Most expired claims of a queue in one look."""
BATCH: Final = 500
"""Most claims that one script call releases."""


class Reclaimer:
    """Releases expired claims of ``queues``.

    Args:
        session: the connections.
        queues: their keys.
        lease: seconds after which an unrenewed claim expires.
    """

    def __init__(self, session: Session, queues: Sequence[ListKeys], *, lease: float) -> None:
        self._session = session
        self._keys = list(queues)
        self._lease = lease
        self._longest = 0.0
        self.worker = ""
        """Id of the worker that looks."""
        self.look_at = [0.0] * len(self._keys)
        """Monotonic seconds of the next look at each queue."""
        self._tokens = [0] * len(self._keys)
        """The moment of the next look at each queue by the server's clock, as last seen; 0 for none."""
        self._resting_until = 0.0
        self.missing = 0
        """Claims whose jobs were deleted, since the start."""

    def add(self, keys: ListKeys) -> None:
        """Add a queue."""
        self._keys.append(keys)
        self.look_at.append(self._resting_until)
        self._tokens.append(0)

    def rest(self, seconds: float) -> None:
        """Release nothing for some seconds."""
        seconds = max(seconds, self._longest) if seconds > 0 else seconds
        self._resting_until = max(self._resting_until, monotonic() + seconds)
        self.look_at = [max(at, self._resting_until) for at in self.look_at]

    def rest_after_outage(self) -> None:
        """After an outage no worker could renew: release nothing before every worker had one lease to renew."""
        if self._session.outage() > self._lease / 3:
            self.rest(self._lease)

    async def give_back(self, running: Collection[Claim] | None) -> float:
        """Release expired claims of the queues whose look is due; returns the seconds until the next look.

        Args:
            running: claims that run here, which are left to other workers; ``None`` for all that this worker holds.
        """
        now = monotonic()
        due = [index for index, at in enumerate(self.look_at) if at <= now]
        if due:
            names = [name for index in due for name in (self._keys[index].meta, self._keys[index].leases)]
            expected, sent = self._session.clock_should_show(), now
            args = [round(self._lease * 1000), MOST, expected, *(self._tokens[index] for index in due)]
            shown, *reply = await self._session.run(scripts.LIST_OVERDUE, names, args)
            leap = self._session.clock_shows(shown, sent, expected, self._lease)
            if leap:
                self._tokens = [0] * len(self._tokens)
            own = None if running is None else {(claim.home, claim.entry) for claim in running}
            for index, (wait, members, trouble, longest, token, leapt) in zip(due, reply, strict=True):
                self.look_at[index] = monotonic() + wait / 1000
                self._longest = max(self._longest, longest / 1000)
                keys = self._keys[index]
                if token >= 0:
                    self._tokens[index] = token
                if leapt:
                    log.warning(
                        "server_clock_jumped", queue=keys.queue, hint="it was put back and right again meanwhile"
                    )
                if trouble:
                    log.error("orphans_unreadable", queue=keys.queue, error=trouble.decode(errors="replace"))
                elif members:
                    await self._return(keys, members, own)
            if leap > 0:
                self.rest(self._lease)  # the queues that were not due, too: all their leases look expired
        return max(0.0, min(self.look_at, default=self._lease + monotonic()) - monotonic())

    async def _return(self, keys: ListKeys, members: list[bytes], own: set[tuple[str, bytes]] | None) -> None:
        """The newest first, so that the oldest ends up rightmost however often this is interrupted."""
        holders: dict[str, int] = {}
        entries: list[tuple[bytes, int]] = []
        for member in sorted(members, reverse=True):
            lease = lease_of(member)
            if lease is None or (lease[2] == self.worker and (own is None or (keys.queue, lease[0]) in own)):
                continue  # this worker must not claim again what it still runs past its deadline
            entries.append((member, holders.setdefault(lease[2], len(holders) + 6)))
        names = [keys.leases, *keys.lists, keys.meta, *(keys.claimed(worker) for worker in holders)]
        for start in range(0, len(entries), BATCH):
            args: list[Any] = [round(max(self._lease, self._longest) * 1000)]
            for entry in entries[start : start + BATCH]:
                args += entry
            returned, missing, *errors = await self._session.run(scripts.LIST_RETURN, names, args)
            self.missing += missing
            if returned:
                log.info("jobs_returned", queue=keys.queue, jobs=returned, workers=list(holders))
            for error in set(errors):
                log.error("orphans_stuck", queue=keys.queue, error=error.decode(errors="replace"))


class ListBroker(RedisBroker[ListKeys, ClaimSource]):
    """List mode of the `Broker` protocol; one instance serves one worker, or producers."""

    _source_class: ClassVar[Callable[..., ClaimSource]] = ListClaims

    def __init__(self, address: RedisAddress, options: Options) -> None:
        refuse_cluster(address)
        super().__init__(address, options)
        self._tidy_at = 0.0
        self._order = OrderSweeper(self._session)

    def _key(self, queue: str) -> ListKeys:
        return ListKeys(queue, self._options.namespace)

    def _claim_source(self, queues: Sequence[tuple[ListKeys, int | None]]) -> ClaimSource:
        self._reclaimer = Reclaimer(self._session, self._keys, lease=self._options.lease)
        return self._source_class(self._session, queues, self._options, self._reclaimer)

    @property
    def _lease_ms(self) -> int:
        return round(self._options.lease * 1000)

    async def open(self) -> None:
        with self._session.watched():
            refuse_cluster(self._session.address, await self._session.commands.info("server"))
        await super().open()

    def _name_worker(self, worker_id: str) -> None:
        super()._name_worker(worker_id)
        self._reclaimer.worker = worker_id

    async def _create(self, keys: ListKeys) -> str:
        if ":claimed:" in keys.queue:
            raise ConfigurationError(
                f"the queue {keys.queue} has the name of what a worker holds in list mode: leave out :claimed:"
            )
        for name, wanted in {**keys.types, keys.claimed(self._source.consumer): "list"}.items():
            kind = (await self._session.ask("TYPE", name)).decode()
            if kind not in (wanted, "none"):
                return f"the key {name} is a {kind}, not a {wanted}: rename or delete it"
        await self._source.seal(keys)
        await self._note_lease(keys, self._lease_ms)
        return ""

    async def leave(self) -> bool:
        mine = [keys.claimed(self._source.consumer) for keys in self._keys]
        held = [await self._session.ask("LLEN", name) for name in mine]
        for keys, jobs in zip(self._keys, held, strict=True):
            if not jobs:
                await self._forget_lease(keys)
        await self._session.ask("DEL", self._name)
        return not any(held)

    async def interrupt(self) -> None:
        self._source.interrupt()
        await self._source.unblock()

    async def confirm(self, claim: Claim) -> Claim | None:
        keys, worker = self._keys_by_place[claim.place], self._source.consumer
        counted = msgspec.structs.replace(claim, count=claim.count + 1, suspect=False)
        args = [leased(claim, worker), wrapped(claim), leased(counted, worker), wrapped(counted)]
        confirmed = await self._confirmed(scripts.LIST_CONFIRM, [keys.claimed(worker), keys.leases], args)
        return counted if confirmed else None

    async def renew(self, claims: Collection[Claim]) -> list[Claim]:
        by_queue: dict[ListKeys, dict[bytes, Claim]] = {}
        for claim in claims:
            by_queue.setdefault(self._keys_by_place[claim.place], {})[leased(claim, self._source.consumer)] = claim
        lost: list[Claim] = []
        for keys, mine in by_queue.items():
            members, names = list(mine), [keys.leases, keys.claimed(self._source.consumer), keys.meta]
            for start in range(0, len(members), RENEW_BATCH):
                batch = [self._source.consumer, self._lease_ms, *members[start : start + RENEW_BATCH]]
                lost += [mine[member] for member in await self._session.in_thread(scripts.LIST_RENEW, names, batch)]
        return lost

    def _renewals(self) -> tuple[scripts.LuaScript, list[ScriptCall]]:
        worker = self._source.consumer
        calls: list[ScriptCall] = [
            ([keys.leases, keys.claimed(worker)], [worker, self._lease_ms]) for keys in self._keys
        ]
        return scripts.LIST_KEEP, calls

    def _sender(self) -> ListSettlement:
        return ListSettlement(self._session.pool, self._source.consumer)

    async def own_pending(self, running: Collection[Claim]) -> list[Claim]:
        known = {(claim.home, claim.entry) for claim in running}
        found: list[Claim] = []
        for keys in self._keys:
            wrappers = await self._session.ask("LRANGE", keys.claimed(self._source.consumer), 0, -1)
            secret = self._source.secrets.get(keys.queue, b"")
            claims = [unwrapped(keys, wrapper, secret) for wrapper in wrappers]
            found += [claim for claim in claims if claim is not None and (keys.queue, claim.entry) not in known]
        return await self._cancels.judged(found, {keys.queue for keys in self._keys})

    async def promote(self) -> float:
        wait = await self._move(await promote(self._session, self._keys))
        # Here too, because no worker claims while it runs as many jobs as it may.
        self._reclaimer.rest_after_outage()
        if monotonic() >= self._tidy_at:
            self._tidy_at = monotonic() + tidy_pause(self._options.lease)
            for keys in self._keys:
                await forget_leases(self._session, keys, self._options.namespace, self._holds_nothing_of(keys))
                await self._order.sweep(keys)
            self._tidy_at = self._order.next_look(self._tidy_at)
        return min(wait, await self._reclaimer.give_back(None))

    def _holds_nothing_of(self, keys: ListKeys) -> Callable[[str], Awaitable[bool]]:
        async def gone(worker: str) -> bool:
            return not await self._session.ask("LLEN", keys.claimed(worker))

        return gone

    async def depth(self) -> list[Depth]:
        return listings.folded([await listings.list_depth(self._session.run, keys) for keys in self._keys])


def refuse_cluster(address: RedisAddress, info: dict[str, Any] | None = None) -> None:
    """Refuse a cluster: list mode moves jobs between keys that a cluster keeps on different nodes.

    Args:
        address: the server.
        info: INFO's section "server", once it is known.

    Raises:
        ConfigurationError: the server is a cluster's.
    """
    if address.given:
        raise ConfigurationError(
            "list mode has all partitions of a queue on one server: set a number in STREAMWORKER_PARTITIONS, or "
            "STREAMWORKER_MODE=stream"
        )
    if address.spread or (info is not None and clustered(info)):
        raise ConfigurationError(
            f"list mode cannot use the Redis Cluster at {address}, whose nodes would share a queue's lists: set "
            "STREAMWORKER_MODE=stream, or use a single server or Sentinel"
        )


HEADS: Final = 3
"""Keys of a queue before the lists in the script's KEYS: meta hash, lease set, claimed list of the worker."""
PASSED_PAUSE: Final = 0.5
"""Most seconds between looks at a list whose right end holds elements that only other workers may take."""


class ListSettlement:
    """`ClaimSettlement` of claims in the claimed lists of one worker.

    Args:
        client: sends the scripts.
        worker: the worker's id.
    """

    def __init__(self, client: scripts.AsyncCaller, worker: str) -> None:
        self._client, self._worker = client, worker
        self.waited = False

    def _fence(self, claim: Claim) -> tuple[bytes, bytes]:
        """(member of the lease set, string in the worker's list)."""
        return leased(claim, self._worker), wrapped(claim)

    async def done(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        return await self._done(scripts.LIST_DONE, keys, items, [])

    async def done_in_order(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        return await self._done(scripts.LIST_DONE_IN_ORDER, keys, items, lines_of(items))

    async def _done(
        self, script: scripts.LuaScript, keys: QueueKeys, items: list[SettleRequest], args: list[Any]
    ) -> list[Code]:
        lists = as_lists(keys)
        for item in items:
            args += self._fence(item.claim)
        names = [lists.claimed(self._worker), lists.leases, lists.meta]
        codes: list[Code]
        *codes, waited = await script(self._client, names, args)
        self.waited = bool(waited)
        return codes

    async def tell(self, keys: QueueKeys, items: list[SettleRequest]) -> None:
        await tell(self._client, keys, items)

    async def finish(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        lists = as_lists(keys)
        names = [lists.claimed(self._worker), lists.leases, lists.meta, lists.cancelled]
        names += kept_at(keys, items)
        args: list[Any] = []
        for item in items:
            args += (*self._fence(item.claim), item.job_id, *note(item), freed(item, keys, names), item.order)
        return list(await scripts.LIST_FINISH(self._client, names, args))

    async def park(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        lists = as_lists(keys)
        now = time.time()
        args: list[Any] = []
        for item in items:
            args += (*self._fence(item.claim), *parking(item, now))
        names = [lists.claimed(self._worker), lists.leases, items[0].claim.place, lists.due, lists.bodies, lists.meta]
        names += [worker_key(lists.namespace, self._worker), lists.calls]
        return list(await scripts.LIST_PARK(self._client, names, args))

    async def bury(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        lists = as_lists(keys)
        args: list[Any] = []
        for item in items:
            claim = item.claim
            told = {"job": claim.body or b"", **dead_letter_fields(item)}
            told |= {"deliveries": claim.count, "worker": self._worker, "entry": claim.entry}
            args = args or [2 * len(told)]
            args += (*self._fence(claim), *note(item), item.job_id, int(item.halts))
            for pair in told.items():
                args += pair
        names = [lists.claimed(self._worker), lists.leases, lists.dead, lists.meta]
        names += [worker_key(lists.namespace, self._worker), *(keys.result(item.job_id) for item in items)]
        return list(await scripts.LIST_BURY(self._client, names, args))

    async def emit(self, keys: QueueKeys, batches: list[OutputBatch]) -> list[Code]:
        lists = as_lists(keys)
        outputs, bounds = appended_to(keys, batches, BOUNDS)
        args: list[Any] = [*bounds]
        for batch in batches:
            _, held = self._fence(batch.claim)
            args += (leased(batch.claim, self._worker), int(held != b""))
            args += (batch.attempt, batch.offset, batch.count, batch.chunks)
        names = [lists.leases, lists.claimed(self._worker), *outputs]
        return list(await scripts.LIST_EMIT(self._client, names, args))


def as_lists(keys: QueueKeys) -> ListKeys:
    """The keys, which must be those of list mode."""
    if not isinstance(keys, ListKeys):
        raise UsageError(f"the queue {keys.queue} is not one of list mode")
    return keys


WAKE_BLOCK: Final = 30.0
"""Seconds of one blocking read; many lists block longer, so that all together ask the server rarely."""
LAST_CALL: Final = 1.0
"""Seconds a blocking read may take to end after it was unblocked."""


class WakeLists:
    """Blocking reads of lists, a connection each, opened when a list is first waited on.

    Args:
        session: the connections.
        count: most lists.
    """

    def __init__(self, session: Session, count: int) -> None:
        self._session = session
        self._block = max(WAKE_BLOCK, 3.0 * count)
        self._readers: dict[str, Reader | ClusterReader] = {}
        self._waits: dict[str, asyncio.Task[bool]] = {}
        self._woken: asyncio.Future[None] | None = None

    async def wait(self, keys: Collection[str], wait: float) -> bool:
        """Wait until one of the lists may hold something, at most ``wait`` seconds; False if none does.

        Raises:
            Unreachable: the server is gone.
            StreamworkerError: a list cannot be waited for.
        """
        for key in keys:
            if key not in self._readers:
                self._readers[key] = self._session.address.reader(self._block, self._session.commands)
            if key not in self._waits:
                # Tasks without a group: a wait outlives this call.
                self._waits[key] = asyncio.ensure_future(self._wait(key))
        watched = {self._waits[key]: key for key in keys}
        self._woken = asyncio.get_running_loop().create_future()
        ends: list[asyncio.Future[Any]] = [*watched, self._woken]
        await asyncio.wait(ends, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        self._woken = None
        done = [task for task in watched if task.done()]
        for task in done:
            del self._waits[watched[task]]
        failures = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
        if failures:
            raise failures[0]
        return any(not task.cancelled() and task.result() for task in done)

    async def _wait(self, key: str) -> bool:
        reader = self._readers[key]
        try:
            with understood(self._session.address):
                reply = await reader.execute_command("BLMOVE", key, key, "RIGHT", "RIGHT", self._block)
        except StreamworkerError as error:
            row = row_of(error.__cause__) if error.__cause__ is not None else None
            if row is not None and row.name == "OOM":  # BLMOVE could grow, and so is refused while memory is out
                await anyio.sleep(LAST_CALL)
                return True
            await reader.close()  # the next wait connects again
            raise
        return reply is not None

    def wake(self) -> None:
        """End `wait` now; the blocking reads go on."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def unblock(self) -> None:
        """End all blocking reads soon."""
        for key in [key for key, wait in self._waits.items() if not wait.done()]:
            with understood(self._session.address):
                await self._readers[key].unblock()

    async def close(self) -> None:
        """End all blocking reads and close their connections."""
        waits = [wait for wait in self._waits.values() if not wait.done()]
        if waits:
            with suppress(StreamworkerError), anyio.move_on_after(LAST_CALL):
                await self.unblock()
                await asyncio.wait(waits)
            for wait in waits:
                wait.cancel()
        if self._waits:
            await asyncio.gather(*self._waits.values(), return_exceptions=True)
        self._waits.clear()
        for reader in self._readers.values():
            await reader.close()
        self._readers.clear()
