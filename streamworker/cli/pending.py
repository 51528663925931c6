"""``streamworker pending``: jobs that workers hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from cyclopts import App, Parameter

from streamworker.broker import Operator, PendingEntry
from streamworker.cli.options import ACTION, LISTING, SERVER, ActionFlags, Listing, QueueName, Seconds, ServerFlags
from streamworker.cli.output import Column
from streamworker.cli.resource import Choice, Conditions, Resource
from streamworker.views.listing import PENDING
from streamworker.views.rows import age

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

_PENDING: Final = Resource("pending job", PENDING, lambda entry, _: entry, _COLUMNS)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PendingConditions(Conditions):
    """Which pending jobs.

    Attributes:
        worker: Held by this worker (its full id).
        min_idle: Not renewed for this many seconds.
        kind: Of this kind.
    """

    worker: str | None = None
    min_idle: Seconds = 0.0
    kind: str | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PendingChoice(PendingConditions, Choice):
    """Which pending jobs are changed.

    Attributes:
        force: Those of living workers too; what they are doing is not undone, and its end will be ignored.
    """

    force: bool = False


CONDITIONS = PendingConditions()
WHICH = PendingChoice()

pending.command(_PENDING.show, name="show", help="Show everything about some pending jobs.")


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
    """List pending jobs: their worker, the time since the last renewal, how often they were delivered.

    Args:
        queue: Only of this queue.
        payload: Print the documents too.
    """
    return _PENDING.list(conditions.selection(queue), listing, server, payload=payload)


@pending.command
def release(*ids: str, which: PendingChoice = WHICH, acting: ActionFlags = ACTION, server: ServerFlags = SERVER) -> int:
    """Give pending jobs back to their queue at once; no attempt is charged.

    Args:
        ids: Entry ids or job ids.
    """
    return _change(("release", "released"), ids, which, acting, server, lambda operator: operator.release)


@pending.command
def bury(
    *ids: str,
    reason: str = "buried by hand",
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

    return _change(("bury", "buried"), ids, which, acting, server, burying)


@pending.command
def drop(*ids: str, which: PendingChoice = WHICH, acting: ActionFlags = ACTION, server: ServerFlags = SERVER) -> int:
    """Delete pending jobs for good.

    Args:
        ids: Entry ids or job ids.
    """
    return _change(("drop", "dropped"), ids, which, acting, server, lambda operator: operator.drop)


def _change(
    words: tuple[str, str],
    ids: tuple[str, ...],
    which: PendingChoice,
    acting: ActionFlags,
    server: ServerFlags,
    do: Callable[[Operator], Callable[[PendingEntry], Awaitable[bool]]],
) -> int:
    def barred(entry: PendingEntry) -> str | None:
        if entry.alive and not which.force:
            return f"the worker {entry.worker_id} is alive and may be running it; --force changes it all the same"
        return None

    return _PENDING.change(words, which.chosen(ids, words[0]), acting, server, do, barred=barred)
