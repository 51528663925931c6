"""``streamworker cron``: what is enqueued by the calendar, in code and as data."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Final

from cyclopts import App as Commands
from cyclopts import Parameter

from streamworker import codec
from streamworker.app import App
from streamworker.cli.app_loader import load_app, with_own
from streamworker.cli.enqueue import checked_payload, level_named
from streamworker.cli.options import LISTING, WORKER, Listing, QueueName, WorkerFlags, operator_name, run
from streamworker.cli.output import Column, show
from streamworker.cli.streams import Report, say
from streamworker.cron import Missed
from streamworker.cron.stored import ScheduleRow, Schedules, schedule_rows
from streamworker.errors import UsageError
from streamworker.job import Job
from streamworker.operators import open_operator

cron = Commands(name="cron", help="Schedules, and when they tick next.")

Payload = Annotated[str, Parameter(allow_leading_hyphen=True)]

_COLUMNS: Final[list[Column[ScheduleRow]]] = [
    Column("name", lambda row: row.name, short=24),
    Column("owner", lambda row: row.owner),
    Column("queue", lambda row: row.queue, short=14),
    Column("kind", lambda row: row.kind, wide=True),
    Column("when", lambda row: f"{row.expression} {row.tz}"),
    Column("missed", lambda row: row.missed, wide=True),
    Column("state", lambda row: row.state),
    Column("last", lambda row: row.last or "never"),
    Column("next", lambda row: row.next[0] if row.next else ""),
    Column("then", lambda row: ", ".join(row.next[1:]), rest=True),
]


def _act(flags: WorkerFlags, work: Callable[[App[Any], Schedules, Report], Awaitable[None]]) -> int:
    """Change schedules, with the app if one is named: it knows kinds, and the types of their payloads."""
    settings = flags.settings()
    app: App[Any] = App(settings=settings)
    if settings.app is not None:
        flags.export()
        app = load_app(settings)
        settings = with_own(settings, app)
    report = Report()

    async def main() -> int:
        async with open_operator(settings) as operator:
            await work(app, app.schedules_of(operator, settings), report)
        report.end()
        return 0

    return run(main)


@cron.default
@cron.command(name="list")
def list_(*, listing: Listing = LISTING, flags: WorkerFlags = WORKER) -> int:
    """List the schedules, with their last tick and the next ones, in their own time zones.

    Those in code are the app's (STREAMWORKER_APP). Those that are data are listed with and without an app.
    """
    settings = flags.settings()
    app: App[Any] = App(settings=settings)
    if settings.app is not None:
        app = load_app(settings)
        settings = with_own(settings, app)

    async def main() -> int:
        async with open_operator(settings) as operator:
            schedules = app.schedules_of(operator, settings)

            async def rows() -> AsyncIterator[tuple[ScheduleRow, None]]:
                async for row in schedule_rows(operator, schedules):
                    yield row, None

            return await show(listing, rows, _COLUMNS, title="schedules")

    return run(main, endless=listing.watch)


@cron.command
def add(
    name: str,
    expression: str,
    kind: str,
    payload: Payload = "{}",
    /,
    *,
    queue: QueueName = None,
    tz: str = "UTC",
    missed: Missed = "last",
    priority: str = "normal",
    flags: WorkerFlags = WORKER,
) -> int:
    """Store a schedule as data, or change the one of that name. Workers are notified at once.

    With an app (STREAMWORKER_APP) the payload is checked against the type of the kind's handler, which names the queue,
    too. Without one, --queue is needed.

    Args:
        name: Its name.
        expression: Five fields as in crontab, six with seconds, or @daily and its like.
        kind: Of its jobs, such as report.daily.
        payload: Of its jobs, a JSON object.
        queue: Another queue than the handler's.
        tz: The time zone of the expression, as in Europe/Berlin.
        missed: Of ticks that were missed, last runs the last one, skip none.
        priority: high, normal, low, or a number.
    """

    async def work(app: App[Any], schedules: Schedules, report: Report) -> None:
        known = app if app.registrations else None
        found, where, raw = checked_payload(known, kind, queue, payload.encode(), lenient=True)
        job = Job(id=codec.new_id(), queue=where, kind=found, payload=raw, level=level_named(priority))
        await schedules.put(name, expression, job, tz=tz, missed=missed, by=operator_name())
        state = await schedules.get(name)
        report.write(f"{name} ticks next at {state.stored.schedule().upcoming(await _now(schedules, where), 1)[0]}\n")
        if state.known is False:
            say(f"the app has no handler for the kind {kind}: its jobs will wait for a worker that knows it")

    return _act(flags, work)


async def _now(schedules: Schedules, queue: str) -> float:
    return await schedules.store.now(queue)


@cron.command
def edit(
    name: str,
    /,
    *,
    expression: str | None = None,
    tz: str | None = None,
    missed: Missed | None = None,
    payload: Payload | None = None,
    priority: str | None = None,
    flags: WorkerFlags = WORKER,
) -> int:
    """Change a schedule that is data.

    Args:
        name: Which.
        expression: When it ticks.
        tz: The time zone of the expression.
        missed: last or skip.
        payload: Of its jobs, a JSON object; checked against the type of the kind's handler if an app is named.
        priority: high, normal, low, or a number.
    """
    changes: dict[str, Any] = {"expression": expression, "tz": tz, "missed": missed}
    if priority is not None:
        changes["level"] = level_named(priority)
    if payload is not None:
        _, _, changes["payload"] = checked_payload(None, "any", "any", payload.encode())
    changes = {field: value for field, value in changes.items() if value is not None}
    if not changes:
        raise UsageError("say what to change: --expression, --tz, --missed, --payload or --priority")

    async def work(_: App[Any], schedules: Schedules, report: Report) -> None:
        stored = await schedules.edit(name, by=operator_name(), **changes)
        told = "" if stored.paused else stored.schedule().upcoming(await _now(schedules, stored.queue), 1)[0]
        report.write(f"{name} changed; {f'it ticks next at {told}' if told else 'it is paused'}\n")

    return _act(flags, work)


@cron.command
def pause(name: str, /, *, flags: WorkerFlags = WORKER) -> int:
    """Stop the ticks of a schedule that is data, until it is resumed. Ticks in that time are skipped.

    Args:
        name: Which.
    """

    async def work(_: App[Any], schedules: Schedules, report: Report) -> None:
        changed = await schedules.pause(name, by=operator_name())
        report.write(f"{name} {'paused' if changed else 'was paused already'}\n")

    return _act(flags, work)


@cron.command
def resume(name: str, /, *, flags: WorkerFlags = WORKER) -> int:
    """Undo the pause of a schedule.

    Args:
        name: Which.
    """

    async def work(_: App[Any], schedules: Schedules, report: Report) -> None:
        report.write(f"{name} {'resumed' if await schedules.resume(name) else 'was not paused'}\n")

    return _act(flags, work)


@cron.command(name="run")
def run_now(name: str, /, *, flags: WorkerFlags = WORKER) -> int:
    """Enqueue the job of a schedule that is data now, beside its ticks; prints the job's id.

    Args:
        name: Which.
    """

    async def work(_: App[Any], schedules: Schedules, report: Report) -> None:
        report.write(f"{await schedules.run_now(name)}\n")

    return _act(flags, work)


@cron.command
def remove(name: str, /, *, flags: WorkerFlags = WORKER) -> int:
    """Delete a schedule that is data. Jobs that it enqueued stay.

    Args:
        name: Which.
    """

    async def work(_: App[Any], schedules: Schedules, report: Report) -> None:
        if not await schedules.remove(name):
            raise UsageError(f"there is no schedule {name!r} kept as data")
        report.write(f"{name} removed\n")

    return _act(flags, work)
