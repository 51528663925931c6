"""The show on the screen: a live picture on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from time import monotonic
from typing import Any, Final

import anyio
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from streamworker.demo import script
from streamworker.demo.audit import AuditFinding, AuditReport, Killed
from streamworker.demo.script import Scenario
from streamworker.demo.stage import Member, Seen, Stage

_LIVE_INTERVAL: Final = 0.25
_PLAIN_INTERVAL: Final = 1.0


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
