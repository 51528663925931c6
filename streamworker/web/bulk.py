"""Changing many jobs at a rate, in the background of the dashboard: it goes on while people look at other pages."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final, Literal, TypeAlias

from streamworker.broker import Operator, StoredJob
from streamworker.errors import StreamworkerError, UsageError
from streamworker.operators import waiting_jobs
from streamworker.telemetry.logs import get_logger
from streamworker.views.listing import (
    DEAD,
    DELAYED,
    PENDING,
    PendingAction,
    Selection,
    StoredAction,
    Throttle,
    outcome_of,
    pending_action,
    stored_action,
)

log = get_logger("streamworker.web")

KEPT: Final = 20
"""Campaigns that are remembered, those that ended included."""
STIR_EVERY: Final = 0.5

What: TypeAlias = Literal[StoredAction, PendingAction, "change"]
TITLES: Final[dict[What, str]] = {
    "replay": "Replay dead letters",
    "erase": "Delete dead letters",
    "hasten": "Run delayed jobs now",
    "forget": "Delete delayed jobs",
    "release": "Release pending jobs",
    "bury": "Move pending jobs to dead",
    "drop": "Delete pending jobs",
    "change": "Change delayed jobs",
}


class BulkJob:
    """One change to many jobs.

    Args:
        what: is done to each.
        selection: which jobs.
        rate: so many a second at most; ``None`` for as fast as it goes.
        who: began it.
        expected: how many there are, as far as is known.
        change: changes one, where ``what`` is that.
    """

    def __init__(
        self,
        what: What,
        selection: Selection,
        rate: float | None,
        who: str,
        expected: int,
        *,
        change: Callable[[StoredJob], Awaitable[bool]] | None = None,
    ) -> None:
        self.id = secrets.token_hex(6)
        self.what: What = what
        self.selection = selection
        self.rate = rate
        self.who = who
        self.expected = expected
        self.change: Final = change
        self.tally = Counter(done=0, gone=0, refused=0)
        self.state: Literal["running", "done", "stopped", "failed"] = "running"
        self.trouble = ""
        self.began = time.time()
        self.task: asyncio.Task[None] | None = None

    def told(self) -> dict[str, Any]:
        """For those who watch."""
        where = f" of {self.selection.queue}" if self.selection.queue else ""
        return {
            "id": self.id,
            "title": f"{TITLES[self.what]}{where}",
            "state": self.state,
            **self.tally,
            "expected": self.expected,
            "rate": self.rate,
            "who": self.who,
            "trouble": self.trouble,
        }


class BulkJobs:
    """All of them.

    Args:
        stir: called when there is news.
    """

    def __init__(self, stir: Callable[[], None]) -> None:
        self._stir = stir
        self._all: dict[str, BulkJob] = {}

    def begin(self, operator: Operator, bulk_job: BulkJob) -> BulkJob:
        """Start it.

        Raises:
            UsageError: too many are running.
        """
        running = [each for each in self._all.values() if each.state == "running"]
        if len(running) >= KEPT:
            raise UsageError("too many of these are running: stop one first")
        for old in [each for each in self._all.values() if each.state != "running"][: len(self._all) - KEPT + 1]:
            del self._all[old.id]
        self._all[bulk_job.id] = bulk_job
        bulk_job.task = asyncio.create_task(self._run(operator, bulk_job))
        return bulk_job

    def stop(self, name: str) -> bool:
        """End it where it is; False if it does not run. What is in flight is finished first."""
        bulk_job = self._all.get(name)
        if bulk_job is None or bulk_job.state != "running":
            return False
        bulk_job.state = "stopped"
        self._stir()
        return True

    def told(self) -> list[dict[str, Any]]:
        """For those who watch; what ended a while ago is left out."""
        return [each.told() for each in self._all.values()]

    def dismiss(self, name: str) -> bool:
        """Forget one that ended."""
        bulk_job = self._all.get(name)
        if bulk_job is None or bulk_job.state == "running":
            return False
        del self._all[name]
        return True

    async def aclose(self) -> None:
        """Stop all, and wait for what is in flight."""
        tasks = []
        for bulk_job in self._all.values():
            if bulk_job.task is not None and not bulk_job.task.done():
                bulk_job.state = "stopped"
                tasks.append(bulk_job.task)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=5)
            for task in late:
                task.cancel()

    async def _run(self, operator: Operator, bulk_job: BulkJob) -> None:
        throttle, told = Throttle(bulk_job.rate), time.monotonic()
        try:
            async for do in _steps(operator, bulk_job):
                await throttle.turn()
                if bulk_job.state != "running":
                    break
                result, reason = await outcome_of(do())
                bulk_job.tally[result] += 1
                bulk_job.trouble = reason or bulk_job.trouble
                if time.monotonic() - told > STIR_EVERY:
                    told = time.monotonic()
                    self._stir()
            if bulk_job.state == "running":
                bulk_job.state = "done"
        except StreamworkerError as error:
            bulk_job.state, bulk_job.trouble = "failed", str(error)
        log.info(
            "dashboard_campaign_ended", what=bulk_job.what, who=bulk_job.who, state=bulk_job.state,
            queue=bulk_job.selection.queue, **bulk_job.tally,
        )  # fmt: skip
        self._stir()


async def _steps(operator: Operator, bulk_job: BulkJob) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """The change to each job that fits, in the order of the pages."""
    selection, what = bulk_job.selection, bulk_job.what
    match what:
        case "release" | "bury" | "drop":
            act = pending_action(operator, what, f"buried by {bulk_job.who}")
            async for entry in PENDING.chosen(operator, selection):
                if not entry.alive:  # what a living worker runs is changed one by one, knowingly
                    yield partial(act, entry)
        case "change":
            if bulk_job.change is not None:
                for job in [job async for job in waiting_jobs(operator, selection)]:  # they move while they change
                    yield partial(bulk_job.change, job)
        case _:
            change, dead = stored_action(operator, what), what in ("replay", "erase")
            async for job in DEAD.chosen(operator, selection) if dead else _delayed(operator, selection):
                yield partial(change, job)


async def _delayed(operator: Operator, selection: Selection) -> AsyncIterator[StoredJob]:
    """Each delayed job once, although those before it leave: pages are counted by places, which then move up."""
    seen: set[str] = set()
    while True:
        fresh = []
        async for job in DELAYED.chosen(operator, selection):
            if job.handle not in seen:
                fresh.append(job)
            if len(fresh) == 500:
                break
        for job in fresh:
            seen.add(job.handle)
            yield job
        if len(fresh) < 500:
            return
