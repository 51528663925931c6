"""When schedules tick: over both changes of daylight saving, at the edges, and what makes no sense."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from streamworker import App, Payload, cron
from streamworker.cron import Schedule
from streamworker.errors import ConfigurationError, UsageError
from tests.conftest import examples

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


# -- every zone and expression, against a calendar that is counted minute by minute

ZONES = [
    "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Sao_Paulo", "Asia/Beirut", "America/Havana",
    "Pacific/Apia", "America/St_Johns", "Africa/Casablanca", "Antarctica/Troll", "Pacific/Kwajalein", "Asia/Tehran",
    "Pacific/Chatham", "Asia/Kathmandu", "America/Santiago", "Asia/Gaza", "Pacific/Norfolk", "UTC",
]  # fmt: skip
NUMBERS = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 7)}


def field(name: str) -> st.SearchStrategy[str]:
    low, high = NUMBERS[name]
    number = st.integers(low, high)
    steps = st.builds(lambda step: f"*/{step}", st.integers(2, 40))
    ranges = st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}")
    lists = st.lists(number, min_size=1, max_size=4).map(lambda many: ",".join(map(str, many)))
    usual = st.just("*")
    return st.one_of(lists, usual, steps, ranges) if name in ("minute", "hour") else st.one_of(usual, usual, lists)


EXPRESSIONS = st.tuples(*map(field, NUMBERS)).map(" ".join)


@st.composite
def moments(draw) -> tuple[str, int]:
    """A zone, and a moment near one of its changes of the clock, or anywhere."""
    zone = draw(st.sampled_from(ZONES))
    anywhere = draw(st.integers(0, 70 * 366 * 86_400 - 1))
    changes = cron._changes_of(zone, anywhere // cron._YEAR)
    if not changes or draw(st.integers(0, 9)) == 0:
        return zone, anywhere
    return zone, draw(st.sampled_from(changes)).at + draw(st.integers(-30 * 3600, 30 * 3600))


def counted(schedule: Schedule, start: int, end: int) -> list[int]:
    """Ticks of a schedule without seconds from ``start`` to ``end``, by looking at the clock every minute."""
    zone = ZoneInfo(schedule.zone)
    walls = [datetime.fromtimestamp(at, zone) for at in range(start, end + 60, 60)]
    fits = set(fitting(schedule.expression, min(walls).replace(tzinfo=None), max(walls).replace(tzinfo=None)))
    once = not any(part.startswith("*") for part in schedule.expression.split()[:2])
    found = []
    for at, before, wall in zip(range(start + 60, end + 60, 60), walls, walls[1:], strict=False):
        shown, before_shown = wall.replace(tzinfo=None), before.replace(tzinfo=None)
        jumped = once and shown - before_shown > timedelta(minutes=1)
        skipped = jumped and any(before_shown < each < shown for each in fits)
        if skipped or (shown in fits and not (once and wall.fold)):
            found.append(at)
    return [at for at in found if at <= end]


def fitting(expression: str, first: datetime, last: datetime) -> list[datetime]:
    ticks = CronSim(expression, first - timedelta(days=2))
    found = []
    try:
        while (tick := next(ticks)) <= last + timedelta(days=2):
            found.append(tick)
    except StopIteration:
        pass
    return found


@settings(max_examples=examples(20), deadline=None)
@given(moments(), EXPRESSIONS)
@example(("Europe/Berlin", round(at(2026, 10, 25, 2, 5, fold=1))), "30 2 * * *")
@example(("Australia/Lord_Howe", 1_775_314_800), "15,45 1,2 * * *")
@example(("Australia/Lord_Howe", 1_759_591_800), "*/10 * * * *")
@example(("America/St_Johns", 1_288_494_000), "1 0 * * *")
def test_ticks_are_those_that_the_clock_on_the_wall_shows(place, expression):
    zone, moment = place
    assume(possible(expression))
    start = moment // 60 * 60 - 86_400  # offsets of whole minutes, which these zones have had since 1970
    end = start + 2 * 86_400
    schedule = made(expression, tz=zone)
    found, now = [], float(start)
    while (now := schedule.next(now)) <= end:
        found.append(round(now))
    assert found == counted(schedule, start, end)


@settings(max_examples=examples(75), deadline=None)
@given(moments(), EXPRESSIONS, st.sampled_from(["", "0 ", "*/7 ", "59 "]), st.floats(0, 0.999))
@example(("Europe/Berlin", round(at(2026, 10, 25, 2, 5, fold=1))), "30 2 * * *", "", 0.0)
def test_the_next_tick_lies_ahead_and_the_last_one_behind(place, expression, seconds, fraction):
    zone, moment = place
    assume(possible(expression))
    schedule = made(seconds + expression, tz=zone)
    now = moment + fraction
    ahead, behind = schedule.next(now), schedule.previous(now)
    assert behind <= now < ahead
    assert schedule.next(behind) == ahead  # nothing lies between them
    assert schedule.previous(ahead) == ahead
    assert schedule.previous(ahead - 1) == behind
    assert schedule.next(behind - 0.5) == behind
    assert [each.timestamp() for each in schedule.upcoming(now, 1)] == [ahead]


def possible(expression: str) -> bool:
    try:
        made(expression)
    except ConfigurationError:
        return False
    return True


def test_seconds_change_nothing_about_daylight_saving():
    start, end = at(2026, 3, 28), at(2026, 3, 31)
    assert [each - start for each in map(made("15 30 2 * * *").next, [start, at(2026, 3, 29)])] == [9015, 93_600]
    assert len(ticks(made("15 30 2 * * *"), start, end)) == 3
    assert len(ticks(made("0 30 2 * * *"), at(2026, 10, 24), at(2026, 10, 27))) == 3


@pytest.mark.parametrize("expression", ["0 0 29 2 *", "59 23 31 12 *", "0 0 1 1 *", "0 12 * * 5L", "0 0 LW * *"])
def test_rare_ones_and_the_ends_of_years(expression):
    schedule, now = made(expression), at(2026, 12, 31, 23, 59, fold=0)
    for _ in range(12):
        ahead = schedule.next(now)
        assert ahead > now
        assert schedule.previous(ahead) == ahead
        assert schedule.previous(ahead - 1) < ahead - 1
        now = ahead
