"""When schedules tick: over both changes of daylight saving, at the edges, and what makes no sense."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from streamworker import App, Payload
from streamworker.cron import Schedule
from streamworker.errors import ConfigurationError, UsageError

BERLIN = ZoneInfo("Europe/Berlin")


class Report(Payload, kind="report", queue="reports"):
    day: int = 0


def made(expression: str, **options) -> Schedule:
    app = App()
    app.cron(expression, Report(), **{"tz": "Europe/Berlin", **options})
    return app.schedules[0]


def at(*parts: int, fold: int = 0) -> float:
    return datetime(*parts, tzinfo=BERLIN, fold=fold).timestamp()


def ticks(schedule: Schedule, start: float, end: float) -> list[str]:
    found = []
    while (start := schedule.next(start)) < end:
        assert schedule.previous(start) == start  # a tick is its own last one
        assert schedule.previous(start + 0.5) == start
        assert schedule.next(start - 0.5) == start
        found.append(schedule.moment(start).isoformat())
    return found


def test_the_hour_that_is_skipped():
    start, end = at(2026, 3, 28), at(2026, 3, 31)
    assert ticks(made("30 2 * * *"), start, end) == [
        "2026-03-28T02:30:00+01:00", "2026-03-29T03:00:00+02:00", "2026-03-30T02:30:00+02:00",
    ]  # fmt: skip
    assert len(ticks(made("0 * * * *"), start, end)) == 24 + 23 + 24 - 1
    assert len(ticks(made("0 3 * * *"), start, end)) == 3


def test_the_hour_that_comes_twice():
    start, end = at(2026, 10, 24), at(2026, 10, 27)
    assert ticks(made("30 2 * * *"), start, end) == [
        "2026-10-24T02:30:00+02:00", "2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00",
    ]  # fmt: skip
    assert len(ticks(made("0 * * * *"), start, end)) == 24 + 25 + 24 - 1
    both = [at(2026, 10, 25, 2, 45, fold=fold) for fold in (0, 1)]
    assert {made("30 2 * * *").previous(moment) for moment in both} == {at(2026, 10, 25, 2, 30)}


def test_seconds_and_words():
    schedule = made("*/10 * * * * *")
    assert schedule.next(1000.0) == 1010.0
    assert (schedule.previous(1009.99), schedule.previous(1010.0)) == (1000.0, 1010.0)
    assert made("@daily").next(at(2026, 6, 1, 12)) == at(2026, 6, 2)
    assert made("@daily", tz="Asia/Tokyo").next(at(2026, 6, 1, 12)) == at(2026, 6, 1, 17)


def test_a_tick_is_the_same_job_whoever_makes_it():
    job = made("@daily").tick(at(2026, 6, 2))
    assert job == made("@daily").tick(at(2026, 6, 2))
    assert job.headers == {"cron": "report", "tick": "2026-06-01T22:00:00+00:00"}
    assert (job.queue, job.kind, bytes(job.payload)) == ("reports", "report", b'{"day":0}')
    others = [made("@daily").tick(at(2026, 6, 3)), made("@daily", name="n").tick(at(2026, 6, 2))]
    others.append(made("@hourly").tick(at(2026, 6, 2)))
    assert len({job.id, *(other.id for other in others)}) == 4


@pytest.mark.parametrize("expression", ["", "x", "* * * *", "61 * * * *", "0 0 30 2 *", "@often"])
def test_expressions_without_sense(expression):
    with pytest.raises(ConfigurationError, match="cron expression"):
        made(expression)


def test_other_nonsense():
    with pytest.raises(ConfigurationError, match="no time zone"):
        made("@daily", tz="Berlin")
    with pytest.raises(ConfigurationError, match="'last' or 'skip'"):
        made("@daily", missed="all")
    with pytest.raises(UsageError, match="priority"):
        made("@daily", priority="urgent")
    app = App()
    app.cron("@daily", Report())
    with pytest.raises(ConfigurationError, match="name="):
        app.cron("@hourly", Report())
    app.cron("@hourly", Report(), name="each hour")
