"""The history of runs as people see it: the same numbers on the command line and in the dashboard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec

from streamworker.errors import UsageError
from streamworker.telemetry.run_history import (
    DAY,
    HOUR,
    KEPT,
    MINUTE,
    HistoryQuery,
    HistoryReader,
    HistorySums,
    Place,
    RunTally,
    StepCounts,
    percentiles,
)

SHARES: Final = (0.5, 0.95, 0.99)
WEEK: Final = 7 * DAY
_Value = TypeVar("_Value")


class HistoryRange(msgspec.Struct, frozen=True):
    """How far back a look goes.

    Attributes:
        name: how it is chosen.
        words: what it is called.
        seconds: how long it is.
        coarse: (span that is read, seconds of a step) of all kinds together.
        fine: the same of one kind.
        before: the span in which the week before is read; its minutes are not kept.
    """

    name: str
    words: str
    seconds: int
    coarse: tuple[int, int]
    fine: tuple[int, int]
    before: int


RANGES: Final = {
    each.name: each
    for each in (
        HistoryRange("1h", "the last hour", HOUR, (MINUTE, MINUTE), (MINUTE, MINUTE), HOUR),
        HistoryRange("24h", "the last 24 hours", DAY, (HOUR, HOUR), (MINUTE, 10 * MINUTE), HOUR),
        HistoryRange("7d", "the last 7 days", WEEK, (HOUR, 4 * HOUR), (HOUR, 2 * HOUR), DAY),
        HistoryRange("60d", "the last 60 days", 60 * DAY, (DAY, DAY), (DAY, DAY), DAY),
    )
}


class HistoryPoint(msgspec.Struct, frozen=True):
    """One step. ``seconds`` of it have passed; times are percentiles in seconds, ``None`` where nothing ran."""

    at: str
    seconds: float
    started: int
    done: int
    failed: int
    retried: int
    run_p50_s: float | None
    run_p95_s: float | None
    run_p99_s: float | None
    wait_p50_s: float | None
    wait_p95_s: float | None
    wait_p99_s: float | None

    @property
    def epoch(self) -> float:
        """When it begins, in epoch seconds."""
        return datetime.fromisoformat(self.at).timestamp()

    @property
    def done_per_s(self) -> float:
        """Jobs done a second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def failed_per_s(self) -> float:
        """Runs that failed, a second."""
        return self.failed / self.seconds if self.seconds else 0.0


class HistoryKind(msgspec.Struct, frozen=True):
    """A queue and kind over the whole range; the sum of all has neither name.

    ``done_per_s`` is the mean; ``week_before_per_s`` that of the same time a week before, ``None`` if nothing ran then
    or it was not asked for; ``shape`` how many were done in each step.
    """

    queue: str
    kind: str
    started: int
    done: int
    failed: int
    retried: int
    done_per_s: float
    run_p50_s: float | None
    run_p95_s: float | None
    run_p99_s: float | None
    wait_p50_s: float | None
    wait_p95_s: float | None
    wait_p99_s: float | None
    week_before_per_s: float | None
    shape: list[int]

    @property
    def change(self) -> float | None:
        """By which share more were done than a week before."""
        return None if not self.week_before_per_s else self.done_per_s / self.week_before_per_s - 1


class HistoryLook(msgspec.Struct, frozen=True):
    """What a look back found.

    Attributes:
        range: how far back it went.
        queue: only of this queue.
        kind: only of this kind.
        now: the server's time.
        since: where it begins (epoch seconds).
        step: seconds of a point.
        total: everything together.
        kinds: the busiest first.
        points: all steps, also those in which nothing ran.
        before: the points of the week before, in steps of their own, empty if they were not asked for.
    """

    range: HistoryRange
    queue: str | None
    kind: str | None
    now: float
    since: float
    step: int
    total: HistoryKind
    kinds: list[HistoryKind]
    points: list[HistoryPoint]
    before: list[HistoryPoint]

    @property
    def drawn(self) -> list[HistoryPoint]:
        """The points of lines: without the present step while less than half of it has passed.

        Workers write every ten seconds: a minute that has just begun would always look as if nothing ran.
        """
        last = self.points[-1:]
        return self.points[:-1] if last and last[0].seconds < self.step / 2 else self.points


async def look_back(
    reader: HistoryReader, range_: str, *, queue: str | None = None, kind: str | None = None, compare: bool = True
) -> HistoryLook:
    """Look back.

    Args:
        reader: where the history is kept.
        range_: a name of `RANGES`.
        queue: only of this queue.
        kind: only of this kind.
        compare: with the same time a week before.

    Raises:
        UsageError: there is no such range.
        StreamworkerError: the history cannot be read.
    """
    wanted = RANGES.get(range_)
    if wanted is None:
        raise UsageError(f"there is no range {range_!r}: use {', '.join(RANGES)}")
    now = await reader.now()
    span, step = wanted.fine if kind is not None else wanted.coarse
    since = now // step * step - wanted.seconds + step
    query = HistoryQuery(span, since, now + span, step, queue, kind)
    sums = await reader.read(query)
    points = _points(sums, since, now, step)
    before: list[HistoryPoint] = []
    rates: dict[Place, float | None] = {}
    week_before = None
    if compare:
        past = _a_week_before(query, wanted.before, now)
        old = _part(sums, past) if _holds(query, past) else await reader.read(past)
        before, elapsed = _points(old, past.since, past.until, past.step), past.until - past.since
        rates = {place: _rate(counts.values(), elapsed) for place, counts in old.counts.items()}
        week_before = _rate((each for counts in old.counts.values() for each in counts.values()), elapsed)
    ats = [since + number * step for number in range(len(points))]
    kinds = [
        _kind(place, tally, now - since, rates.get(place), _shape(sums.counts.get(place, {}), ats))
        for place, tally in sums.kinds.items()
    ]
    kinds.sort(key=lambda each: (-each.done, -each.started, each.queue, each.kind))
    together = RunTally()
    for tally in sums.steps.values():
        together.add(tally)
    total = _kind(("", ""), together, now - since, week_before, [point.done for point in points])
    return HistoryLook(wanted, queue, kind, now, since, step, total, kinds, points, before)


def _a_week_before(query: HistoryQuery, span: int, now: float) -> HistoryQuery:
    """The same time a week before, as far as it is kept, in steps of a span. Of kinds only the counts are shown."""
    since = max((query.since - WEEK) // span * span, math.ceil((now - KEPT[span]) / span) * span)
    until = math.ceil((now - WEEK) / span) * span
    return HistoryQuery(span, since, until, span, query.queue, query.kind, kinds=False)


def _holds(query: HistoryQuery, part: HistoryQuery) -> bool:
    """Whether the steps of ``part`` are steps of ``query``."""
    return query.step == part.step and query.since <= part.since and part.until <= query.until


def _part(sums: HistorySums, part: HistoryQuery) -> HistorySums:
    def within(by_step: Mapping[float, _Value]) -> dict[float, _Value]:
        return {at: value for at, value in by_step.items() if part.since <= at < part.until}

    return HistorySums(within(sums.steps), {}, {place: within(counts) for place, counts in sums.counts.items()})


def _rate(counts: Iterable[StepCounts], seconds: float) -> float | None:
    started, done = 0, 0
    for each in counts:
        started += each[0]
        done += each[1]
    return done / seconds if started and seconds else None


def _shape(counts: Mapping[float, Sequence[int]], ats: Sequence[float]) -> list[int]:
    return [counts[at][1] if at in counts else 0 for at in ats]


def _times(tally: RunTally) -> dict[str, Any]:
    found = [*percentiles(tally.run, SHARES), *percentiles(tally.wait, SHARES)]
    names = [f"{what}_p{share * 100:.0f}_s" for what in ("run", "wait") for share in SHARES]
    return {name: None if value is None else float(f"{value:.3g}") for name, value in zip(names, found, strict=True)}


def _counts(tally: RunTally) -> dict[str, Any]:
    return {"started": tally.started, "done": tally.done, "failed": tally.failed, "retried": tally.retried}


def _kind(place: Place, tally: RunTally, seconds: float, week_before: float | None, shape: list[int]) -> HistoryKind:
    queue, kind = place
    rate = float(f"{tally.done / seconds:.4g}") if seconds > 0 else 0.0
    if week_before is not None:
        week_before = float(f"{week_before:.4g}")
    return HistoryKind(
        queue=queue, kind=kind, done_per_s=rate, week_before_per_s=week_before, shape=shape, **_counts(tally),
        **_times(tally),
    )  # fmt: skip


def _points(sums: HistorySums, since: float, until: float, step: int) -> list[HistoryPoint]:
    found = []
    for number in range(max(0, math.ceil((until - since) / step))):
        at = since + number * step
        tally = sums.steps.get(at) or RunTally()
        when = datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
        seconds = round(min(step, until - at), 1)
        found.append(HistoryPoint(at=when, seconds=seconds, **_counts(tally), **_times(tally)))
    return found


BLOCKS: Final = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS: Final = "_.:-=+*#"
"""For terminals that have no others."""


def sparkline(values: Sequence[float | None], blocks: str = BLOCKS, most: int = 60) -> str:
    """Values as a line of letters: the lowest letter is nothing, the highest the largest value.

    Args:
        values: in order; ``None`` where there is none.
        blocks: the letters.
        most: letters of the line at most; neighbours are drawn as the larger of them.
    """
    each = math.ceil(len(values) / most) or 1
    drawn = [max(value or 0.0 for value in values[at : at + each]) for at in range(0, len(values), each)]
    top = max(drawn, default=0.0)
    levels = len(blocks) - 1
    return "".join(blocks[math.ceil(value / top * levels) if top and value > 0 else 0] for value in drawn)


def duration(seconds: float | None) -> str:
    """A time of a run, from ``0.1 ms`` to days; a dash where there is none."""
    if seconds is None:
        return "-"
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for length, unit in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def percent(change: float | None) -> str:
    """A change against the week before, such as ``+12 %``; empty where there is none."""
    if change is None:
        return ""
    if abs(change) < 0.005:
        return "0 %"
    return f"{change:+.0%}".replace("%", " %") if change < 9.995 else f"x{change + 1:,.0f}"
