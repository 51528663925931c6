"""``streamworker workers``: who works."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from cyclopts import App

from streamworker.broker import Operator, WorkerInfo
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
from streamworker.cli.resource import BulkAction, act
from streamworker.cli.streams import say
from streamworker.errors import UsageError
from streamworker.views.rows import WorkerRow, age, size, worker_row

workers = App(name="workers", help="Workers, and how busy they are.")


def _text(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


_COLUMNS: Final[list[Column[WorkerRow]]] = [
    Column("worker", lambda row: row.worker_id, short=24),
    Column("queues", lambda row: ",".join(row.queues), short=14),
    Column("running", lambda row: _text(row.running), right=True),
    Column("pending", lambda row: _text(row.pending), right=True),
    Column("done", lambda row: _text(row.done), right=True),
    Column("failed", lambda row: _text(row.failed), right=True),
    Column("up", lambda row: age(row.uptime_s), right=True),
    Column("memory", lambda row: size(row.rss_bytes), right=True, wide=True),
    Column("lag", lambda row: age(row.loop_lag_s), right=True, wide=True),
    Column("longest run", lambda row: "" if row.longest is None else row.longest.text, wide=True),
    Column("", lambda row: "" if row.alive else "lost"),
]


@workers.default
@workers.command(name="list")
def list_(queue: QueueName = None, *, listing: Listing = LISTING, server: ServerFlags = SERVER) -> int:
    """List workers, the living first.

    Args:
        queue: Only those of this queue.
    """

    async def work(operator: Operator) -> int:
        async def rows() -> AsyncIterator[tuple[WorkerRow, None]]:
            queues, now = [queue] if queue is not None else await operator.queues(), await operator.now()
            if (refusal := await operator.refusal(queues)) is not None and not listing.watch:
                say(f"{refusal}; nor can workers say that they live")
            for info in await operator.workers(queues):
                yield worker_row(info, now), None

        above = fleet(operator, listing, queue)
        return await show(listing, rows, _COLUMNS, title="workers", fleet=above)

    return operate(server, work, endless=listing.watch)


@workers.command
def prune(*ids: str, all: bool = False, acting: ActionFlags = ACTION, server: ServerFlags = SERVER) -> int:  # noqa: A002
    """Delete the names of dead workers that hold nothing. Jobs of dead workers go to others by themselves.

    Args:
        ids: Ids of workers.
        all: All dead workers.
    """
    if bool(ids) == all:
        raise UsageError("say whose names to prune: ids of workers, or --all for all dead ones")

    async def work(operator: Operator) -> int:
        queues = await operator.queues()

        async def items() -> AsyncIterator[WorkerInfo]:
            for info in await operator.workers(queues):
                if info.worker_id in ids or (all and not info.alive):
                    yield info

        async def do(info: WorkerInfo) -> bool:
            return await operator.prune(queues, info.worker_id)

        action = BulkAction("prune", "pruned", "dead worker", do, _names, _barred)
        return await act(acting, items(), action, ids)

    return operate(server, work)


def _barred(info: WorkerInfo) -> str | None:
    if info.alive:
        return "it is alive: stop it instead"
    if info.pending:
        return (
            f"it still holds {info.pending} jobs: they go to others after the lease; release, bury or drop them first"
        )
    return None


def _names(info: WorkerInfo) -> dict[str, Any]:
    return {"worker_id": info.worker_id}
