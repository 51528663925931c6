"""The page of the history: charts that the server draws as SVG, each with its numbers in a table behind it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response

from streamworker.telemetry.run_history import DAY, HOUR, HistoryReader
from streamworker.views.history import RANGES, HistoryLook, HistoryPoint, duration, look_back
from streamworker.web.forms import query
from streamworker.web.render import monitor_of, render

WIDTH: Final = 600.0
HEIGHT: Final = 150.0
KINDS: Final = 200
"""Kinds that are shown at most."""
FRESH: Final = 5.0
"""Seconds for which a look back is shown again: an open page asks anew every two."""
CACHED: Final = 50


class LookCache:
    """The last looks back, shared by all who watch."""

    def __init__(self) -> None:
        self._looks: dict[tuple[str, str | None, str | None, bool], tuple[float, HistoryLook]] = {}

    async def look(
        self, reader: HistoryReader, range_: str, queue: str | None, kind: str | None, *, compare: bool
    ) -> HistoryLook:
        """`look_back`, or what it gave a moment ago."""
        key = (range_, queue, kind, compare)
        at, look = self._looks.get(key, (-math.inf, None))
        if look is None or time.monotonic() - at > FRESH:
            look = await look_back(reader, range_, queue=queue, kind=kind, compare=compare)
            self._looks.pop(key, None)
            self._looks[key] = time.monotonic(), look
            if len(self._looks) > CACHED:
                del self._looks[next(iter(self._looks))]
        return look


class Line(msgspec.Struct, frozen=True):
    """One line of a chart: its class in the style sheet, its name, and a value for each step or ``None``."""

    style: str
    name: str
    values: list[float | None]


class Chart(msgspec.Struct, frozen=True):
    """A chart, drawn.

    Attributes:
        title: what it shows.
        legend: (class in the style sheet, name) of its lines.
        last: the newest value of its first line.
        svg: the picture.
        marks: (share of the height from above, text) of its horizontal lines.
        said: the picture in a sentence.
    """

    title: str
    legend: list[tuple[str, str]]
    last: str
    svg: Markup
    marks: list[tuple[float, str]]
    said: str


async def history(request: Request) -> Response:
    """What ran, and how long it took."""
    form = query(request)
    monitor = monitor_of(request)
    operator, archive = await monitor.operator(), await monitor.archive()
    reader = archive.history if archive is not None else operator.history
    cache: LookCache = request.app.state.history
    chosen = form.text("range") or "24h"
    queue, kind, compare = form.queue(), form.text("kind"), form.text("compare") != "no"
    found = await cache.look(reader, chosen, queue, kind, compare=compare)
    queues = sorted({row.queue for row, _ in monitor.look.queues} if monitor.look is not None else [])
    return render(
        request, "history.html", title="History", found=found, ranges=list(RANGES.values()), queues=queues,
        compare=compare, charts=charts_of(found), times=_axis(found), kinds=found.kinds[:KINDS],
        more=len(found.kinds) - KINDS, shapes=[spark(row.shape) for row in found.kinds[:KINDS]],
    )  # fmt: skip


def charts_of(look: HistoryLook) -> list[Chart]:
    """Throughput, run time and waiting time."""
    points, before = look.drawn, look.before if any(point.started for point in look.before) else []
    return [
        _throughput(look, points, before),
        _percentiles(look, "Run time", "run", points, before),
        _percentiles(look, "Waiting time", "wait", points, before),
    ]


def _throughput(look: HistoryLook, points: Sequence[HistoryPoint], before: Sequence[HistoryPoint]) -> Chart:
    lines = [Line("done", "done", [point.done_per_s for point in points])]
    if look.total.failed:
        lines.append(Line("failed", "failed", [point.failed_per_s for point in points]))
    past = [Line("before", "done a week before", [point.done_per_s for point in before])] if before else []
    top = max((value or 0.0 for line in [*lines, *past] for value in line.values), default=0.0)
    scale = _nice(top)

    def height(value: float) -> float:
        return HEIGHT * (1 - value / scale)

    marks = [(0.0, _rate(scale)), (0.5, _rate(scale / 2))]
    said = f"Jobs done per second, {look.range.words}: at most {_rate(top)}, {look.total.done:,} in all, "
    return Chart(
        "Throughput", [(line.style, line.name) for line in [*past, *lines]], _rate(points[-1].done_per_s),
        _draw(look, lines, past, before, height, _rate), marks, f"{said}{look.total.failed:,} runs failed.",
    )  # fmt: skip


def _percentiles(
    look: HistoryLook, title: str, what: str, points: Sequence[HistoryPoint], before: Sequence[HistoryPoint]
) -> Chart:
    def values(of: Sequence[HistoryPoint], share: int) -> list[float | None]:
        return [getattr(point, f"{what}_p{share}_s") for point in of]

    lines = [Line(f"p{share}", f"p{share}", values(points, share)) for share in (50, 95, 99)]
    past = [Line("before", "p95 a week before", values(before, 95))] if before else []
    there = [value for line in [*lines, *past] for value in line.values if value]
    # Times differ by orders of magnitude: each decade is as high.
    low = math.floor(math.log10(min(there, default=0.001)))
    high = max(low + 1, math.ceil(math.log10(max(there, default=1.0))))
    every = math.ceil((high - low) / 4)
    high = low + every * math.ceil((high - low) / every)

    def height(value: float) -> float:
        return HEIGHT * (high - math.log10(max(value, 10.0**low))) / (high - low)

    marks = [
        ((high - decade) / (high - low), duration(10.0**decade).replace(".0 ", " "))
        for decade in range(high, low, -every)
    ]
    whole = ", ".join(f"p{share} {duration(getattr(look.total, f'{what}_p{share}_s'))}" for share in (50, 95, 99))
    return Chart(
        title, [(line.style, line.name) for line in [*past, *lines]], duration(lines[1].values[-1]),
        _draw(look, lines, past, before, height, duration), marks, f"{title}, {look.range.words}: {whole}.",
    )  # fmt: skip


def _draw(
    look: HistoryLook,
    lines: Sequence[Line],
    past: Sequence[Line],
    before: Sequence[HistoryPoint],
    height: Callable[[float], float],
    words: Callable[[float | None], str],
) -> Markup:
    """The lines of this time and of the week before, and a field for each step that says its numbers on hover."""
    until = look.since + look.range.seconds

    def place(at: float) -> float:
        return min(WIDTH, max(0.0, WIDTH * (at - look.since) / (until - look.since)))

    drawn: list[str] = []
    week = 7 * DAY
    if past:
        step = before[1].epoch - before[0].epoch if len(before) > 1 else look.range.seconds
        spans = [(place(point.epoch + week), place(point.epoch + week + step)) for point in before]
        drawn += [_path(line, spans, height) for line in past]
    spans = [
        (place(look.since + n * look.step), place(look.since + (n + 1) * look.step)) for n in range(len(look.drawn))
    ]
    drawn += [_path(line, spans, height, area=line.style == "done") for line in lines]
    for number, (left, right) in enumerate(spans):
        told = ", ".join(f"{line.name} {words(line.values[number])}" for line in lines)
        told = escape(f"{_clock(look.since + number * look.step, look.step)}: {told}")
        drawn.append(  # hundreds of them: put together as text, since Markup.format takes 20 times as long
            f'<rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{HEIGHT:.0f}"><title>{told}</title></rect>'
        )
    return Markup("".join(drawn))  # noqa: S704 - numbers, Markup, and what was escaped


def _path(
    line: Line, spans: Sequence[tuple[float, float]], height: Callable[[float], float], *, area: bool = False
) -> Markup:
    """A line of steps; it is interrupted where there is no value."""
    parts, joined = [], False
    for value, (left, right) in zip(line.values, spans, strict=True):
        if value is None or right <= left:
            joined = False
            continue
        parts.append(f"{'L' if joined else 'M'}{left:.1f} {height(value):.1f}H{right:.1f}")
        joined = True
    path = Markup('<path class="{0}" d="{1}"/>').format(line.style, "".join(parts))
    if not area or not parts:
        return path
    under = f"{''.join(parts)}V{HEIGHT:.0f}H{spans[0][0]:.1f}Z"
    return Markup('<path class="under" d="{0}"/>').format(under) + path


def spark(values: Sequence[int]) -> Markup:
    """The shape of a row, 120 by 22."""
    top = max(values, default=0) or 1
    wide = 120 / max(1, len(values))
    steps = "".join(f"V{21 - 19 * value / top:.1f}h{wide:.2f}" for value in values)
    return Markup('<svg class="shape" viewBox="0 0 120 22" aria-hidden="true"><path d="M0 21{0}V21Z"/></svg>').format(
        steps
    )


def _axis(look: HistoryLook) -> list[str]:
    """The begin, the middle and the end of the time, for below a chart."""
    ats = (look.since, look.since + look.range.seconds / 2, look.since + look.range.seconds)
    return [_clock(at, look.step) for at in ats[:2]] + ["now"]


def _clock(at: float, step: int) -> str:
    """A moment as far as a step is precise: in UTC."""
    when = datetime.fromtimestamp(at, UTC)
    if step >= DAY:
        return f"{when:%b} {when.day}"
    return f"{when:%H:%M}" if step < HOUR else f"{when:%b} {when.day} {when:%H:%M}"


def _nice(top: float) -> float:
    """A round number that is at least as large."""
    if top <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(top))
    return next(size * each for each in (1, 2, 5, 10) if size * each >= top * 0.999)


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"
