"""What is to be seen while the demo runs: one task looks at all servers, everyone else waits for what it saw.

It looks as people do who run `streamworker queues` and `workers`; the audit at the end does not rely on it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic, time
from typing import Final

import anyio
import anyio.abc
import msgspec

from streamworker.broker import Operator
from streamworker.demo.audit import Killed
from streamworker.demo.script import QUEUE, Scenario
from streamworker.demo.smtp import Mailbox, start
from streamworker.errors import StreamworkerError
from streamworker.views import QueueRow, WorkerRow, overview, worker_row

INTERVAL: Final = 0.02
"""Seconds between looks."""
HEARTBEAT_INTERVAL: Final = 0.25
STALL: Final = 30.0
"""Seconds without any progress after which the demo gives up and counts what is there."""


class Seen(msgspec.Struct):
    """The latest look.

    Attributes:
        queue: its depth.
        mails: messages at the SMTP server.
        workers: by pid; those of the dead stay as they were last.
        beating: pids with a heartbeat right now.
        killed: the killed worker, as soon as there is one.
        looks: how often was looked.
    """

    queue: QueueRow = QueueRow(QUEUE, 0, 0, 0, 0, None, paused=False)
    mails: int = 0
    workers: dict[int, WorkerRow] = {}
    beating: frozenset[int] = frozenset()
    killed: Killed | None = None
    looks: int = 0

    @property
    def unfinished(self) -> int:
        """Jobs that still have to run."""
        return self.queue.ready + self.queue.running + self.queue.delayed


class Stage:
    """The running demo, as the view and the story see it.

    Args:
        play: what is played.
        mailbox: the SMTP server.
        members: the workers.
        operator: reads from Redis.
    """

    def __init__(self, play: Scenario, mailbox: Mailbox, members: list[Member], operator: Operator) -> None:
        self.play = play
        self.members = members
        self.seen = Seen()
        self.started = monotonic()
        self._mailbox = mailbox
        self.operator = operator
        self._news = anyio.Event()
        self._heartbeats_at = 0.0

    async def look(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            seen = self.seen
            [(seen.queue, _)] = await overview(self.operator, [QUEUE])
            seen.mails = await self._mailbox.total()
            if monotonic() >= self._heartbeats_at:
                self._heartbeats_at = monotonic() + HEARTBEAT_INTERVAL
                rows = [worker_row(info, time()) for info in await self.operator.workers([QUEUE])]
                beating = {row.pid: row for row in rows if row.alive and row.pid is not None}
                seen.workers |= beating
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
            now = (self.seen.queue, self.seen.mails, self.seen.beating)
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


STOP_WITHIN: Final = 20.0
"""Seconds workers may take to drain after SIGTERM; they have nothing to do by then."""


class Member:
    """One worker process."""

    def __init__(self, name: str, process: anyio.abc.Process, log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self.killed = False
        self._process = process
        self._log = log

    @property
    def exit_code(self) -> int | None:
        """``None`` while it runs; negative: the number of the signal that ended it."""
        return self._process.returncode

    @property
    def alive(self) -> bool:
        """It runs and was not killed."""
        return not self.killed and self.exit_code is None

    @property
    def last_words(self) -> str:
        """The last line of its log, for error messages."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.exit_code is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL: no chance to finish or to hand anything back; returns when it is dead."""
        self.killed = True
        self.signal(signal.SIGKILL)
        await self._process.wait()

    async def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        return await self._process.wait()


async def launch(stack: AsyncExitStack, count: int, logs: Path, env: Mapping[str, str]) -> list[Member]:
    """Start worker processes; killed when ``stack`` is left.

    Args:
        stack: ends them.
        count: how many.
        logs: directory for their logs.
        env: their settings.
    """
    members = []
    for number in range(1, count + 1):
        name, log = f"worker-{number}", logs / f"worker-{number}.log"
        process = await start(
            stack, "streamworker.demo.mailer", log=log, env={**env, "STREAMWORKER_WORKER_ID": f"demo-{number}"}
        )
        members.append(Member(name, process, log))
    return members


async def stop(members: list[Member]) -> None:
    """SIGTERM for all; returns when they are gone, or after `STOP_WITHIN` seconds."""
    for member in members:
        member.signal(signal.SIGTERM)
    with anyio.move_on_after(STOP_WITHIN):
        for member in members:
            await member.wait()
