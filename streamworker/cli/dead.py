"""``streamworker dead``: jobs that failed for good."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Final

from cyclopts import App, Parameter
from cyclopts.validators import Number

from streamworker.broker import Operator, StoredJob
from streamworker.cli.bulk import BulkAction, act, narrowed, stored_names, without_bodies
from streamworker.cli.options import (
    ACTION,
    LISTING,
    SERVER,
    ActionFlags,
    Listing,
    QueueName,
    ServerFlags,
    fleet,
    operate,
)
from streamworker.cli.output import Column, detail, print_lines, show
from streamworker.cli.streams import say
from streamworker.errors import UsageError
from streamworker.views import DeadRow, Selection, age, chosen_dead, dead_row, printable

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

NamedIds = Annotated[tuple[str, ...], Parameter(name="--id", help="The same, once per id.")]


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
    selection = _selection((), queue, conditions)

    async def work(operator: Operator) -> int:
        async def rows() -> AsyncIterator[tuple[DeadRow, bytes | None]]:
            async for job in chosen_dead(operator, selection):
                yield dead_row(job, time.time()), job.body

        above = fleet(operator, listing, queue)
        return await show(listing, rows, _COLUMNS, title="dead letters", payload=payload, fleet=above)

    return operate(server, work, endless=listing.watch)


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
    wanted = (*ids, *named)
    if not wanted:
        raise UsageError("say which: streamworker dead show ID")
    selection = Selection(queue=queue, ids=frozenset(wanted))

    async def work(operator: Operator) -> int:
        found: set[str | None] = set()
        async for job in chosen_dead(operator, selection):
            if found and not json:
                print_lines([("--", "")])
            found |= {job.handle, job.job_id}
            # Fields of an entry that had no document are the producer's, and as private as a payload.
            foreign = {name: value for name, value in job.details.items() if name.startswith("field:")}
            more = {"pending_entry": job.details.get("entry", "")} | (foreign if payload else {})
            detail(dead_row(job, time.time()), job.body, payload=payload, json=json, more=more)
        missing = [name for name in wanted if name not in found]
        for name in missing:
            say(f"there is no dead letter {printable(name)}")
        return int(bool(missing))

    return operate(server, work)


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
    return _change(("retry", "retried"), selection, acting, server, lambda it: it.replay, rate)


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
    selection = _selection(ids + named, queue, conditions)
    return _change(("drop", "dropped"), narrowed(selection, all, "drop"), acting, server, lambda it: it.erase)


def _selection(ids: tuple[str, ...], queue: str | None, conditions: DeadConditions) -> Selection:
    return Selection(
        queue=queue, ids=frozenset(ids), kind=conditions.kind, reason=conditions.reason, text=conditions.search
    )


def _change(
    words: tuple[str, str],
    selection: Selection,
    acting: ActionFlags,
    server: ServerFlags,
    do: Callable[[Operator], Callable[[StoredJob], Awaitable[bool]]],
    rate: float | None = None,
) -> int:
    async def work(operator: Operator) -> int:
        deed = BulkAction(*words, "dead letter", do(operator), stored_names)
        return await act(acting, without_bodies(chosen_dead(operator, selection)), deed, selection.ids, rate=rate)

    return operate(server, work)
