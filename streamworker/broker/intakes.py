"""How a worker comes to jobs in a cluster: one intake per slot, all of them on the same free slots.

What is ready is taken in the order of the queues, as on one server. While nothing is, every slot has a blocking read of
its own; the first that brings something ends the others by CLIENT UNBLOCK, never by cancelling. What they bring along
is kept and waits its turn under lease, like the surplus of a single server's blocking read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final

import anyio

from streamworker.broker.intake import Intake
from streamworker.broker.keys import QueueKeys
from streamworker.broker.link import Link
from streamworker.broker.slots import slot_of
from streamworker.broker.taking import DEAF_WAIT, DRAIN_LOOK, UNBLOCK_EVERY, none_ended
from streamworker.errors import StreamworkerError, Unreachable
from streamworker.job import LEVELS, Claim, Level
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

AWAY_PAUSE: Final = 1.0
"""Seconds between looks at a node that does not answer."""
LAST_CALL: Final = 1.0
"""Seconds a read may take to end after it was unblocked; then nobody waits for its node any more."""


class Intakes:
    """One `Intake` per slot, with the face of one. See there."""

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
        self._link = link
        self._lease = lease
        by_slot: dict[int, list[tuple[QueueKeys, int | None]]] = {}
        for keys, cap in queues:
            by_slot.setdefault(slot_of(keys.base), []).append((keys, cap))
        self._links = [link.branch(each[0][0].base) for each in by_slot.values()]
        self._parts = [
            Intake(branch, each, group=group, lease=lease, weighted=weighted, alone_from=alone_from)
            for branch, each in zip(self._links, by_slot.values(), strict=True)
        ]
        self.epochs: dict[str, bytes] = {}
        self.secrets: dict[str, bytes] = {}
        for part in self._parts:
            part.epochs, part.secrets = self.epochs, self.secrets
        parts = dict(zip(by_slot, self._parts, strict=True))
        self._homes = {keys.queue: parts[slot_of(keys.base)] for keys, _ in queues}
        self.spots: Final[list[tuple[QueueKeys, Level, str]]] = [spot for part in self._parts for spot in part.spots]
        self._reads: dict[Intake, asyncio.Task[list[Claim]]] = {}
        self._away: dict[Intake, Unreachable] = {}
        """Parts whose node does not answer, and how it does not."""
        self._interrupted = False
        self.deaf = False
        """The bell is not heard: see `listen`."""
        self.reply_lost = False
        """See `Taking.reply_lost`."""

    @property
    def consumer(self) -> str:
        """Whose claims these are."""
        return self._parts[0].consumer if self._parts else ""

    @consumer.setter
    def consumer(self, name: str) -> None:
        for part in self._parts:
            part.consumer = name

    @property
    def slots(self) -> int:
        """Jobs that run at once."""
        return self._parts[0].slots if self._parts else 1

    @slots.setter
    def slots(self, count: int) -> None:
        for part in self._parts:
            part.slots = count

    @property
    def marked(self) -> frozenset[str]:
        """See `Taking.marked`."""
        return frozenset().union(*(part.marked for part in self._parts))

    @property
    def draining(self) -> bool:
        """See `Taking.draining`."""
        return any(part.draining for part in self._parts)

    @property
    def missing(self) -> int:
        """Entries that were deleted underneath their claim, since the start."""
        return sum(part.missing for part in self._parts)

    async def claim(
        self,
        limit: int,
        wait: float,
        running: Collection[Claim],
        ended: Callable[[str], int] = none_ended,
        shut: Collection[str] = (),
    ) -> list[Claim]:
        """See `Broker.claim`."""
        for part in self._parts:
            part.ended, part.shut = ended, shut
        self._rest_after_outage()
        claims = self._brought()
        idle = [part for part in self._parts if part not in self._reads]
        for part in idle:  # orphans of all queues first: new jobs of the first shall not starve them
            if len(claims) < limit:
                claims += await self._looked(part, part.sweep(limit - len(claims), [*running, *claims]))
        draining = self.draining
        suspect = any(claim.suspect for claim in claims)  # it waits for everything else to end
        for part in idle:
            part.stale = False  # whatever rings from here on, this look may not have seen
            if len(claims) < limit and not suspect and not draining and part not in self._away:
                new = part.take(limit - len(claims), [*running, *claims] if claims else running)
                claims += await self._looked(part, new)
        if self._away:
            self._look_after_the_away(running)
        self._rest_after_outage()
        if not claims and wait > 0 and draining:
            await anyio.sleep(min(wait, DRAIN_LOOK))
        elif not claims and wait > 0 and not self._interrupted:
            claims = await self._wait(limit, min(wait, DEAF_WAIT) if self.deaf else wait, running)
            if not claims and self._away:
                self._look_after_the_away(running)
        return claims

    async def _looked(self, part: Intake, look: Awaitable[list[Claim]]) -> list[Claim]:
        """What a look brought; a node that does not answer is looked at by itself from then on."""
        try:
            return await look
        except Unreachable as error:
            self._away[part] = error
            log.error("node_away", queues=[keys.queue for keys, _, _ in part.spots[:: len(LEVELS)]], error=str(error))
            return []

    def _look_after_the_away(self, running: Collection[Claim]) -> None:
        """Look at parts whose nodes do not answer, beside the others, so that these wait for none of them.

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

    async def _look_later(self, part: Intake, running: Collection[Claim]) -> list[Claim]:
        await anyio.sleep(AWAY_PAUSE)
        claims = await part.claim(1, 0, running, part.ended, part.shut)
        if self._away.pop(part, None) is not None:
            self.reply_lost = True
            log.info("node_back", queues=[keys.queue for keys, _, _ in part.spots[:: len(LEVELS)]])
        return claims

    async def look_again(self) -> None:
        """See `Taking.look_again`."""
        for part in self._parts:
            part.stir()
        for part in self._parts:
            if part not in self._away:
                await part.look_again()

    async def ensure(self, keys: QueueKeys) -> tuple[list[str], list[str]]:
        """See `Intake.ensure`."""
        return await self._homes[keys.queue].ensure(keys)

    def rest(self, seconds: float) -> None:
        """Take nobody for dead for some seconds."""
        for part in self._parts:
            part.rest(seconds)

    def _rest_after_outage(self) -> None:
        # Of one node: whether claims elsewhere were renewed meanwhile is not worth telling apart.
        if self._link.longest_outage() > self._lease / 3:
            self.rest(self._lease)

    def interrupt(self) -> None:
        """No claim waits any more."""
        self._interrupted = True
        for part in self._parts:
            part.interrupt()

    async def close(self) -> None:
        """End what still reads; call it when nothing is claimed any more."""
        reads, self._reads = list(self._reads.values()), {}
        for read in reads:
            read.cancel()
        if reads:
            await asyncio.wait(reads)

    def _brought(self) -> list[Claim]:
        """What ended reads brought; the first that failed raises, and the reconciliation finds what the others had."""
        claims: list[Claim] = []
        for part, read in list(self._reads.items()):
            if read.done():
                del self._reads[part]
                error = None if read.cancelled() else read.exception()
                if isinstance(error, Unreachable):
                    if part not in self._away:
                        log.error("node_away", queues=[keys.queue for keys, _, _ in part.spots[::3]], error=str(error))
                    self._away[part] = error
                else:
                    claims += [] if read.cancelled() else read.result()
        return claims

    async def _wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        # asyncio's own tasks: a read whose node hangs outlives this call, which no task group allows.
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
        except asyncio.CancelledError:
            for read in self._reads.values():
                read.cancel()
            raise
        return self._brought()

    def _late(self) -> dict[asyncio.Task[list[Claim]], Link]:
        """Reads that go on, and their connections."""
        return {
            self._reads[part]: branch
            for part, branch in zip(self._parts, self._links, strict=True)
            if part in self._reads and part not in self._away and not self._reads[part].done()
        }
