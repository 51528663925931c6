"""``streamworker dead``: jobs that failed for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

from cyclopts import App, Parameter
from cyclopts.validators import Number

from streamworker.broker import StoredJob
from streamworker.cli.options import ACTION, LISTING, SERVER, ActionFlags, Listing, QueueName, ServerFlags
from streamworker.cli.output import Column
from streamworker.cli.resource import Choice, Conditions, Resource
from streamworker.views.listing import DEAD
from streamworker.views.rows import DeadRow, age, dead_row

dead = App(name="dead", help="Jobs that failed for good, and why.")

_COLUMNS: Final[list[Column[DeadRow]]] = [
    Column("queue", lambda row: row.queue, short=12),
    Column("level", lambda row: row.level, wide=True),
    Column("entry", lambda row: row.entry_id),
    Column("job", lambda row: row.job_id or "?", wide=True),
    Column("kind", lambda row: row.kind or "?", short=14),
    Column("ago", lambda row: age(row.age_s), right=True),
    Column("reason", lambda row: row.reason, wide=True),
    Column("error", lambda row: row.error or row.reason, rest=True),
]


def _more(job: StoredJob, private: bool) -> dict[str, Any]:
    # Fields of an entry that had no document are the producer's, and as private as a payload.
    foreign = {name: value for name, value in job.details.items() if name.startswith("field:")}
    return {"pending_entry": job.details.get("entry", "")} | (foreign if private else {})


_DEAD: Final = Resource("dead letter", DEAD, dead_row, _COLUMNS, _more)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DeadConditions(Conditions):
    """Which dead letters.

    Attributes:
        kind: Of this kind.
        reason: With this text in their reason.
        text: With this text, in upper or lower case, in id, kind, reason or error.
    """

    kind: str | None = None
    reason: str | None = None
    text: Annotated[str | None, Parameter(name="--search")] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DeadChoice(DeadConditions, Choice):
    """Which dead letters are changed."""


CONDITIONS = DeadConditions()
WHICH = DeadChoice()

dead.command(_DEAD.show, name="show", help="Show everything about some dead letters.")


@dead.default
@dead.command(name="list")
def list_(
    queue: QueueName = None,
    *,
    conditions: DeadConditions = CONDITIONS,
    payload: bool = False,
    listing: Listing = LISTING,
    server: ServerFlags = SERVER,
) -> int:
    """List dead letters, newest first.

    Args:
        queue: Only of this queue.
        payload: Print the documents too.
    """
    return _DEAD.list(conditions.selection(queue), listing, server, payload=payload)


@dead.command
def retry(
    *ids: str,
    which: DeadChoice = WHICH,
    rate: Annotated[float | None, Parameter(validator=Number(gt=0, lte=1_000_000))] = None,
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Put dead letters back on their queue, with all their attempts before them.

    Args:
        ids: Entry ids or job ids.
        rate: So many a second at most; as fast as it goes unless given.
    """
    selection = which.chosen(ids, "retry")
    return _DEAD.change(("retry", "retried"), selection, acting, server, lambda it: it.replay, rate=rate)


@dead.command
def drop(*ids: str, which: DeadChoice = WHICH, acting: ActionFlags = ACTION, server: ServerFlags = SERVER) -> int:
    """Delete dead letters for good.

    Args:
        ids: Entry ids or job ids.
    """
    return _DEAD.change(("drop", "dropped"), which.chosen(ids, "drop"), acting, server, lambda it: it.erase)
