"""``streamworker delayed``: jobs that wait for their time, retries among them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final

import msgspec
from cyclopts import App as Commands
from cyclopts import Parameter

from streamworker.broker import Operator, StoredJob
from streamworker.cli.options import (
    ACTION,
    LISTING,
    SERVER,
    ActionFlags,
    Listing,
    QueueName,
    Seconds,
    ServerFlags,
)  # fmt: skip
from streamworker.cli.output import Column
from streamworker.cli.resource import Choice, Resource
from streamworker.errors import UsageError
from streamworker.job import Level
from streamworker.views.listing import DELAYED, READY, Selection
from streamworker.views.rows import DelayedRow, age, delayed_row

delayed = Commands(name="delayed", help="Jobs that wait for their time, retries among them.")

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
_READY: Final = Resource("ready job", READY, delayed_row, _COLUMNS)


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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ChangeFlags:
    """What is to be different.

    Attributes:
        in_: Seconds from now until they are due; 0 makes them ready.
        level: high, normal or low.
        to_queue: Another queue.
        payload: The whole payload, a JSON object; checked against the type of the kind's handler.
        set: Fields of the payload that change, a JSON object: '{"currency": "EUR"}'.
        ready: Also jobs that are ready and not claimed; of those only.
        app: module:attribute of the app whose types check payloads; STREAMWORKER_APP unless given.
    """

    in_: Annotated[Seconds | None, Parameter(name="--in")] = None
    level: Level | None = None
    to_queue: QueueName = None
    payload: str | None = None
    set: str | None = None
    ready: bool = False
    app: str | None = None

    def change(self) -> Any:
        """The same as a `JobChange`, checked.

        Raises:
            UsageError: it makes no sense.
        """
        from streamworker.operators import JobChange  # noqa: PLC0415 - it imports redis

        whole, some = _object(self.payload), _object(self.set)
        change = JobChange(delay=self.in_, level=self.level, queue=self.to_queue, payload=whole, fields=some)
        change.check()
        return change


CHANGE = ChangeFlags()


def _object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        return msgspec.json.decode(text.encode(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise UsageError(f"a payload must be a JSON object: {error}") from None


@delayed.command
def change(
    *ids: str,
    which: DelayedChoice = WHICH,
    flags: ChangeFlags = CHANGE,
    acting: ActionFlags = ACTION,
    server: ServerFlags = SERVER,
) -> int:
    """Change the time, level, queue or payload of jobs that wait. One that starts meanwhile stays as it is.

    Args:
        ids: Job ids, or entry ids as --json shows them.
    """
    words, selection, wanted = ("change", "changed"), which.chosen(ids, "change"), flags.change()
    from streamworker.app import App  # noqa: PLC0415 - listings import no worker
    from streamworker.cli.app_loader import load_app, with_own  # noqa: PLC0415
    from streamworker.operators import waiting_jobs  # noqa: PLC0415

    settings = server.settings(app=flags.app)
    app: App[Any] = App(settings=settings)
    if settings.app is not None:
        server.export()
        app = load_app(settings)
        settings = with_own(settings, app)

    def do(operator: Operator) -> Callable[[StoredJob], Awaitable[bool]]:
        changer = app.changer(operator, settings)

        async def one(job: StoredJob) -> bool:
            return await changer.change(job, wanted)

        return one

    resource = _READY if flags.ready else _DELAYED
    chosen = partial(waiting_jobs, listing=resource.jobs)
    return resource.change(words, selection, acting, server, do, bodies=True, chosen=chosen)
