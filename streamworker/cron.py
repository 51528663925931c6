"""Jobs by the calendar: what an app's schedules are, and when they tick. The only module that knows the cron library.

Expressions are those of Debian's cron (five fields, six with seconds), and daylight saving is handled as it does: what
falls into the hour that is skipped runs when that is over, and what falls into the hour that comes twice runs once,
unless it runs every hour anyway.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeAlias
from uuid import UUID, uuid5
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from cronsim import CronSim, CronSimError

from streamworker.errors import ConfigurationError
from streamworker.handlers import Payload
from streamworker.job import Job
from streamworker.jobs import make_job

Missed: TypeAlias = Literal["last", "skip"]
"""What becomes of ticks while no worker was there: the last of them runs, or none."""

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


class Schedule(msgspec.Struct, frozen=True, eq=False):
    """One line of an app's calendar.

    Attributes:
        name: what people call it; one of a kind in its app.
        expression: as it was written.
        zone: the time zone it is read in.
        missed: what becomes of ticks while no worker was there.
        job: what is enqueued at every tick, but for its id.
    """

    name: str
    expression: str
    zone: str
    missed: Missed
    job: Job

    @property
    def key(self) -> str:
        """What its last tick is remembered by: a schedule that was changed begins anew."""
        return f"{self.name} {self.expression} {self.zone}"

    def next(self, now: float) -> float:
        """The first tick after ``now`` (both in epoch seconds)."""
        return self._ticks(_at(now, self.zone)).__next__().timestamp()

    def previous(self, now: float) -> float:
        """The last tick at or before ``now``."""
        moment = _at(now, self.zone).replace(microsecond=0).astimezone(UTC) + timedelta(seconds=1)
        return self._ticks(moment.astimezone(ZoneInfo(self.zone)), reverse=True).__next__().timestamp()

    def upcoming(self, now: float, count: int) -> list[datetime]:
        """The next ticks, in the schedule's own time zone."""
        ticks = self._ticks(_at(now, self.zone))
        return [next(ticks) for _ in range(count)]

    def moment(self, at: float) -> datetime:
        """Epoch seconds in the schedule's own time zone."""
        return _at(at, self.zone)

    def tick(self, at: float) -> Job:
        """The job of one tick: whoever makes it, it has the same id."""
        moment = datetime.fromtimestamp(at, UTC)
        headers = {**(self.job.headers or {}), "cron": self.name, "tick": moment.isoformat()}
        job_id = str(uuid5(_NAMESPACE, f"{self.job.queue}/{self.key}/{round(at)}"))
        return msgspec.structs.replace(self.job, id=job_id, created_at=moment, headers=headers)

    def _ticks(self, start: datetime, *, reverse: bool = False) -> CronSim:
        return CronSim(_ALIASES.get(self.expression, self.expression), start, reverse=reverse)


def schedule(
    expression: str, payload: Payload, *, tz: str, missed: Missed, name: str | None, **options: Any
) -> Schedule:
    """A schedule, checked.

    Args:
        expression: five fields, six with seconds, or ``@daily`` and its like.
        payload: of its jobs.
        tz: an IANA time zone.
        missed: what becomes of ticks while no worker was there.
        name: what people call it; the payload's kind unless given.
        options: of its jobs, see `jobs.JobOptions`.

    Raises:
        ConfigurationError: something of it makes no sense.
    """
    if missed not in ("last", "skip"):
        raise ConfigurationError(f"missed={missed!r} must be 'last' or 'skip'")
    try:
        ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigurationError(f"tz={tz!r} is no time zone: write it as in 'Europe/Berlin'") from None
    job = make_job(payload, **options)
    made = Schedule(name or job.kind, expression, tz, missed, job)
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
    def schedules(self) -> list[Schedule]:
        """All of them, in the order they were made."""
        return list(self._schedules.values())

    def cron(
        self,
        expression: str,
        payload: Payload,
        /,
        *,
        tz: str = "UTC",
        missed: Missed = "last",
        name: str | None = None,
        queue: str | None = None,
        priority: str | int = "normal",
        headers: dict[str, Any] | None = None,
    ) -> None:
        """Enqueue a job by the calendar: every worker of the app proposes each tick, and one job comes of it.

        The server's clock decides whether it is time. A schedule begins with the first worker that knows it: what came
        before is not caught up.

        Args:
            expression: five fields as in crontab, six with seconds in front, or ``@hourly``, ``@daily``, ``@weekly``,
                ``@monthly``, ``@yearly``.
            payload: what the job is made of.
            tz: the time zone of the expression, as in ``Europe/Berlin``.
            missed: while no worker was there, ticks were missed: ``last`` runs the last of them, once; ``skip`` none.
            name: what it is called, in `streamworker cron list` and in the job's headers; the kind unless given.
            queue: another queue than the payload's class names.
            priority: ``high``, ``normal``, ``low``, or a number.
            headers: travel with the job; ``cron`` (the name) and ``tick`` (its moment) come along.

        Raises:
            ConfigurationError: the expression or the time zone makes no sense, or the name is taken.
            UsageError: an option of the job makes no sense.
        """
        made = schedule(
            expression, payload, tz=tz, missed=missed, name=name, queue=queue, priority=priority, headers=headers
        )
        if made.name in self._schedules:
            raise ConfigurationError(f"there are two schedules named {made.name!r}: give one of them name=")
        self._schedules[made.name] = made
