"""What is to be seen while the demo runs: one task looks at all servers, everyone else waits for what it saw."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final

import anyio
import msgspec

from streamworker.demo.audit import Killed
from streamworker.demo.fleet import Member
from streamworker.demo.lookout import Counts, Heartbeat, Lookout
from streamworker.demo.script import Script
from streamworker.demo.smtp import Mailbox
from streamworker.errors import StreamworkerError

INTERVAL: Final = 0.02
"""Seconds between looks."""
HEARTBEAT_INTERVAL: Final = 0.25
STALL: Final = 30.0
"""Seconds without any progress after which the demo gives up and counts what is there."""


class Seen(msgspec.Struct):
    """The latest look.

    Attributes:
        counts: of the queue.
        mails: messages at the SMTP server.
        heartbeats: last words of workers by pid; those of the dead stay.
        beating: pids with a heartbeat right now.
        killed: the killed worker, as soon as there is one.
        looks: how often was looked.
    """

    counts: Counts = Counts()
    mails: int = 0
    heartbeats: dict[int, Heartbeat] = {}
    beating: frozenset[int] = frozenset()
    killed: Killed | None = None
    looks: int = 0


class Stage:
    """The running demo, as the view and the story see it.

    Args:
        play: what is played.
        mailbox: the SMTP server.
        members: the workers.
        lookout: reads from Redis; used by the looking task alone.
    """

    def __init__(self, play: Script, mailbox: Mailbox, members: list[Member], lookout: Lookout) -> None:
        self.play = play
        self.members = members
        self.seen = Seen()
        self.started = monotonic()
        self._mailbox = mailbox
        self._lookout = lookout
        self._news = anyio.Event()
        self._heartbeats_at = 0.0

    async def look(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            seen = self.seen
            seen.counts = await self._lookout.counts()
            seen.mails = await self._mailbox.total()
            if monotonic() >= self._heartbeats_at:
                self._heartbeats_at = monotonic() + HEARTBEAT_INTERVAL
                beating = {heartbeat.pid: heartbeat for heartbeat in await self._lookout.heartbeats()}
                seen.heartbeats.update(beating)
                seen.beating = frozenset(beating)
            seen.looks += 1
            self._news.set()
            self._news = anyio.Event()
            await anyio.sleep(INTERVAL)

    async def until(self, condition: Callable[[Seen], bool], *, fresh: bool = False) -> bool:
        """Wait until something is seen.

        Args:
            condition: asked after every look.
            fresh: do not believe a look from before this call.

        Returns:
            False if nothing moved for `STALL` seconds, or no worker is left that could move anything.
        """
        before = self.seen.looks + 1 if fresh else 0
        progress, moved = None, monotonic()
        while True:
            if self.seen.looks >= before and condition(self.seen):
                return True
            if not any(member.alive for member in self.members):
                return False
            now = (self.seen.counts, self.seen.mails, self.seen.beating)
            if now != progress:
                progress, moved = now, monotonic()
            elif monotonic() - moved > STALL:
                return False
            await self._news.wait()

    async def all_working(self) -> None:
        """Wait until every worker's heart beats.

        Raises:
            StreamworkerError: one of them ended, or does not start.
        """
        pids = {member.pid for member in self.members}
        moved = await self.until(lambda seen: seen.beating >= pids or not all(m.alive for m in self.members))
        for member in self.members:
            if not member.alive or not (moved or member.pid in self.seen.beating):
                raise StreamworkerError(f"{member.name} did not start: {member.last_words}")
