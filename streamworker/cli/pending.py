"""``streamworker pending``: jobs that workers hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Final

from cyclopts import App, Parameter

from streamworker.broker import Operator, PendingEntry
from streamworker.cli.options import (
    ACTION,
    LISTING,
    SERVER,
    ActionFlags,
    Listing,
    NamedIds,
    QueueName,
    Seconds,
    ServerFlags,
)
from streamworker.cli.output import Column
from streamworker.cli.resource import Resource, narrowed
from streamworker.views import Selection, age, chosen_pending

pending = App(name="pending", help="Jobs that were delivered to a worker and are not settled.")

_COLUMNS: Final[list[Column[PendingEntry]]] = [
    Column("queue", lambda row: row.queue, short=12),
    Column("level", lambda row: row.level),
    Column("entry", lambda row: row.entry_id),
    Column("job", lambda row: row.job_id or "?", wide=True),
    Column("kind", lambda row: row.kind or "?", short=13),
    Column("worker", lambda row: row.worker_id, short=14),
    Column("idle", lambda row: age(row.idle_ms / 1000), right=True),
    Column("n", lambda row: str(row.deliveries), right=True),
    Column("", lambda row: "lost" if not row.alive else "" if row.progress is None else row.progress.text, rest=True),
]

Ids = Annotated[tuple[str, ...], Parameter(help="Entry ids or job ids.")]


_PENDING: Final = Resource("pending", "pending job", chosen_pending, lambda entry: entry, _COLUMNS)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PendingConditions:
    """Which pending jobs.

    Attributes:
        worker: Held by this worker (its full id).
        min_idle: Not renewed for this many seconds.
        kind: Of this kind.
    """

    worker: str | None = None
    min_idle: Seconds = 0.0
    kind: str | None = None

    def selection(self, queue: str | None, ids: tuple[str, ...] = ()) -> Selection:
        """As the views know it."""
        return Selection(queue=queue, ids=frozenset(ids), worker=self.worker, min_idle=self.min_idle, kind=self.kind)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PendingChoice(PendingConditions):
    """Which pending jobs are changed.

    Attributes:
        queue: In this queue.
        all: All of them.
        force: Those of living workers too; what they are doing is not undone, and its end will be ignored.
    """

    queue: QueueName = None
    all: bool = False
    force: bool = False


CONDITIONS = PendingConditions()
WHICH = PendingChoice()


@pending.default
@pending.command(name="list")
def list_(
    queue: QueueName = None,
    *,
    conditions: PendingConditions = CONDITIONS,
    payload: bool = False,
    listing: Listing = LISTING,
    server: ServerFlags = SERVER,
) -> int:
    """List pending jobs: who holds them, since when they gave no sign, how often they were delivered.

    Args:
        queue: Only of this queue.
        payload: Print the documents too.
    """
    return _PENDING.list(conditions.selection(queue), listing, server, payload=payload)


@pending.command(name="show")
def show_(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    payload: bool = False,
    json: bool = False,
    server: ServerFlags = SERVER,
) -> int:
    """Show everything about some pending jobs.

    Args:
        ids: Entry ids or job ids.
        queue: In this queue.
        payload: Print the documents too.
        json: One JSON object per line, for programs.
    """
    return _PENDING.show((*ids, *named), queue, server, payload=payload, json=json)


@pending.command
def release(
    *ids: str,
    named: NamedIds = (),
    which: PendingChoice = WHICH,
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Give pending jobs back to their queue at once; no attempt is charged.

    Args:
        ids: Entry ids or job ids.
    """
    return _change(("release", "released"), (*ids, *named), which, acting, server, lambda operator: operator.release)


@pending.command
def bury(
    *ids: str,
    reason: str = "buried by hand",
    named: NamedIds = (),
    which: PendingChoice = WHICH,
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Move pending jobs to the dead letters.

    Args:
        ids: Entry ids or job ids.
        reason: What will be read there.
    """

    def burying(operator: Operator) -> Callable[[PendingEntry], Awaitable[bool]]:
        return lambda entry: operator.bury(entry, reason)

    return _change(("bury", "buried"), (*ids, *named), which, acting, server, burying)


@pending.command
def drop(
    *ids: str,
    named: NamedIds = (),
    which: PendingChoice = WHICH,
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Delete pending jobs for good.

    Args:
        ids: Entry ids or job ids.
    """
    return _change(("drop", "dropped"), (*ids, *named), which, acting, server, lambda operator: operator.drop)


def _change(
    words: tuple[str, str],
    ids: tuple[str, ...],
    which: PendingChoice,
    acting: ActionFlags,
    server: ServerFlags,
    do: Callable[[Operator], Callable[[PendingEntry], Awaitable[bool]]],
) -> int:
    selection = narrowed(which.selection(which.queue, ids), which.all, words[0])

    def barred(entry: PendingEntry) -> str | None:
        if entry.alive and not which.force:
            return f"the worker {entry.worker_id} is alive and may be running it; --force changes it all the same"
        return None

    return _PENDING.change(words, selection, acting, server, do, barred=barred)
