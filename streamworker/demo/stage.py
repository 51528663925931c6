"""The demo while it runs: its worker processes, what is seen of them and of the servers, and how that is shown.

One task looks at all servers, everyone else waits for what it saw. It looks as people do who run `streamworker queues`
and `workers`; the audit at the end does not rely on it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic, time
from typing import Any, Final

import anyio
import anyio.abc
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from streamworker.broker import Operator
from streamworker.demo import script
from streamworker.demo.audit import AuditFinding, AuditReport, Killed
from streamworker.demo.script import QUEUE, Scenario
from streamworker.demo.smtp import Mailbox, start
from streamworker.errors import StreamworkerError
from streamworker.views.listing import overview
from streamworker.views.rows import QueueRow, WorkerRow, worker_row

INTERVAL: Final = 0.02
"""Seconds between looks."""
HEARTBEAT_INTERVAL: Final = 0.25
STALL: Final = 30.0
"""Seconds without any progress after which the demo gives up and counts what is there."""
STOP_WITHIN: Final = 20.0
"""Seconds workers may take to drain after SIGTERM; they have nothing to do by then."""
_LIVE_INTERVAL: Final = 0.25
_PLAIN_INTERVAL: Final = 1.0


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


class Durations(msgspec.Struct, frozen=True):
    """Seconds: of the whole demo, and from the first enqueue to the last settled job."""

    total: float
    working: float


class View:
    """Tells the story.

    Args:
        as_json: the story goes to standard error, and one JSON object to standard output.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(stderr=as_json, highlight=False, markup=False, emoji=False)
        self._live = self._console.is_terminal and not as_json

    def say(self, line: str = "", style: str = "") -> None:
        """One line of the story."""
        # Without a terminal one line stays one line, for grep.
        self._console.print(line, style=style, soft_wrap=not self._console.is_terminal)

    async def follow(self, stage: Stage) -> None:
        """Show what happens on the stage, until cancelled."""
        if not self._live:
            while True:
                await anyio.sleep(_PLAIN_INTERVAL)
                self.say(progress(stage.play, stage.seen, monotonic() - stage.started))
        with Live(console=self._console, auto_refresh=False) as live:
            try:
                while True:
                    live.update(picture(stage), refresh=True)
                    await anyio.sleep(_LIVE_INTERVAL)
            finally:
                live.update(picture(stage), refresh=True)

    def report(self, play: Scenario, report: AuditReport, killed: Killed | None, timing: Durations) -> None:
        """What the audit found, and what to try next."""
        self.say()
        self.say("The audit, counted at the servers and not by the workers:", "bold")
        for finding in report.findings:
            self._check(finding)
        self.say()
        if report.ok:
            rate = play.jobs / timing.working if timing.working else 0.0
            self.say(f"Nothing is lost: {play.jobs:,} of {play.jobs:,} jobs are accounted for.", "bold green")
            self.say(f"{timing.working:.1f} s of work, {rate:,.0f} jobs/s, {timing.total:.1f} s in all.")
        else:
            self.say("Not every job is accounted for: " + "; ".join(report.missing) + ".", "bold red")
        self.say()
        self.say("What to try next:")
        self.say("  streamworker demo --jobs 50000 --workers 4    the same, with more of it")
        self.say("  streamworker dev myproject.jobs:app           your handlers on servers like these")
        self.say("  streamworker worker myproject.jobs:app        your handlers on your REDIS_URL")
        if self._as_json:
            sys.stdout.write(msgspec.json.encode(as_object(play, report, killed, timing)).decode() + "\n")
            sys.stdout.flush()

    def _check(self, finding: AuditFinding) -> None:
        mark, style = ("  ok      ", "green") if finding.ok else ("  MISSING ", "bold red")
        if not self._console.is_terminal:
            self.say(mark + finding.says)
            return
        line = Table.grid()
        line.add_row(Text(mark, style), finding.says)
        self._console.print(line)


def as_object(play: Scenario, report: AuditReport, killed: Killed | None, timing: Durations) -> dict[str, Any]:
    """The JSON object of ``--json``."""
    fallen = killed and {
        "worker_id": killed.worker_id,
        "pid": killed.pid,
        "held": len(killed.held),
        "recovery_s": None if killed.recovery is None else round(killed.recovery, 3),
        "promised_s": script.LEASE + script.SLACK,
    }
    return {
        "ok": report.ok,
        "jobs": play.jobs,
        "workers": play.workers,
        "seconds": round(timing.total, 3),
        "working_s": round(timing.working, 3),
        "duplicates": report.duplicates,
        "killed": fallen,
        "findings": report.findings,
        "missing": report.missing,
    }


def progress(play: Scenario, seen: Seen, seconds: float) -> str:
    """One line about where things stand."""
    counts = seen.queue
    return (
        f"[{seconds:5.1f} s] {seen.mails:,} mails arrived for {play.mails:,} recipients; "
        f"{script.QUEUE}: {counts.ready:,} ready, {counts.running} running, "
        f"{counts.delayed} delayed, {counts.dead} dead"
    )


def picture(stage: Stage) -> RenderableType:
    """The live picture."""
    seen, play = stage.seen, stage.play
    queues = Table("queue", *(_right(name) for name in ("ready", "running", "delayed", "dead")), box=None)
    counts = seen.queue
    queues.add_row(script.QUEUE, *(f"{n:,}" for n in (counts.ready, counts.running, counts.delayed, counts.dead)))
    workers = Table("worker", _right("pid"), _right("done"), _right("running"), "state", box=None)
    for member in stage.members:
        beat = seen.workers.get(member.pid)
        state, style = _state(member, seen)
        done, running = (f"{beat.done or 0:,}", str(beat.running or 0)) if beat else ("-", "-")
        workers.add_row(member.name, str(member.pid), done, running, Text(state, style))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        "mails", ProgressBar(play.mails, seen.mails, width=40), f"{seen.mails:,} arrived for {play.mails:,} recipients"
    )
    return Group(Text(), queues, Text(), workers, Text(), bar, Text(_recovery(seen)))


def _right(name: str) -> Column:
    return Column(name, justify="right", min_width=8)


def _state(member: Member, seen: Seen) -> tuple[str, str]:
    if member.killed:
        return "killed -9", "bold red"
    if member.exit_code is not None:
        return f"ended (exit {member.exit_code})", "dim" if member.exit_code == 0 else "bold red"
    return ("working", "green") if member.pid in seen.beating else ("starting", "yellow")


def _recovery(seen: Seen) -> str:
    killed = seen.killed
    if killed is None:
        return ""
    if killed.recovery is None:
        return f"{killed.name} was killed and held {len(killed.held)} jobs: they wait until its lease has run out"
    return f"{killed.name} was killed: its {len(killed.held)} jobs ran elsewhere after {killed.recovery:.1f} s"
