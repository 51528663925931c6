"""Cron: the schedules of an app, and when they tick. The only module that imports the cron library.

Expressions are those of Debian's cron (five fields, six with seconds), and daylight saving is handled as it does: what
falls into the hour that is skipped runs when that is over, and what falls into the hour that comes twice runs once,
unless its minute or its hour starts with ``*``: that runs by elapsed time, in both hours.

The cron library computes times of day only, without a zone; this module maps them to moments. With a zone the library
returns moments in the past during an hour that comes twice, and wrong ones where the clock is set by half an hour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from uuid import UUID, uuid5
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from cronsim import CronSim, CronSimError

from streamworker.errors import ConfigurationError
from streamworker.job import Job
from streamworker.payload import AnyPayload
from streamworker.producer import make_job

Missed: TypeAlias = Literal["last", "skip"]
"""Ticks that were missed while no worker ran: the last of them runs, or none."""

_NAMESPACE: Final = UUID("6b1c4c0a-5f0c-5b7e-9c39-5d3e1f7a2c44")
_ALIASES: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001 - times of day have no zone here
_PATIENCE: Final = 60 * 366 * 86_400
"""Seconds within which an expression that ever ticks has ticked; the cron library searches 50 years ahead."""
_YEAR: Final = 366 * 86_400
_STEP: Final = 6 * 3600
"""Seconds between looks for changes of a zone's offset: none has been changed and changed back within so few."""
_LONGEST: Final = 26 * 3600
"""Seconds by which a clock is set back at most: a day, when a country moves across the date line."""


class Schedule(msgspec.Struct, frozen=True, eq=False):
    """One schedule of an app.

    Attributes:
        name: unique in its app.
        expression: as it was written.
        zone: the time zone of the expression.
        missed: which missed ticks run.
        job: enqueued at every tick, with an id of its own.
    """

    name: str
    expression: str
    zone: str
    missed: Missed
    job: Job

    @property
    def key(self) -> str:
        """The field of its last tick in Redis: a schedule that was changed begins anew."""
        return f"{self.name} {self.expression} {self.zone}"

    def next(self, now: float) -> float:
        """The first tick after ``now`` (both in epoch seconds).

        Raises:
            StopIteration: there is none within 50 years.
        """
        tick = self._first(math.floor(now), None)
        if tick is None:
            raise StopIteration
        return float(tick)

    def previous(self, now: float) -> float:
        """The last tick at or before ``now``: the one after which `next` finds none up to ``now``.

        Raises:
            StopIteration: there was none within 60 years.
        """
        end, back = math.floor(now), 64
        while self._first(end - back, end) is None:
            if back > _PATIENCE:
                raise StopIteration
            back *= 2
        low, high = end - back, end  # a tick is after the first, none after the second
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._first(middle, end) is None else (middle, high)
        return float(high)

    def upcoming(self, now: float, count: int) -> list[datetime]:
        """The next ticks, in the schedule's own time zone."""
        found: list[datetime] = []
        for _ in range(count):
            now = self.next(now)
            found.append(self.moment(now))
        return found

    def moment(self, at: float) -> datetime:
        """Epoch seconds in the schedule's own time zone."""
        return _at(at, self.zone)

    def tick(self, at: float) -> Job:
        """The job of one tick: with the same id on every worker."""
        moment = datetime.fromtimestamp(at, UTC)
        headers = {**(self.job.headers or {}), "cron": self.name, "tick": moment.isoformat()}
        job_id = str(uuid5(_NAMESPACE, f"{self.job.queue}/{self.key}/{round(at)}"))
        return msgspec.structs.replace(self.job, id=job_id, created_at=moment, headers=headers)

    def _first(self, after: int, until: int | None) -> int | None:
        """The first tick after a moment, up to another one if that is given (epoch seconds)."""
        expression = _ALIASES.get(self.expression, self.expression)
        once = not any(field.startswith("*") for field in expression.split()[-5:-3])  # minute and hour
        offset = _offset(self.zone, after)
        wall = after + offset  # local time in seconds; ticks come after it
        if once:  # a local time that occurs twice has ticked the first time
            wall = max([wall, *(each.at + each.before - 1 for each in _changes(self.zone, after - _LONGEST, after))])
        while (shown := _shown(expression, wall)) is not None:
            tick = shown - offset
            end = tick if until is None else min(tick, until)
            change = next(_changes(self.zone, after, end), None)
            if change is None:
                return tick if tick == end else None
            if once and shown < change.at + change.after:
                return change.at  # a local time that is skipped runs when the skip is over
            after, offset = change.at, change.after
            wall = max(wall, after + max(change.before, offset) - 1) if once else after + offset - 1
        return None


class _Change(NamedTuple):
    """A change of a zone's offset from UTC, all in seconds: of the epoch, and before and after it."""

    at: int
    before: int
    after: int


def _offset(zone: str, at: int) -> int:
    offset = datetime.fromtimestamp(at, ZoneInfo(zone)).utcoffset() or timedelta(0)
    return round(offset.total_seconds())


def _changes(zone: str, after: int, until: int) -> Iterator[_Change]:
    """Changes of a zone's offset after a moment and up to another, in order."""
    for year in range(after // _YEAR, until // _YEAR + 1):
        yield from (change for change in _changes_of(zone, year) if after < change.at <= until)


@lru_cache(maxsize=4096)
def _changes_of(zone: str, year: int) -> tuple[_Change, ...]:
    """Changes in one of the years since 1970, each of 366 days. The standard library has no call for them."""
    found: list[_Change] = []
    start, end = year * _YEAR - 1, (year + 1) * _YEAR - 1
    before = _offset(zone, start)
    while start < end:
        stop = min(start + _STEP, end)
        after = _offset(zone, stop)
        if after != before:
            low, high = start, stop
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _offset(zone, middle) == before else (low, middle)
            after = _offset(zone, high)
            found.append(_Change(high, before, after))
            stop = high
        start, before = stop, after
    return tuple(found)


@lru_cache(maxsize=1024)
def _parsed(expression: str) -> CronSim:
    return CronSim(expression, _EPOCH)


def _shown(expression: str, wall: int) -> int | None:
    """The next time of day and date that fits, after another one: both in seconds since 1970, without a zone."""
    ticks = copy(_parsed(expression))
    ticks.dt = _EPOCH + timedelta(seconds=wall)
    try:
        return round((next(ticks) - _EPOCH).total_seconds())
    except StopIteration:
        return None


def schedule(
    expression: str, payload: AnyPayload, *, tz: str, missed: Missed, name: str | None, **options: Any
) -> Schedule:
    """A schedule, checked.

    Args:
        expression: five fields, six with seconds, or ``@daily`` and its like.
        payload: of its jobs.
        tz: an IANA time zone.
        missed: which missed ticks run.
        name: of the schedule; the payload's kind unless given.
        options: of its jobs, see `producer.JobOptions`.

    Raises:
        ConfigurationError: the expression, the zone or ``missed`` is invalid.
    """
    job = make_job(payload, **options)
    return checked(Schedule(name or job.kind, expression, tz, missed, job))


def checked(made: Schedule) -> Schedule:
    """The schedule, if it makes sense.

    Raises:
        ConfigurationError: the expression, the zone or ``missed`` is invalid.
    """
    expression, tz, missed = made.expression, made.zone, made.missed
    if missed not in ("last", "skip"):
        raise ConfigurationError(f"missed={missed!r} must be 'last' or 'skip'")
    try:
        ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigurationError(f"tz={tz!r} is no time zone: write it as in 'Europe/Berlin'") from None
    try:
        made.next(0.0)
    except (CronSimError, StopIteration) as error:
        why = str(error) or "it never ticks"
        raise ConfigurationError(f"the cron expression {expression!r} makes no sense: {why}") from None
    return made


def _at(now: float, zone: str) -> datetime:
    return datetime.fromtimestamp(now, ZoneInfo(zone))


class Calendar:
    """The schedules of an app."""

    def __init__(self) -> None:
        self._schedules: dict[str, Schedule] = {}

    @property
    def schedules(self) -> Sequence[Schedule]:
        """All schedules, in the order of their definition; those of an included app at its place."""
        return [made for calendar in self._calendars() for made in calendar._schedules.values()]

    def _calendars(self) -> Iterator[Calendar]:
        """This calendar and those of included apps."""
        yield self

    def cron(
        self,
        expression: str,
        payload: AnyPayload,
        /,
        *,
        tz: str = "UTC",
        missed: Missed = "last",
        name: str | None = None,
        queue: str | None = None,
        priority: str | int = "normal",
        headers: dict[str, Any] | None = None,
    ) -> None:
        """Enqueue a job by the calendar: every worker of the app offers each tick, and one job is added.

        The server's clock decides whether the tick is due. A schedule begins with the first worker that has it: earlier
        ticks are not caught up.

        Args:
            expression: five fields as in crontab, six with seconds in front, or ``@hourly``, ``@daily``, ``@weekly``,
                ``@monthly``, ``@yearly``.
            payload: of the job.
            tz: the time zone of the expression, as in ``Europe/Berlin``.
            missed: of ticks that were missed while no worker ran, ``last`` runs the last one, once; ``skip`` none.
            name: its name in `streamworker cron list` and in the job's headers; the kind unless given.
            queue: another queue than the payload's class names.
            priority: ``high``, ``normal``, ``low``, or a number.
            headers: of the job; ``cron`` (the name) and ``tick`` (its moment) are added.

        Raises:
            ConfigurationError: the expression or the time zone makes no sense, or the name is taken.
            UsageError: an option of the job makes no sense.
        """
        made = schedule(
            expression, payload, tz=tz, missed=missed, name=name, queue=queue, priority=priority, headers=headers
        )
        self._add_schedule(made)

    def _add_schedule(self, made: Schedule) -> None:
        self._check_schedule(made)
        self._schedules[made.name] = made

    def _check_schedule(self, made: Schedule) -> None:
        if any(made.name in calendar._schedules for calendar in self._calendars()):
            raise ConfigurationError(f"there are two schedules named {made.name!r}: give one of them name=")
