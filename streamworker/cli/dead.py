"""``streamworker dead``: jobs that failed for good."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Final

from cyclopts import App, Parameter
from cyclopts.validators import Number

from streamworker.broker import StoredJob
from streamworker.cli.options import ACTION, LISTING, SERVER, ActionFlags, Listing, NamedIds, QueueName, ServerFlags
from streamworker.cli.output import Column
from streamworker.cli.resource import Resource, narrowed
from streamworker.views import DeadRow, Selection, age, chosen_dead, dead_row

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


_DEAD: Final = Resource("dead", "dead letter", chosen_dead, lambda job: dead_row(job, time.time()), _COLUMNS, _more)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DeadConditions:
    """Which dead letters.

    Attributes:
        kind: Of this kind.
        reason: With this text in their reason.
        search: With this text, in upper or lower case, in id, kind, reason or error.
    """

    kind: str | None = None
    reason: str | None = None
    search: str | None = None


CONDITIONS = DeadConditions()


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
    return _DEAD.list(_selection((), queue, conditions), listing, server, payload=payload)


@dead.command(name="show")
def show_(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    payload: bool = False,
    json: bool = False,
    server: ServerFlags = SERVER,
) -> int:
    """Show everything about some dead letters.

    Args:
        ids: Entry ids or job ids.
        queue: In this queue.
        payload: Print the documents too.
        json: One JSON object per line, for programs.
    """
    return _DEAD.show((*ids, *named), queue, server, payload=payload, json=json)


@dead.command
def retry(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    conditions: DeadConditions = CONDITIONS,
    all: bool = False,  # noqa: A002 - the flag's name
    rate: Annotated[float | None, Parameter(validator=Number(gt=0, lte=1_000_000))] = None,
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Put dead letters back on their queue, with all their attempts before them.

    Args:
        ids: Entry ids or job ids.
        queue: In this queue.
        all: All of them.
        rate: So many a second at most; as fast as it goes unless given.
    """
    selection = narrowed(_selection(ids + named, queue, conditions), all, "retry")
    return _DEAD.change(("retry", "retried"), selection, acting, server, lambda it: it.replay, rate=rate)


@dead.command
def drop(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    conditions: DeadConditions = CONDITIONS,
    all: bool = False,  # noqa: A002 - the flag's name
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Delete dead letters for good.

    Args:
        ids: Entry ids or job ids.
        queue: In this queue.
        all: All of them.
    """
    selection = narrowed(_selection(ids + named, queue, conditions), all, "drop")
    return _DEAD.change(("drop", "dropped"), selection, acting, server, lambda it: it.erase)


def _selection(ids: tuple[str, ...], queue: str | None, conditions: DeadConditions) -> Selection:
    return Selection(
        queue=queue, ids=frozenset(ids), kind=conditions.kind, reason=conditions.reason, text=conditions.search
    )
