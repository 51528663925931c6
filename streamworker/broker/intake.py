"""How a worker comes to jobs in stream mode: new entries in order, orphans by sweeping, waiting when there is none."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from time import monotonic
from typing import Any, Final

from redis.exceptions import ResponseError

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys
from streamworker.broker.link import BLOCK, Link
from streamworker.broker.order import Order
from streamworker.broker.reactions import Reaction, reaction_to, row_of
from streamworker.broker.taking import JUST_LOOKED, LEAVE, RESERVE, Taking
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable
from streamworker.job import LEVELS, Claim
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

UNKNOWN_EPOCH: Final = b"0"
"""Where it is not known what ids are derived from. Never empty: that says that entries name their jobs."""


class Intake(Taking):
    """Claims entries of ``queues`` for one consumer.

    Args:
        link: the connections.
        queues: (keys, cap) in the order they are taken.
        group: the consumer group.
        lease: seconds after which an unrenewed claim is an orphan.
        weighted: weighted order of levels.
    """

    def __init__(
        self,
        link: Link,
        queues: Sequence[tuple[QueueKeys, int | None]],
        *,
        group: str,
        lease: float,
        weighted: bool,
        alone_from: int,
    ) -> None:
        super().__init__(link, queues, lease=lease, alone_from=alone_from)
        self._group = group
        self._order = Order(len(queues), weighted=weighted)
        self._all = [keys.meta for keys in self._keys] + [stream for keys in self._keys for stream in keys.streams]
        self.epochs: dict[str, bytes] = {}
        """What the ids of each stream's entries are derived from."""
        self._seen: dict[str, bytes] = {}
        """The last entry of each stream that came here."""

    async def ensure(self, keys: QueueKeys) -> tuple[list[str], list[str]]:
        """Make a queue's streams and groups; returns foreign groups as "stream group", troubles as "stream error"."""
        await self.seal(keys)  # first: whether others worked on the queue before is told by its epoch
        args: list[Any] = [self._group, secrets.token_hex(8)]
        for place in keys.streams:
            args += (self.epochs.get(place, b""), self._seen.get(place, b""))
        _, foreign, trouble, derived = await self._link.run(scripts.GROUPS, [keys.meta, keys.ids, *keys.streams], args)
        await self._link.run(scripts.LEASE, [keys.meta], [self.consumer, int(self._lease * 1000)])
        self.epochs.update(zip(keys.streams, derived, strict=True))
        return (
            [text.decode(errors="replace") for text in foreign],
            [text.decode(errors="replace") for text in trouble],
        )

    async def take(self, limit: int, running: Collection[Claim], *, healed: bool = False) -> list[Claim]:
        """New entries, in order."""
        if self.draining:
            return []
        await self._seal_again()
        queues, budgets = len(self._keys), self._order.budgets(limit)
        head = [self._group, self.consumer, limit, queues, len(budgets)]
        args = [*head, *self._allowances(limit, running), *budgets, *self._order.steps]
        taken, trouble, paused, epochs, cancelled, sealed = await self._link.read(scripts.CLAIM, self._all, args)
        self.epochs.update((place, epoch) for place, epoch in zip(self._all[queues:], epochs, strict=True) if epoch)
        for keys, secret in zip(self._keys, sealed, strict=True):
            self.secrets[keys.queue] = secret
        self._paused = frozenset(index - 1 for index in paused)
        self.marked = frozenset(self._keys[index - 1].queue for index in cancelled)
        claims: list[Claim] = []
        for index, epoch, entries in taken:
            keys, level, place = self.spots[index - queues - 1]
            name, secret, self._seen[place] = keys.queue, self.secrets[keys.queue], entries[-1][0]
            claims += [  # by position: names would cost a third of it
                Claim(name, level, place, entry, 1, document(fields), epoch, False, False, secret)
                for entry, fields in entries
            ]
        if trouble and await self._heal(trouble) and not healed and len(claims) < limit:
            claims += await self.take(limit - len(claims), running, healed=True)
        return claims

    async def _heal(self, trouble: list[tuple[int, bytes]]) -> bool:
        """Make missing groups anew; what cannot be healed is said now and then, and read around."""
        healed = False
        for index, error in trouble:
            key, message = self._all[index - 1], error.decode(errors="replace")
            reaction = reaction_to(message)
            if index > len(self._keys) and reaction is Reaction.HEAL:
                keys, _, _ = self.spots[index - len(self._keys) - 1]
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
            else:  # not this key's trouble: what a script passed on is the whole server's answer
                with self._link.watched():
                    raise ResponseError(message)
        return healed

    async def sweep(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """Orphans, of the queues whose sweep is due."""
        claims: list[Claim] = []
        now = monotonic()
        if not running and self.draining:  # idle at last
            self._sweep_at = [
                at if since is None else 0.0 for at, since in zip(self._sweep_at, self._draining_since, strict=True)
            ]
        if min(self._sweep_at) > now:
            return claims
        allowances = self._allowances(limit, running)
        for index, keys in enumerate(self._keys):
            if self._sweep_at[index] > now or len(claims) >= limit:
                continue
            allowed = min(limit - len(claims), allowances[index])
            if allowed <= 0 and index not in self._paused:
                self._draining_since[index] = None
                continue
            if index in self._paused:
                self._draining_since[index] = None
                self._sweep_at[index] = now + min(1.0, self._lease / 6)
                continue
            claims += await self._sweep_queue(index, keys, allowed, [*running, *claims])
        return claims

    async def _sweep_queue(self, index: int, keys: QueueKeys, limit: int, running: list[Claim]) -> list[Claim]:
        held = [
            f"{LEVELS.index(claim.level) + 2}:{claim.entry.decode()}" for claim in running if claim.queue == keys.queue
        ]
        args: list[Any] = [self._group, self.consumer, int(self._lease * 1000), limit]
        expected, sent = self._link.clock_should_show(), monotonic()
        wish = self._about_suspects(index, running)
        args += [self._alone_from, wish, expected, self._group_room(running), *held]
        try:
            wait, entries, missing, passed, shown, granted, longest = await self._link.read(
                scripts.SWEEP, [keys.meta, *keys.streams], args
            )
        except (Unreachable, ConfigurationError):
            raise
        except StreamworkerError as problem:
            self._complain(keys.meta, str(problem))
            self._sweep_at[index] = monotonic() + 1.0
            self._draining_since[index] = None
            return []
        self._sweep_at[index] = monotonic() + wait / 1000
        self._longest[index] = longest / 1000
        self.missing += missing
        if passed < 0 and wait > JUST_LOOKED * 1000:
            passed = 0  # whoever looked last had none to leave
        if wish == RESERVE and entries and not entries[0][5]:
            wish = LEAVE  # not idle any more
        self._left_to_others(index, passed, wish, granted=bool(granted))
        if self._link.clock_shows(shown, sent, expected, self._lease):
            self.rest(self._lease)  # the other queues, too: nobody could renew in the time that was left out
        claims, secret = [], self.secrets.get(keys.queue, b"")
        for stream, entry, count, fields, epoch, suspect in entries:
            level = LEVELS[stream - 2]
            place, body = keys.stream(level), document(fields)
            claims.append(Claim(keys.queue, level, place, entry, count, body, epoch, bool(suspect), secret=secret))
        return claims

    async def wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:  # noqa: ARG002 - one entry
        """Block until a new entry comes, at most until the next sweep is due."""
        wait = max(0.01, min(wait, BLOCK, self._next_sweep(running) - monotonic()))
        spots = self._open(running)
        if not spots:
            await self._idle(wait)
            return []
        command = ("XREADGROUP", "GROUP", self._group, self.consumer, "BLOCK", int(wait * 1000), "COUNT", 1, "STREAMS")
        try:
            with self._link.watched():
                reply = await self._link.reader.execute_command(*command, *spots, *(">" for _ in spots))
        except StreamworkerError as error:
            if (
                error.__cause__ is not None
                and (row := row_of(error.__cause__))
                and row.name in ("NOGROUP", "UNBLOCKED")
            ):
                return []  # the next claim heals it, or learns that the server is another one now
            raise
        claims: list[Claim] = []
        for name, entries in reply or ():
            place = name.decode()
            keys, level = spots[place]
            epoch, self._seen[place] = self.epochs.get(place, UNKNOWN_EPOCH), entries[-1][0]
            secret = self.secrets.get(keys.queue, b"")
            claims += [
                Claim(keys.queue, level, place, entry, 1, document(fields), epoch, secret=secret)
                for entry, fields in entries
            ]
        return claims


def document(fields: list[bytes] | None) -> bytes | None:
    """The bytes of an entry's field ``job``; ``None`` if it has none."""
    if not fields:
        return None
    if fields[0] == b"job":
        return fields[1]
    for index in range(2, len(fields), 2):
        if fields[index] == b"job":
            return fields[index + 1]
    return None
