"""``streamworker dead``: jobs that failed for good."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from cyclopts import App, Parameter
from cyclopts.validators import Number

from streamworker.broker import Operator, StoredJob
from streamworker.cli import streams
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
    operator_name,
)  # fmt: skip
from streamworker.cli.output import Column, plain, show
from streamworker.cli.resource import Choice, Conditions, Resource
from streamworker.errors import UsageError
from streamworker.redact import printable
from streamworker.views.groups import DeadGroup, DeadGroups
from streamworker.views.listing import DEAD
from streamworker.views.rows import DeadRow, age, dead_row, moment

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
        group: Of this group, as `dead groups` names it.
        text: With this text, in upper or lower case, in id, kind, reason or error.
    """

    kind: str | None = None
    reason: str | None = None
    group: str | None = None
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
    """Put dead letters back on their queue, with all their attempts.

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


_GROUPS: Final[list[Column[DeadGroup]]] = [
    Column("group", lambda row: row.group),
    Column("queue", lambda row: row.queue, short=12),
    Column("kind", lambda row: row.kind or "?", short=20),
    Column("count", lambda row: f"{row.count:,}", right=True),
    Column("first", lambda row: moment(row.first_s * 1000), wide=True),
    Column("last", lambda row: moment(row.last_s * 1000)),
    Column("muted", lambda row: row.muted and "muted"),
    Column("sample", lambda row: row.sample, wide=True),
    Column("error", lambda row: row.error, rest=True),
]


@dead.command
def groups(queue: QueueName = None, *, listing: Listing = LISTING, server: ServerFlags = SERVER) -> int:
    """List the errors of dead letters: those of a kind that failed alike are one group. The last to fail is first.

    Errors are alike if type and message are, but for ids, numbers, addresses and quoted text. `dead retry --group ID`
    and `dead drop --group ID` act on all of a group.

    Args:
        queue: Only of this queue.
    """

    async def work(operator: Operator) -> int:
        index = DeadGroups(operator)

        async def rows() -> AsyncIterator[tuple[DeadGroup, None]]:
            names = [queue] if queue is not None else await operator.queues()
            for depth in await operator.depth(names):
                await index.update(depth.queue, depth.dead)
            for group in index.of():
                yield group, None

        return await show(
            listing, rows, _GROUPS, title="groups of dead letters", json=_group, fleet=fleet(operator, listing, queue)
        )

    return operate(server, work, endless=listing.watch)


def _group(row: DeadGroup) -> dict[str, Any]:
    facts = plain(row)
    first, last = (moment(facts.pop(name) * 1000) for name in ("first_s", "last_s"))
    return {**facts, "first_seen": first, "last_seen": last}


@dead.command
def mute(group: str, /, *, server: ServerFlags = SERVER) -> int:
    """Mute a group of dead letters: it needs no attention. Its letters stay.

    Args:
        group: As `dead groups` names it.
    """
    return _mute(group, server, lambda at: f"by {operator_name()} at {moment(at * 1000)}")


@dead.command
def unmute(group: str, /, *, server: ServerFlags = SERVER) -> int:
    """Undo a mute.

    Args:
        group: As `dead groups` names it.
    """
    return _mute(group, server, lambda _: "")


def _mute(group: str, server: ServerFlags, note: Callable[[float], str]) -> int:
    async def work(operator: Operator) -> int:
        index = DeadGroups(operator)
        for depth in await operator.depth(await operator.queues()):
            await index.update(depth.queue, depth.dead)
        found = next((each for each in index.of() if each.group == group), None)
        if found is None:
            raise UsageError(f"there is no group {printable(group)}: `streamworker dead groups` lists them")
        word = note(await operator.now())
        changed = await operator.mute(found.queue, group, word)
        said = "muted" if word else "not muted any more"
        streams.write(f"{group} is {said if changed else f'{said} (as before)'}\n")
        return 0

    return operate(server, work)
