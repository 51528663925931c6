"""``streamworker delayed``: jobs that wait for their time, retries among them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Final

from cyclopts import App, Parameter

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
from streamworker.cli.output import Column, show
from streamworker.views import DelayedRow, Selection, age, chosen_delayed, delayed_row

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

NamedIds = Annotated[tuple[str, ...], Parameter(name="--id", help="The same, once per id.")]


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
    selection = Selection(queue=queue, kind=kind)

    async def work(operator: Operator) -> int:
        async def rows() -> AsyncIterator[tuple[DelayedRow, bytes | None]]:
            async for job in chosen_delayed(operator, selection):
                yield delayed_row(job, time.time()), job.body

        above = fleet(operator, listing, queue)
        return await show(listing, rows, _COLUMNS, title="delayed jobs", payload=payload, fleet=above)

    return operate(server, work, endless=listing.watch)


@delayed.command
def run(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    kind: str | None = None,
    all: bool = False,  # noqa: A002 - the flag's name
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Make delayed jobs ready now.

    Args:
        ids: Job ids, or entry ids as --json shows them.
        queue: In this queue.
        kind: Of this kind.
        all: All of them.
    """
    selection = narrowed(Selection(queue=queue, ids=frozenset((*ids, *named)), kind=kind), all, "run")
    return _change("make ready", "made ready", selection, acting, server, lambda operator: operator.run_now)


@delayed.command
def drop(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    kind: str | None = None,
    all: bool = False,  # noqa: A002 - the flag's name
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Delete delayed jobs for good.

    Args:
        ids: Job ids, or entry ids as --json shows them.
        queue: In this queue.
        kind: Of this kind.
        all: All of them.
    """
    selection = narrowed(Selection(queue=queue, ids=frozenset((*ids, *named)), kind=kind), all, "drop")
    return _change("drop", "dropped", selection, acting, server, lambda operator: operator.forget)


def _change(
    verb: str,
    past: str,
    selection: Selection,
    acting: ActionFlags,
    server: ServerFlags,
    do: Callable[[Operator], Callable[[StoredJob], Awaitable[bool]]],
) -> int:
    async def work(operator: Operator) -> int:
        deed = BulkAction(verb, past, "delayed job", do(operator), stored_names)
        return await act(acting, without_bodies(chosen_delayed(operator, selection)), deed, selection.ids)

    return operate(server, work)
