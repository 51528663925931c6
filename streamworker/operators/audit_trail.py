"""Who did what to which jobs: operators whose changes are kept in the ledger."""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Protocol, TypeVar, cast

import anyio
import msgspec

from streamworker.broker import Operator, PendingEntry, ScheduleStore, StoredJob
from streamworker.errors import StreamworkerError
from streamworker.job import ScheduleEntry, ScheduleTick
from streamworker.postgres import Archive, AuditRow
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

T = TypeVar("T")

NEVER_SENT: Final = ("blocked", "queued", "waiting")
"""The statuses of jobs that are in the ledger alone."""


class OpensArchive(Protocol):
    """What opens the ledger when it is first asked for."""

    async def archive(self) -> Archive | None:
        """The ledger; ``None`` where there is none."""


class Actor(msgspec.Struct, frozen=True):
    """Who acts.

    Attributes:
        who: a name.
        source: ``cli``, ``dashboard`` or ``python``.
    """

    who: str
    source: str


ACTOR: Final[ContextVar[Actor | None]] = ContextVar("streamworker_actor", default=None)
"""Who acts in this task; ``None`` for the user of the process."""
AUDITED: Final = frozenset({
    "release", "bury", "drop", "run_now", "forget", "replay", "erase", "change", "cancel", "uncancel", "pause",
    "resume", "purge", "prune", "mute",
})  # fmt: skip
"""What an operator does that changes something."""
AUDIT_BATCH: Final = 100
AUDIT_EVERY: Final = 0.5
"""Seconds after which an action is in PostgreSQL, or so many actions."""


def actor() -> Actor:
    """Who acts in this task."""
    return ACTOR.get() or Actor(user_name(), "python")


def user_name() -> str:
    """The user of this process: user@host."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return f"uid {os.getuid()}@{socket.gethostname()}"


class Audit:
    """Keeps who did what in the ledger, in batches; without a ledger nothing.

    Args:
        ledger: opens it when the first action is kept.
    """

    def __init__(self, ledger: OpensArchive) -> None:
        self.ledger: Final = ledger
        self._rows: list[AuditRow] = []
        self._task: asyncio.Task[None] | None = None

    async def add(self, row: AuditRow) -> None:
        """Keep an action, within half a second."""
        self._rows.append(row)
        if len(self._rows) >= AUDIT_BATCH:
            await self.flush()
        elif self._task is None or self._task.done():
            self._task = asyncio.create_task(self._later())

    async def _later(self) -> None:
        await anyio.sleep(AUDIT_EVERY)
        await self.flush()

    async def flush(self) -> None:
        """Keep all now. What PostgreSQL refuses is logged: the actions were done."""
        rows, self._rows = self._rows, []
        if rows:
            await keep_actions(self.ledger.archive, rows)

    async def close(self) -> None:
        """Keep the rest."""
        if self._task is not None:
            self._task.cancel()
        await self.flush()


async def keep_actions(opening: Callable[[], Awaitable[Archive | None]], rows: Sequence[AuditRow]) -> None:
    """Keep actions. What PostgreSQL refuses is logged: the actions were done."""
    try:
        archive = await opening()
        kept = archive is None or await archive.keep_audit(rows)
        reason = "" if kept else "the schema is of an older release: run `streamworker migrate up`"
    except StreamworkerError as error:
        kept, reason = False, str(error)
    if not kept:
        log.warning("audit_not_kept", actions=len(rows), who=rows[0].who, first=rows[0].action, reason=reason)


class AuditedOperator:
    """An `Operator` each change of which is kept: who, what, to which job, and how it ended.

    Args:
        operator: does it.
        audit: keeps it.
    """

    def __init__(self, operator: Operator, audit: Audit) -> None:
        self._operator, self._audit = operator, audit

    def __getattr__(self, name: str) -> Any:
        """Everything else is the operator's."""
        found = getattr(self._operator, name)
        return partial(self._act, name, found) if name in AUDITED else found

    async def archive(self) -> Archive | None:
        """The ledger of this operator; ``None`` where there is none."""
        return await self._audit.ledger.archive()

    async def change_queued(self, job: StoredJob, change: Callable[..., Awaitable[bool]], **wanted: Any) -> bool:
        """Change a job that is in the ledger alone, and keep that.

        Args:
            job: which.
            change: does it, of the job and what is wanted.
            wanted: what is to be different.
        """
        return bool(await self._act("change", change, job, **wanted))

    @property
    def schedules(self) -> Any:
        """The operator's, changes of which are kept, too; in the ledger, where there is one."""
        from streamworker.cron.stored import DurableSchedules  # noqa: PLC0415 - it imports handlers; listings need none

        return AuditedSchedules(DurableSchedules(self._operator.schedules, self._audit.ledger.archive), self._audit)

    async def _act(self, name: str, do: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        result = "failed"
        try:
            answer = await do(*args, **options)
            result = "gone" if answer is False else "done"
            return answer
        except StreamworkerError as error:
            result = f"refused: {error}"
            raise
        finally:
            await self._audit.add(_audit_row(name, args, options, result))


def _audit_row(name: str, args: Sequence[Any], options: Mapping[str, Any], result: str) -> AuditRow:
    by, job = actor(), args[0] if args else None
    details = [str(each) for each in args[1:] if isinstance(each, str | int)]
    details += [f"{key}={value}" for key, value in options.items() if value is not None]
    if isinstance(job, PendingEntry | StoredJob):
        queue, job_id, kind = job.queue, job.job_id or job_handle(job), job.kind
    elif name in ("cancel", "uncancel"):
        queue, job_id, kind, details = str(job), str(args[1]), None, []
    elif name == "prune":
        queue, job_id, kind = None, None, None
    else:
        queue, job_id, kind = str(job), None, None
    return AuditRow(by.who, by.source, name, queue, job_id, kind, ", ".join(details) or None, result)


def job_handle(job: PendingEntry | StoredJob) -> str:
    """The entry id of a job."""
    return job.handle if isinstance(job, StoredJob) else job.entry_id


class AuditedArchive:
    """An `Archive` each change of which is kept that does not reach Redis: there `AuditedOperator` keeps it.

    Args:
        archive: does it.
        audit: keeps it.
    """

    def __init__(self, archive: Archive, audit: Audit) -> None:
        self._archive, self._audit = archive, audit

    def __getattr__(self, name: str) -> Any:
        """Everything else is the archive's."""
        return getattr(self._archive, name)

    async def cancel(self, queue: str, job_id: str) -> bool:
        """Cancel a job; one that is in the ledger alone is kept here."""
        record = await self._archive.find(job_id, queue)
        doing = self._archive.cancel(queue, job_id)
        if record is None or record.status not in NEVER_SENT:
            return await doing
        return await self._act("cancel", queue, job_id, record.kind, doing)

    async def retry(self, queue: str, job_id: str) -> bool:
        """Queue a job anew."""
        return await self._act("retry", queue, job_id, None, self._archive.retry(queue, job_id))

    async def signal(self, job_id: str, name: str, data: str | None, queue: str | None) -> bool:
        """Send a signal; its data are not kept."""
        return await self._act("signal", queue, job_id, None, self._archive.signal(job_id, name, data, queue), name)

    async def erase(self, queue: str, ids: Sequence[str]) -> dict[str, int]:
        """Delete the rows of a person's jobs; how many jobs they were is kept, and not which ones."""
        return await self._act("erase", queue, None, None, self._archive.erase(queue, ids), f"{len(ids)} jobs")

    async def prune(self, queue: str | None = None, *, older: float | None = None) -> int:
        """Forget jobs before their time."""
        details = None if older is None else f"older={older:g}"
        return await self._act("prune jobs", queue, None, None, self._archive.prune(queue, older=older), details)

    async def _act(
        self, action: str, queue: str | None, job_id: str | None, kind: str | None, doing: Awaitable[T],
        details: str | None = None,
    ) -> T:  # fmt: skip
        result, by = "failed", actor()
        try:
            answer = await doing
            result = "done" if answer else "gone"
            if type(answer) is int and answer:
                details = ", ".join(filter(None, [details, f"{answer} jobs"]))
            return answer
        except StreamworkerError as error:
            result = f"refused: {error}"
            raise
        finally:
            await self._audit.add(AuditRow(by.who, by.source, action, queue, job_id, kind, details, result))


class _Opened:
    """A ledger that is open."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    async def archive(self) -> Archive:
        return self._archive


def audited(stack: AsyncExitStack, archive: Archive) -> Archive:
    """The archive, changes of which are kept.

    Args:
        stack: keeps the last of them when it is closed.
        archive: the ledger.
    """
    audit = Audit(_Opened(archive))
    stack.push_async_callback(audit.close)
    return cast("Archive", AuditedArchive(archive, audit))


class AuditedSchedules:
    """A `ScheduleStore` each change of which is kept.

    Args:
        store: does it.
        audit: keeps it.
    """

    def __init__(self, store: ScheduleStore, audit: Audit) -> None:
        self._store, self._audit = store, audit

    def __getattr__(self, name: str) -> Any:
        """Everything else is the store's."""
        return getattr(self._store, name)

    async def put(self, new: ScheduleEntry, before: bytes, *, keep: bool) -> bool:
        """Put, and keep who did it."""
        done = await self._store.put(new, before, keep=keep)
        action = "schedule" if new.definition else "unschedule"
        await self._audit.add(self._row(action, new, "done" if done else "gone"))
        return done

    async def tick(self, queue: str, ticks: Sequence[ScheduleTick]) -> list[bool]:
        """Run schedules now, and keep who did it."""
        added = await self._store.tick(queue, ticks)
        for tick, done in zip(ticks, added, strict=True):
            await self._audit.add(self._row("run schedule", tick.entry, "done" if done else "gone"))
        return added

    def _row(self, action: str, entry: ScheduleEntry, result: str) -> AuditRow:
        by = actor()
        return AuditRow(by.who, by.source, action, entry.queue, None, None, entry.name, result)
