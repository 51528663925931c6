"""Claims of stream mode: reclaim expired leases, read new entries by priority, else block."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Final

import anyio
from redis.exceptions import ResponseError

from streamworker.broker import scripts
from streamworker.broker.claim import (
    DRAIN_LOOK,
    JUST_LOOKED,
    LEAVE,
    RESERVE,
    SILENT_WAIT,
    UNBLOCK_EVERY,
    ClaimSource,
    Options,
    Turns,
)
from streamworker.broker.keys import UNKNOWN_EPOCH, QueueKeys, document
from streamworker.broker.redis.reactions import Reaction, reaction_to, row_of
from streamworker.broker.redis.session import BLOCK, Session
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable
from streamworker.job import LEVELS, Claim
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

LEAPT_TWICE: Final = -2
"""Instead of a number of suspects: the server's clock was put back, and right again, since the last look."""
AWAY_PAUSE: Final = 1.0
"""Seconds between looks at a node that does not answer."""
PLAIN_FIELDS: Final = 2
"""A field and its value: what an entry has that came from no line."""
LAST_CALL: Final = 1.0
"""Seconds a read may take to end after it was unblocked; then its node is not waited for any more."""


class ClusterStreamClaims:
    """`StreamClaims` of a cluster, one a slot, or of several servers, one for each; behind the methods of one."""

    def __init__(
        self,
        session: Session,
        queues: Sequence[tuple[QueueKeys, int | None]],
        options: Options,
        group: str,
    ) -> None:
        self._session = session
        self._lease = options.lease
        by_slot: dict[int, list[tuple[QueueKeys, int | None]]] = {}
        for keys, cap in queues:
            by_slot.setdefault(session.address.slot(keys.base), []).append((keys, cap))
        self._sessions = [session.branch(each[0][0].base) for each in by_slot.values()]
        self._parts = [
            StreamClaims(branch, each, options, group)
            for branch, each in zip(self._sessions, by_slot.values(), strict=True)
        ]
        self.epochs: dict[str, bytes] = {}
        self.secrets: dict[str, bytes] = {}
        self.turns = Turns()
        for part in self._parts:
            part.epochs, part.secrets, part.turns = self.epochs, self.secrets, self.turns
        parts = dict(zip(by_slot, self._parts, strict=True))
        self._part_of = {keys.queue: parts[session.address.slot(keys.base)] for keys, _ in queues}
        self._rotation = _Rotation(queues, self._part_of)
        self.ready_keys: Final = [each for part in self._parts for each in part.ready_keys]
        self._reads: dict[StreamClaims, asyncio.Task[list[Claim]]] = {}
        self._away: dict[StreamClaims, Unreachable] = {}
        """Parts whose node does not answer, and the error."""
        self._hung: set[StreamClaims] = set()
        """Parts whose read did not end when it was unblocked: nothing waits for it."""
        self._interrupted = False
        self.silent = False
        """No notification arrives, see `listen`."""
        self.reply_lost = False
        """The reply to a claim may have been lost."""

    @property
    def consumer(self) -> str:
        """Name of the consumer."""
        return self._parts[0].consumer if self._parts else ""

    @consumer.setter
    def consumer(self, name: str) -> None:
        for part in self._parts:
            part.consumer = name

    @property
    def marked(self) -> frozenset[str]:
        return frozenset().union(*(part.marked for part in self._parts))

    @property
    def draining(self) -> bool:
        return any(part.draining for part in self._parts)

    @property
    def missing(self) -> int:
        """Entries that were deleted while claimed, since the start."""
        return sum(part.missing for part in self._parts)

    def bound(self, ended: Callable[[str], int], shut: Collection[str]) -> None:
        """``ended`` and ``shut`` of `Broker.claim`, for the claims from now on."""
        for part in self._parts:
            part.bound(ended, shut)

    async def claim(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        self._rest_after_outage()
        claims = await self.turns.claim(self._look, limit, running)
        if self._away:
            self._look_after_the_away(running)
        self._rest_after_outage()
        if not claims and wait > 0 and self.draining:
            await anyio.sleep(min(wait, DRAIN_LOOK))
        elif not claims and wait > 0 and not self._interrupted:
            claims = await self._wait(limit, min(wait, SILENT_WAIT) if self.silent else wait, running)
            if not claims and self._away:
                self._look_after_the_away(running)
        return claims

    async def _look(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        claims = self._brought()
        steps = [step for step in self._rotation.next() if step[0] not in self._reads]
        idle = dict.fromkeys(part for part, _ in steps)
        for part in idle:  # expired leases of all queues first: new jobs of the first queue must not starve them
            if len(claims) < limit and part.reclaims_now:
                claims += await self._looked(part, part.reclaim(limit - len(claims), [*running, *claims]))
        draining = self.draining
        suspect = any(claim.suspect for claim in claims)  # it waits until all else has ended
        for part in idle:
            part.stale = False  # from here on a notification may be newer than this look
        for part, starts in steps:
            if len(claims) < limit and not suspect and not draining and not self._silent(part):
                new = part.take(limit - len(claims), [*running, *claims] if claims else running, starts)
                claims += await self._looked(part, new)
        return claims

    async def _looked(self, part: StreamClaims, look: Coroutine[Any, Any, list[Claim]]) -> list[Claim]:
        """Claims of a look; a node that does not answer is looked at separately from then on.

        What a node answers late is brought by a later claim, so that the others do not wait for it.
        """
        read = self._reads[part] = asyncio.ensure_future(look)
        try:
            await asyncio.wait((read,), timeout=LAST_CALL)
        except asyncio.CancelledError:
            read.cancel()
            raise
        if not read.done():
            self._hung.add(part)
            return []
        del self._reads[part]
        try:
            return read.result()
        except Unreachable as error:
            self._away[part] = error
            log.error("node_away", queues=part.queues, error=str(error))
            return []

    def _silent(self, part: StreamClaims) -> bool:
        return part in self._away or part in self._hung

    def _look_after_the_away(self, running: Collection[Claim]) -> None:
        """Look at parts whose nodes do not answer in tasks of their own, so that the others do not wait for them.

        Raises:
            Unreachable: no node answers.
        """
        if len(self._away) == len(self._parts):
            error = next(iter(self._away.values()))
            self._away.clear()
            raise error
        for part in self._away:
            if part not in self._reads:
                self._reads[part] = asyncio.ensure_future(self._look_later(part, running))

    async def _look_later(self, part: StreamClaims, running: Collection[Claim]) -> list[Claim]:
        await anyio.sleep(AWAY_PAUSE)
        claims = await part.claim(1, 0, running)
        if self._away.pop(part, None) is not None:
            self.reply_lost = True
            log.info("node_back", queues=part.queues)
        return claims

    async def look_again(self) -> None:
        for part in self._parts:
            part.stir()
        for part in self._parts:
            if part not in self._away:
                await part.look_again()

    async def ensure(self, keys: QueueKeys, epoch: str) -> tuple[list[str], list[str]]:
        return await self._part_of[keys.queue].ensure(keys, epoch)

    def rest(self, seconds: float) -> None:
        """Reclaim nothing for some seconds."""
        for part in self._parts:
            part.rest(seconds)

    def _rest_after_outage(self) -> None:
        # Of any node: leases on the other nodes rest with it.
        if self._session.longest_outage() > self._lease / 3:
            self.rest(self._lease)

    def interrupt(self) -> None:
        """From now on no claim waits."""
        self._interrupted = True
        for part in self._parts:
            part.interrupt()

    async def close(self) -> None:
        """End pending reads; call it when nothing is claimed any more."""
        reads, self._reads = list(self._reads.values()), {}
        for read in reads:
            read.cancel()
        if reads:
            await asyncio.wait(reads)

    def _brought(self) -> list[Claim]:
        """Claims of ended reads; the first that failed raises, and `own_pending` finds the claims of the others."""
        claims: list[Claim] = []
        for part, read in list(self._reads.items()):
            if read.done():
                del self._reads[part]
                self._hung.discard(part)
                error = None if read.cancelled() else read.exception()
                if isinstance(error, Unreachable):
                    if part not in self._away:
                        log.error("node_away", queues=part.queues, error=str(error))
                    self._away[part] = error
                else:
                    claims += [] if read.cancelled() else read.result()
        return claims

    async def _wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        # Tasks without a group: a read whose node hangs outlives this call.
        for part in self._parts:
            if part not in self._reads and part not in self._away:
                self._reads[part] = asyncio.ensure_future(part.wait_unless_stale(limit, wait, running))
        try:
            await asyncio.wait(self._reads.values(), return_when=asyncio.FIRST_COMPLETED, timeout=wait + LAST_CALL)
            give_up = monotonic() + LAST_CALL
            while (late := self._late()) and monotonic() < give_up:
                for branch in late.values():
                    with suppress(StreamworkerError), anyio.move_on_after(LAST_CALL):
                        await branch.unblock()
                await asyncio.wait(late, timeout=UNBLOCK_EVERY)
            self._hung.update(part for part, read in self._reads.items() if not read.done())
        except asyncio.CancelledError:
            for read in self._reads.values():
                read.cancel()
            raise
        return self._brought()

    def _late(self) -> dict[asyncio.Task[list[Claim]], Session]:
        """Pending reads, and their sessions."""
        return {
            self._reads[part]: branch
            for part, branch in zip(self._parts, self._sessions, strict=True)
            if part in self._reads and not self._silent(part) and not self._reads[part].done()
        }


class _Rotation:
    """Order in which parts are looked at: as queues are listed, and the partitions of each queue in turns.

    A part with several queues may be looked at several times: all partitions of one queue come before the next queue,
    so that a backlog of one server does not starve the partitions that are on others.

    Args:
        queues: the keys of queues and partitions, in claim order.
        part_of: the part of each.
    """

    def __init__(self, queues: Sequence[tuple[QueueKeys, int | None]], part_of: Mapping[str, StreamClaims]) -> None:
        self._places: dict[str, list[tuple[StreamClaims, int]]] = {}
        """Of each queue, the part of each partition, and its number among the partitions there."""
        for keys, _ in queues:
            places, part = self._places.setdefault(keys.name, []), part_of[keys.queue]
            places.append((part, sum(each is part for each, _ in places)))
        self._turn = 0

    def next(self) -> list[tuple[StreamClaims, dict[str, int]]]:
        """(part, the queues to claim of, with the first partition of each there) for the looks of one claim."""
        self._turn += 1
        steps: list[tuple[StreamClaims, dict[str, int]]] = []
        for name, places in self._places.items():
            at, firsts = self._turn % len(places), dict[StreamClaims, int]()
            for part, number in (*places[at:], *places[:at]):
                firsts.setdefault(part, number)
            for part, number in firsts.items():
                if steps and steps[-1][0] is part:
                    steps[-1][1][name] = number
                else:
                    steps.append((part, {name: number}))
        return steps


class StreamClaims(ClaimSource):
    """`ClaimSource` that claims entries of ``queues`` for one consumer.

    Args:
        session: the connections.
        queues: (keys, cap) in claim order.
        options: the broker's.
        group: the consumer group.
    """

    def __init__(
        self, session: Session, queues: Sequence[tuple[QueueKeys, int | None]], options: Options, group: str
    ) -> None:
        super().__init__(session, queues, options)
        self._group = group
        self._all = [keys.meta for keys in self._keys] + [stream for keys in self._keys for stream in keys.streams]
        self.epochs: dict[str, bytes] = {}
        """The value that ids of each stream's entries are derived from."""
        self._tokens = [0] * len(self._keys)
        """The moment of the next reclaim of each queue by the server's clock, as last seen; 0 for none."""
        self._seen: dict[str, bytes] = {}
        """The last entry of each stream that was claimed here."""
        self._behind: dict[int, int] = {}
        """By how many ms the server's clock was put back, of each queue that has not been looked at since."""

    async def ensure(self, keys: QueueKeys, epoch: str = "") -> tuple[list[str], list[str]]:
        """Create a queue's streams and groups; returns foreign groups as "stream group", errors as "stream error"."""
        await self.seal(keys)  # first: by the epoch the secret notes whether earlier versions worked on the queue
        args: list[Any] = [self._group, epoch or secrets.token_hex(8)]
        for place in keys.streams:
            args += (self.epochs.get(place, b""), self._seen.get(place, b""))
        _, foreign, trouble, derived = await self._session.run(
            scripts.GROUPS, [keys.meta, keys.ids, *keys.streams], args
        )
        await self._session.run(scripts.LEASE, [keys.meta], [self.consumer, int(self._lease * 1000)])
        self.epochs.update(zip(keys.streams, derived, strict=True))
        return (
            [text.decode(errors="replace") for text in foreign],
            [text.decode(errors="replace") for text in trouble],
        )

    async def take(
        self,
        limit: int,
        running: Collection[Claim],
        starts: Mapping[str, int] | None = None,
        *,
        healed: bool = False,
    ) -> list[Claim]:
        """Claim new entries, in order; ``starts`` as in `Order.walk`."""
        if self.draining:
            return []
        await self._seal_again()
        queues, budgets = len(self._keys), self._order.budgets(limit)
        head = [self._group, self.consumer, limit, queues, len(budgets)]
        args = [*head, *self._bounds(limit, running), *budgets, *self._order.walk(starts)]
        script = scripts.FAIR_CLAIM if self._lined else scripts.CLAIM
        taken, trouble, paused, epochs, cancelled, sealed, fair = await self._session.read(script, self._all, args)
        self.epochs.update((place, epoch) for place, epoch in zip(self._all[queues:], epochs, strict=True) if epoch)
        for keys, secret in zip(self._keys, sealed, strict=True):
            self.secrets[keys.queue] = secret
        self._paused = frozenset(index - 1 for index in paused)
        self.marked = frozenset(self._keys[index - 1].queue for index in cancelled)
        claims: list[Claim] = []
        for index, epoch, entries in taken:
            keys, level, place = self.ready_keys[index - queues - 1]
            name, secret, self._seen[place] = keys.name, self.secrets[keys.queue], entries[-2]
            claims += [  # by position: names would cost a third of it
                Claim(name, level, place, entry, 1, body, epoch, False, False, secret)
                for entry, body in zip(entries[::2], entries[1::2], strict=True)
            ]
        if fair or self._lined:
            claims += await self._lined_up(fair, limit - len(claims), [*running, *claims])
        if trouble and await self._heal(trouble) and not healed and len(claims) < limit:
            claims += await self.take(limit - len(claims), running, starts, healed=True)
        return claims

    async def _heal(self, trouble: list[tuple[int, bytes]]) -> bool:
        """Create missing groups again; log other keys that cannot be read, and do not block on them."""
        healed = False
        for index, error in trouble:
            key, message = self._all[index - 1], error.decode(errors="replace")
            reaction = reaction_to(message)
            if index > len(self._keys) and reaction is Reaction.HEAL:
                keys, _, _ = self.ready_keys[index - len(self._keys) - 1]
                try:
                    _, problems = await self.ensure(keys)
                except (Unreachable, ConfigurationError):
                    raise
                except StreamworkerError as problem:  # the meta key itself
                    problems = [f"{key} {problem}"]
                for place, _, text in (problem.partition(" ") for problem in problems):
                    self._complain(place, text)
                if key not in {problem.partition(" ")[0] for problem in problems}:
                    log.warning("group_recreated", queue=keys.queue, stream=key)
                    healed = True
            elif reaction in (Reaction.KEY, Reaction.HEAL, Reaction.REFUSE):
                self._complain(key, message)
            else:  # not about this key: an error of the whole server that the script passed on
                with self._session.watched():
                    raise ResponseError(message)
        return healed

    async def reclaim(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """Reclaim expired leases of the queues whose turn has come."""
        claims: list[Claim] = []
        now = monotonic()
        if not running and self.draining:  # idle at last
            self._reclaim_at = [
                at if since is None else 0.0 for at, since in zip(self._reclaim_at, self._draining_since, strict=True)
            ]
        if min(self._reclaim_at) > now:
            return claims
        allowances, counted = self._allowances(limit, running), 0
        for index, keys in enumerate(self._keys):
            if self._reclaim_at[index] > now or len(claims) >= limit:
                continue
            if len(claims) > counted:  # partitions of a queue share its cap
                allowances, counted = self._allowances(limit, [*running, *claims]), len(claims)
            allowed = min(limit - len(claims), allowances[index])
            if allowed <= 0 and index not in self._paused:
                self._draining_since[index] = None
                continue
            if index in self._paused:
                self._draining_since[index] = None
                self._reclaim_at[index] = now + min(1.0, self._lease / 6)
                continue
            claims += await self._reclaim_queue(index, keys, allowed, [*running, *claims])
        return claims

    async def _reclaim_queue(self, index: int, keys: QueueKeys, limit: int, running: list[Claim]) -> list[Claim]:
        mine = keys.streams
        held = [f"{mine.index(claim.place) + 2}:{claim.entry.decode()}" for claim in running if claim.place in mine]
        args: list[Any] = [self._group, self.consumer, int(self._lease * 1000), limit]
        expected, sent = self._session.clock_should_show(), monotonic()
        wish, group = self._about_suspects(index, running), self._group_here(running)
        if self.turns.refuses(keys.name):
            wish, group, self._draining_since[index] = LEAVE, (0, *group[1:]), None
        behind = self._behind.get(index, 0)
        args += [self._apart_from, wish, expected + behind, *group, self._tokens[index], *held]
        try:
            wait, entries, missing, passed, shown, granted, longest, token = await self._session.read(
                scripts.RECLAIM, [keys.meta, *keys.streams], args
            )
        except (Unreachable, ConfigurationError):
            raise
        except StreamworkerError as problem:
            self._complain(keys.meta, str(problem))
            self._reclaim_at[index] = monotonic() + 1.0
            self._draining_since[index] = None
            return []
        self._reclaim_at[index] = monotonic() + wait / 1000
        self._longest[index] = longest / 1000
        self.missing += missing
        if passed < 0 and wait > JUST_LOOKED * 1000:
            passed = 0  # the last look left no suspect
        if wish == RESERVE and entries and not entries[0][5]:
            wish = LEAVE  # not idle any more
        self._left_to_others(index, passed, wish, granted=bool(granted))
        self._behind.pop(index, None)
        leap = self._session.clock_shows(shown, sent, expected, self._lease)
        if leap:
            self._leapt(index, expected - shown)
        if token >= 0:
            self._tokens[index] = token
        if passed == LEAPT_TWICE:
            log.warning("server_clock_jumped", queue=keys.queue, hint="it was put back and right again meanwhile")
        if leap > 0 or passed == LEAPT_TWICE:
            self.rest(self._lease)  # the other queues, too: no worker could renew in the time that the clock left out
        claims, secret = [], self.secrets.get(keys.queue, b"")
        for stream, entry, count, fields, epoch, suspect in entries:
            level = LEVELS[stream - 2]
            place, body = keys.stream(level), document(fields)
            claims.append(Claim(keys.name, level, place, entry, count, body, epoch, bool(suspect), secret=secret))
        return claims

    def _leapt(self, index: int, back: int) -> None:
        """The look at a queue showed that the server's clock leapt, back by so many ms or ahead.

        The script put the leases of its own queue right; those of the others do it when they are looked at.
        """
        self._tokens = [0] * len(self._tokens)
        self._behind = {each: back for each in range(len(self._keys)) if each != index and back > 0}

    async def wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:  # noqa: ARG002 - one entry
        """Block until a new entry arrives, at most until the next reclaim is due."""
        wait = max(0.01, min(wait, BLOCK, self._next_reclaim(running) - monotonic()))
        ready_keys = self._open(running)
        if not ready_keys:
            await self._idle(wait)
            return []
        command = ("XREADGROUP", "GROUP", self._group, self.consumer, "BLOCK", int(wait * 1000), "COUNT", 1, "STREAMS")
        try:
            with self._session.watched():
                reply = await self._session.reader.execute_command(*command, *ready_keys, *(">" for _ in ready_keys))
        except StreamworkerError as error:
            if (
                error.__cause__ is not None
                and (row := row_of(error.__cause__))
                and row.name in ("NOGROUP", "UNBLOCKED")
            ):
                return []  # the next claim creates the group, or finds the new master
            raise
        claims: list[Claim] = []
        for name, entries in reply or ():
            place = name.decode()
            keys, level = ready_keys[place]
            epoch, self._seen[place] = self.epochs.get(place, UNKNOWN_EPOCH), entries[-1][0]
            secret = self.secrets.get(keys.queue, b"")
            if len(entries[0][1] or ()) > PLAIN_FIELDS:  # from a tenant's line: the next one becomes ready
                self._lined = True
                await self._session.run(scripts.PULL, [keys.meta], [keys.shape, 0])
            claims += [
                Claim(keys.name, level, place, entry, 1, document(fields), epoch, secret=secret)
                for entry, fields in entries
            ]
        return claims
