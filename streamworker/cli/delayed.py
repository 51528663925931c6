"""``streamworker delayed``: jobs that wait for their time, retries among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cyclopts import App, Parameter

from streamworker.cli.options import ACTION, LISTING, SERVER, ActionFlags, Listing, QueueName, ServerFlags
from streamworker.cli.output import Column
from streamworker.cli.resource import Choice, Resource
from streamworker.views.listing import DELAYED, Selection
from streamworker.views.rows import DelayedRow, age, delayed_row

delayed = App(name="delayed", help="Jobs that wait for their time, retries among them.")

_COLUMNS: Final[list[Column[DelayedRow]]] = [
    Column("queue", lambda row: row.queue, short=14),
    Column("level", lambda row: row.level),
    Column("job", lambda row: row.job_id or row.entry_id),
    Column("kind", lambda row: row.kind or "?", short=14),
    Column("in", lambda row: age(row.due_in_s), right=True),
    Column("at", lambda row: row.due_at, wide=True),
    Column("entry", lambda row: row.entry_id, wide=True),
]

_DELAYED: Final = Resource("delayed job", DELAYED, delayed_row, _COLUMNS)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DelayedChoice(Choice):
    """Which delayed jobs are changed.

    Attributes:
        kind: Of this kind.
    """

    kind: str | None = None


WHICH = DelayedChoice()


@delayed.default
@delayed.command(name="list")
def list_(
    queue: QueueName = None,
    *,
    kind: str | None = None,
    payload: bool = False,
    listing: Listing = LISTING,
    server: ServerFlags = SERVER,
) -> int:
    """List delayed jobs, soonest first.

    Args:
        queue: Only of this queue.
        kind: Only of this kind.
        payload: Print the documents too.
    """
    return _DELAYED.list(Selection(queue=queue, kind=kind), listing, server, payload=payload)


@delayed.command
def run(*ids: str, which: DelayedChoice = WHICH, acting: ActionFlags = ACTION, server: ServerFlags = SERVER) -> int:
    """Make delayed jobs ready now.

    Args:
        ids: Job ids, or entry ids as --json shows them.
    """
    words, selection = ("make ready", "made ready"), which.chosen(ids, "run")
    return _DELAYED.change(words, selection, acting, server, lambda it: it.run_now)


@delayed.command
def drop(*ids: str, which: DelayedChoice = WHICH, acting: ActionFlags = ACTION, server: ServerFlags = SERVER) -> int:
    """Delete delayed jobs for good.

    Args:
        ids: Job ids, or entry ids as --json shows them.
    """
    return _DELAYED.change(("drop", "dropped"), which.chosen(ids, "drop"), acting, server, lambda it: it.forget)
