"""How a worker comes to jobs in list mode: from the right ends of the lists, in order, into its own list."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from time import monotonic
from typing import Any, Final

from redis.exceptions import ResponseError

from streamworker.broker import scripts
from streamworker.broker.doorbell import Doorbells
from streamworker.broker.keys import ListKeys
from streamworker.broker.link import BLOCK, Link
from streamworker.broker.order import Order
from streamworker.broker.orphans import Orphans
from streamworker.broker.reactions import Reaction, reaction_to
from streamworker.broker.taking import LEAVE, RESERVE, Taking
from streamworker.errors import StreamworkerError
from streamworker.job import Claim

HEADS: Final = 3
"""Keys of a queue that come before the lists: its meta hash, its lease set, and what this worker holds of it."""
PASSED_PAUSE: Final = 0.5
"""Most seconds between looks at a list whose right end holds what only others may take."""


class ListIntake(Taking):
    """Claims elements of ``queues`` for one worker.

    Args:
        link: the connections.
        queues: (keys, cap) in the order they are taken.
        orphans: gives back what dead workers held.
        lease: seconds after which an unrenewed claim is an orphan.
        weighted: weighted order of levels.
    """

    def __init__(
        self,
        link: Link,
        queues: Sequence[tuple[ListKeys, int | None]],
        *,
        orphans: Orphans,
        lease: float,
        weighted: bool,
        alone_from: int,
    ) -> None:
        super().__init__(link, queues, lease=lease, alone_from=alone_from)
        self._lists: Final[list[ListKeys]] = [keys for keys, _ in queues]
        self._order = Order(len(queues), weighted=weighted, heads=HEADS)
        self._orphans = orphans
        self._bells = Doorbells(link, len(self.spots))
        self._for_others: frozenset[str] = frozenset()

    async def sweep(self, limit: int, running: Collection[Claim]) -> list[Claim]:  # noqa: ARG002 - they need no slot
        """Orphans go to the right ends of their lists, and are taken from there before all others."""
        await self._orphans.give_back(running)
        return []

    async def take(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """Elements, in order."""
        await self._seal_again()
        keys = [each.meta for each in self._lists] + [each.leases for each in self._lists]
        keys += [each.claimed(self.consumer) for each in self._lists] + [place for _, _, place in self.spots]
        budgets = self._order.budgets(limit)
        held = [claim.entry for claim in running]
        args: list[Any] = [self.consumer, limit, len(self._lists), len(budgets), secrets.token_hex(6)]
        wish = self._about_suspects(0, running)
        args += [self._alone_from, wish, self._group_room(running), len(held)]
        args += [*self._allowances(limit, running), *budgets, *held, *self._order.steps]
        answer = await self._link.read(scripts.LIST_TAKE, keys, args)
        taken, trouble, paused, _, passed, suspects, cancelled, granted, sealed = answer
        self.secrets.update(zip((each.queue for each in self._lists), sealed, strict=True))
        if wish == RESERVE and taken and not taken[0][1][0][2]:
            wish = LEAVE  # not idle any more
        self._left_to_others(0, suspects, wish, granted=bool(granted))  # of whatever queue: this looks at all of them
        self._paused = frozenset(index - 1 for index in paused)
        self.marked = frozenset(self._keys[index - 1].queue for index in cancelled)
        first = HEADS * len(self._lists) + 1
        self._for_others = frozenset(self.spots[index - first][2] for index in passed)
        claims: list[Claim] = []
        for index, rows in taken:
            home, level, place = self.spots[index - first]
            name, secret = home.queue, self.secrets[home.queue]
            claims += [
                Claim(name, level, place, entry, count, body, b"", bool(suspect), False, secret)
                for entry, count, suspect, body in rows
            ]
        for index, error in trouble:
            self._judge(keys[index - 1], index, error.decode(errors="replace"))
        return claims

    def _judge(self, key: str, index: int, message: str) -> None:
        """A key that cannot be used is said now and then, and read around; its queue waits for nothing meanwhile."""
        if reaction_to(message) not in (Reaction.KEY, Reaction.REFUSE, Reaction.FULL):
            with self._link.watched():  # not this key's trouble: what a script passed on is the whole server's answer
                raise ResponseError(message)
        self._complain(key, message)
        heads = HEADS * len(self._lists)
        if index <= heads:
            for place in self._lists[(index - 1) % len(self._lists)].lists:
                self._unreadable_until[place] = self._unreadable_until[key]

    async def wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """Wait for a bell, and take what it announced."""
        wait = max(0.01, min(wait, BLOCK, min(self._orphans.look_at) - monotonic()))
        spots = self._open(running)
        open_ = [place for place in spots if place not in self._for_others]
        if len(open_) < len(spots):
            wait = min(wait, PASSED_PAUSE)
        if not open_:
            await self._idle(wait)
            return []
        try:
            rung = await self._bells.ring(open_, wait)
        except StreamworkerError as error:
            cause = error.__cause__
            if cause is not None and reaction_to(cause) is Reaction.KEY:
                return []  # the next look at the lists finds out which
            raise
        return await self.take(limit, running) if rung and not self._interrupted.is_set() else []

    def rest(self, seconds: float) -> None:
        """See `Taking.rest`."""
        self._drain_no_more()
        self._orphans.rest(seconds)

    def _rest_after_outage(self) -> None:
        self._orphans.rest_after_outage()

    async def end_wait(self) -> None:
        """See `Taking.end_wait`: the lists are waited for on."""
        self._bells.recall()

    async def unblock(self) -> None:
        """End waits."""
        await self._bells.unblock()

    async def close(self) -> None:
        """See `Taking.close`."""
        await self._bells.close()
