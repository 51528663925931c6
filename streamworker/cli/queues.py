"""``streamworker queues``: how full they are; pausing, resuming and emptying them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from difflib import get_close_matches
from typing import Annotated, Any, Final

from cyclopts import App, Parameter

from streamworker.broker import Operator, Place
from streamworker.cli import streams
from streamworker.cli.options import (
    LISTING,
    SERVER,
    Listing,
    OneQueue,
    QueueName,
    ServerFlags,
    fleet,
    operate,
    operator_name,
)
from streamworker.cli.output import Column, plain, show
from streamworker.cli.resource import agreed
from streamworker.cli.streams import Report, say
from streamworker.errors import UsageError
from streamworker.views.listing import Pace, overview
from streamworker.views.rows import QueueRow, age, moment

queues = App(
    name="queues", help="How much is ready, running, delayed and dead in each queue; pause, resume and purge them."
)

_Rated = tuple[QueueRow, float | None]

_COLUMNS: Final[list[Column[_Rated]]] = [
    Column("queue", lambda it: it[0].queue, short=20),
    Column("ready", lambda it: f"{it[0].ready:,}", right=True),
    Column("running", lambda it: f"{it[0].running:,}", right=True),
    Column("delayed", lambda it: f"{it[0].delayed:,}", right=True),
    Column("dead", lambda it: f"{it[0].dead:,}", right=True),
    Column("oldest", lambda it: age(it[0].oldest_age_s), right=True),
]
_RATE: Final[Column[_Rated]] = Column("jobs/s", lambda it: "" if it[1] is None else f"{it[1]:,.1f}", right=True)
_STATE: Final[Column[_Rated]] = Column("", lambda it: state(it[0]))


def _pinned(it: _Rated) -> dict[str, Any]:
    """Programs rely on exactly these fields."""
    return {name: value for name, value in plain(it[0]).items() if name not in ("inactive", "halted")}


@queues.default
@queues.command(name="list")
def list_(queue: QueueName = None, *, listing: Listing = LISTING, server: ServerFlags = SERVER) -> int:
    """List queues; --watch adds how many jobs leave them per second. Exits with 1 if there is no such queue.

    Args:
        queue: Only this one.
    """
    pace = Pace()

    async def work(operator: Operator) -> int:
        async def rows() -> AsyncIterator[tuple[_Rated, None]]:
            names = [queue] if queue is not None else await operator.queues()
            for row in await overview(operator, names, pace if listing.watch else None):
                yield row, None

        columns = [*_COLUMNS, _RATE, _STATE] if listing.watch else [*_COLUMNS, _STATE]
        above = fleet(operator, listing, queue)
        if queue is not None and not listing.watch and (why := await missing(operator, queue)) is not None:
            say(why)
            return 1
        return await show(listing, rows, columns, title="queues", json=_pinned, fleet=above)

    return operate(server, work, endless=listing.watch)


async def missing(operator: Operator, queue: str) -> str | None:
    """That there is no such queue, in a sentence; ``None`` if there is. A row of zeros would say that all is well."""
    (depth,) = await operator.depth([queue])
    if depth.ready or depth.running or depth.delayed or depth.dead or depth.paused:
        return None  # the walk over all keys is spared
    there = await operator.queues()
    if queue in there:
        return None
    near = get_close_matches(queue, there, 1)
    more = f"did you mean {near[0]}?" if near else "its first job makes it; streamworker queues shows those there are"
    return f"there is no queue {queue}: {more}"


@queues.command
def pause(*names: OneQueue, all: bool = False, server: ServerFlags = SERVER) -> int:  # noqa: A002 - the flag's name
    """Stop all claims from some queues, within a second; running jobs go on.

    Args:
        names: The queues.
        all: All there are.
    """

    def do(operator: Operator) -> Callable[[str], Awaitable[bool]]:
        async def pause(name: str) -> bool:
            return await operator.pause(name, f"by {operator_name()} at {moment(await operator.now() * 1000)}")

        return pause

    return _switch(names, all, server, ("paused", "had been paused already"), do)


@queues.command
def resume(*names: OneQueue, all: bool = False, server: ServerFlags = SERVER) -> int:  # noqa: A002 - the flag's name
    """Undo a pause.

    Args:
        names: The queues.
        all: All there are.
    """
    return _switch(names, all, server, ("resumed", "was not paused"), lambda operator: operator.resume)


def _switch(
    names: tuple[str, ...],
    everything: bool,
    server: ServerFlags,
    words: tuple[str, str],
    do: Callable[[Operator], Callable[[str], Awaitable[bool]]],
) -> int:
    if bool(names) == everything:
        raise UsageError("say which queues: their names, or --all")

    async def work(operator: Operator) -> int:
        there = await operator.queues()
        report = Report()
        for name in names or there:
            changed = await do(operator)(name)
            report.write(f"{name} {words[0] if changed else words[1]}\n")
            if name not in there:
                say(f"there is no queue {name} yet: it is {words[0]} for when it comes")
        report.end()
        for depth in await operator.depth(names or there):
            if depth.inactive:
                say(f"{depth.queue} is inactive in PostgreSQL as well (streamworker.job_queues.is_active)")
        return 0

    return operate(server, work)


@queues.command
def purge(
    queue: OneQueue,
    *,
    ready: bool = False,
    delayed: bool = False,
    dead: bool = False,
    yes: Annotated[bool, Parameter(alias="-y")] = False,
    dry_run: bool = False,
    server: ServerFlags = SERVER,
) -> int:
    """Delete jobs of a queue for good. Running jobs go on; the deduplication keys of deleted jobs are free.

    Args:
        queue: Which.
        ready: Those that wait to be claimed.
        delayed: Those that wait for their time, retries among them.
        dead: The dead letters.
        yes: Do not ask.
        dry_run: Only show what would be deleted.
    """
    chosen: dict[Place, bool] = {"ready": ready, "delayed": delayed, "dead": dead}
    places = [place for place, wanted in chosen.items() if wanted]
    if not places:
        raise UsageError("say what to purge: --ready, --delayed, --dead, or several of them")

    async def work(operator: Operator) -> int:
        (depth,) = await operator.depth([queue])
        counts = {place: int(getattr(depth, place)) for place in places}
        what = " and ".join(f"{count:,} {place}" for place, count in counts.items())
        if dry_run:
            streams.write(f"would be deleted: {what} of {queue}\n")
            return 0
        if not any(counts.values()):
            say(f"{queue} has nothing {' or '.join(places)}")
            return 0
        if not yes and not agreed(f"delete {what} of {queue} for good?"):
            say("nothing was changed")
            return 1
        report = Report()
        for place, count in counts.items():
            # No more than was shown: what came since was not asked about.
            report.write(f"deleted {await operator.purge(queue, place, count):,} {place} of {queue}\n")
        report.end()
        return 0

    return operate(server, work)


def state(row: QueueRow) -> str:
    """Why nothing is claimed from a queue, and how many of its jobs wait behind others; empty if neither is so."""
    why = "inactive" if row.inactive else "paused" if row.paused else ""
    behind = f"{row.waiting:,} behind order keys" if row.waiting else ""
    halted = (
        f"{row.halted:,} order {'key halts' if row.halted == 1 else 'keys halt'} at dead jobs" if row.halted else ""
    )
    return ", ".join(filter(None, (why, behind, halted)))
