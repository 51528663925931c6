"""Draws measured figures into the pages and pictures that show them: ``./dev figures``.

The figures are the files in ``benchmarks/results``, which ``./dev bench``, ``bench-peers``, ``bench-fleet``,
``bench-leak``, ``bench-nodes``, ``bench-scaling`` and ``soak`` write with ``--json``. A page names a table between two
comments, ``<!-- figures: bench -->`` and ``<!-- /figures -->``; all files of that name (``bench.json``,
``bench-memory.json`` …) are its rows.
tests/docs/test_figures.py holds that pages and pictures are what the files say.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from benchmarks import capacity, report
from benchmarks.measure import Row
from benchmarks.peers.environments import SAFETY
from benchmarks.report import number

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks/results"
PAGES: Final = tuple(ROOT / "docs" / name for name in ("benchmarks.md", "comparison.md", "faults.md", "scaling.md"))
IMAGES: Final = ROOT / "docs/images"
BLOCK: Final = re.compile(r"(?P<head><!-- figures: (?P<name>\w+) -->\n).*?(?P<tail><!-- /figures -->)", re.DOTALL)


class Measured(msgspec.Struct, kw_only=True):
    """One file of ``benchmarks/results``, as `benchmarks.report.as_json` writes it.

    Attributes:
        command: what repeats it.
        date: of the run.
        version: of streamworker, with its commit.
        machine: cores and processor.
        software: Python, the server and the packages that count.
        missing: contestants without figures, and why.
        rows: the figures.
    """

    command: str
    date: str
    version: str
    machine: str
    software: str
    missing: dict[str, str]
    rows: list[Row]


def measured(name: str, folder: Path = RESULTS) -> list[Measured]:
    """The files of one table: ``NAME.json`` and ``NAME-*.json``."""
    name = SOURCES.get(name, name)
    paths = [folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json"))]
    return [msgspec.json.decode(path.read_bytes(), type=Measured) for path in paths]


def table(name: str, folder: Path = RESULTS) -> str:
    """One table, and below it where each of its figures comes from."""
    files = measured(name, folder)
    lines = TABLES[name]([row for file in files for row in file.rows])
    lines += ["", *([] if name in ("scaling", "soak", "million") else ["Medians of all rounds.", ""])]
    for file in files:
        missing = "".join(f" Not measured: {who} ({why})." for who, why in file.missing.items())
        source = f"{file.version}, {file.software}; {file.machine}; {file.date}.{missing}"
        lines.append(f"- `{file.command}`: {source}")
    return "\n" + "\n".join(lines) + "\n\n"


def _bench(rows: Sequence[Row]) -> list[str]:
    """What was measured, beside what it is held against in the same run."""
    lines = ["| question | beside | streamworker | ratio | goal |", "|---|---|---|---|---|"]
    compared = {(row.question, row.versus) for row in rows}
    for row in rows:
        base, versus = list(row.against), row.versus
        others = [one for one in rows if one.question == row.question and one is not row]
        if not base and row.goal is not None and len(others) == 1 and others[0].goal is None:
            base, versus = others[0].values, others[0].what
        elif not base and ((row.question, row.what) in compared or (len(others) == 1 and others[0].goal is not None)):
            continue  # shown beside the row that is compared with it
        value = statistics.median(base) if base else None
        beside = "" if value is None else f"{versus} {_figure(value, row.unit)}"
        ratio = "" if not value else f"{row.value / value:.2f}"
        what = "" if row.what in ("worker", "enqueue", "enqueue_many", "ledger") else f", {row.what}"
        lines.append(f"| {row.question}{what} | {beside} | {_figure(row.value, row.unit)} | {ratio} | {_goal(row)} |")
    return lines


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    unit = "" if row.against and not row.absolute else row.unit
    return f"{'≤' if row.less else '≥'} {_figure(row.goal, unit)}" + ("" if row.holds else ": **missed**")


def _figure(value: float, unit: str) -> str:
    unit = {"us": "µs"}.get(unit, unit)
    return f"{number(value)}{'' if unit.startswith('/') or not unit else ' '}{unit}"


def _peers(rows: Sequence[Row]) -> list[str]:
    """A line for each contestant, the fastest first."""
    questions = list(dict.fromkeys(row.question for row in rows))
    lines = [f"| | {questions[0]}, /s | of the loop | " + " | ".join(f"{one}" for one in questions[1:]) + " | safety |"]
    lines.append("|---|---" + "|---" * len(questions) + "|---|")
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.what, {})[row.question] = row
    for name, figures in sorted(
        found.items(), key=lambda item: -item[1][questions[0]].value if questions[0] in item[1] else 0
    ):
        first = figures.get(questions[0])
        ratio = "" if first is None or first.ratio is None else f"{first.ratio:.2f}"
        cells = ["" if first is None else number(first.value), ratio]
        cells += [_figure(figures[one].value, figures[one].unit) if one in figures else "" for one in questions[1:]]
        cells.append(SAFETY["bare" if name == "bare loop" else name.split()[0]])
        mark = {"streamworker": "**", "bare loop": "*"}.get(name, "")
        lines.append("| " + " | ".join(f"{mark}{cell}{mark}" if cell else "" for cell in (name, *cells)) + " |")
    return lines


def _fleet(rows: Sequence[Row]) -> list[str]:
    """A line for each size of the fleet."""
    lines = ["| workers | connections | commands/s, those inside scripts included | CPU of Redis | memory of Redis |"]
    lines.append("|---|---|---|---|---|")
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.question, {})[row.what] = row
    for size, figures in found.items():
        cells = (
            f"{figures['clients'].value:,.0f}", number(figures["commands"].value),
            _figure(figures["cpu"].value, figures["cpu"].unit), _figure(figures["memory"].value, "MB"),
        )  # fmt: skip
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return lines


def _scaling(rows: Sequence[Row]) -> list[str]:
    """A line for each load and autoscaler."""
    names = ("in time", "p50", "p99", "worker-hours", "used", "changes")
    lines = ["| load | workers by | " + " | ".join(names) + " |", "|---|---" + "|---" * len(names) + "|"]
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        scaler, name = row.what.rsplit(": ", 1)
        found.setdefault((row.question, scaler), {})[name] = row
    for (shape, scaler), figures in found.items():
        cells = [_figure(figures[name].value, figures[name].unit) for name in names]
        mark = "**" if scaler == "slots" else ""
        lines.append(f"| {shape} | {mark}{scaler}{mark} | " + " | ".join(cells) + " |")
    return lines


def _soak(rows: Sequence[Row]) -> list[str]:
    """A line for each mode."""
    times = "recovery p50, p99, max | alone p50, p99, max"
    lines = [f"| mode | faults | jobs | runs repeated | {times} | lost | settles by lost claims |", "|---" * 8 + "|"]
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.question, {})[row.what] = row
    for mode, figures in found.items():
        cells = [
            ", ".join(number(figures[f"{what} {part}"].value) for part in ("p50", "p99", "max")) + " s"
            for what in ("recovery", "alone")
        ]
        counts = [f"{figures[what].value:,.0f}" for what in ("faults", "jobs", "repeated", "lost", "fence")]
        lines.append("| " + " | ".join((mode, *counts[:3], *cells, *counts[3:])) + " |")
    return lines


def _of_nodes(rows: Sequence[Row]) -> dict[tuple[int, str], dict[str, Row]]:
    """Rows of `benchmarks.nodes`, by the number of nodes and the load."""
    found: dict[tuple[int, str], dict[str, Row]] = {}
    for row in rows:
        nodes, load = row.question.split(", ")
        found.setdefault((int(nodes.split()[0]), load), {})[row.what] = row
    return found


def _samples(rows: Sequence[Row]) -> list[capacity.Sample]:
    """The runs that the model is fitted to. Single enqueues send another command than all else."""
    return [
        capacity.Sample(
            nodes=nodes, load=load, stored=load != "backlog", run=load != "in bulk", trips=row["trips"].value,
            producer_trips=row["producer trips"].value, redis=row["redis"].value, worker=row["worker"].value,
        )
        for (nodes, load), row in _of_nodes(rows).items()
        if load in {"in bulk", "backlog"} or load.endswith("/s")
    ]  # fmt: skip


def _nodes(rows: Sequence[Row]) -> list[str]:
    """A line for each number of nodes and load, and one for each number of nodes about idle workers."""
    samples = _samples(rows)
    prices = capacity.fit(samples)
    modelled = {(each.nodes, each.load): (prices.redis(each), prices.worker(each)) for each in samples}
    head = ["servers", "load", "round trips", "Redis", "by the model", "workers", "by the model", "producer", "network"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    found = _of_nodes(rows)
    for (nodes, load), row in found.items():
        if "producer" not in row:
            continue
        redis, worker = (_figure(each, "us") if each else "" for each in modelled.get((nodes, load), (0.0, 0.0)))
        cells = [
            str(nodes), load, number(row["trips"].value), _spread(row["redis"]), redis, _spread(row["worker"]), worker,
            _figure(row["producer"].value, "us") if row["producer"].value else "", _figure(row["bytes"].value, "B"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    head = ["servers", "an idle worker: round trips", "Redis", "the worker", "connections to the first, to each other"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (nodes, load), row in found.items():
        if load == "idle":
            first, *others = (number(each.value) for each in found[nodes, "connections"].values())
            cells = [
                str(nodes), f"{number(row['trips'].value)}/s", f"{row['redis'].value / 1000:.2g} ms/s",
                f"{row['worker'].value / 1000:.2g} ms/s", ", ".join([first, *others[:1]]),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(row: Row) -> str:
    """The median, and the lowest and the highest value."""
    if not row.value:
        return ""
    return f"{_figure(row.value, row.unit)} ({number(min(row.values))} to {number(max(row.values))})"


RATE: Final = 1_000_000
USED: Final = 0.7
"""Share of a core that is planned with."""


def _scenarios(rows: Sequence[Row]) -> dict[str, tuple[float, capacity.Producers, float, float | None]]:
    """By name: round trips of workers for a job, producers, their microseconds, and its bytes where they are known."""
    found = _of_nodes(rows)
    last = max(nodes for nodes, _ in found)
    bulk, single, backlog = (found[last, load] for load in ("in bulk", "one by one", "backlog"))
    full, many, each = backlog["trips"].value, bulk["producer"].value, single["producer"].value
    one = capacity.Producers(1, single["redis"].value)
    return {
        "full batches": (full, capacity.Producers(), many, bulk["bytes"].value + backlog["bytes"].value),
        "ten jobs a round trip": (0.1, capacity.Producers(), many, None),
        "one job a round trip": (1.0, capacity.Producers(), many, None),
        "full batches, enqueued one by one": (full, one, each, single["bytes"].value + backlog["bytes"].value),
    }


def _million(rows: Sequence[Row]) -> list[str]:
    """The prices, how well they fit, and what a million jobs a second take."""
    samples, found = _samples(rows), _of_nodes(rows)
    prices = capacity.fit(samples)
    off = max(abs(prices.redis(each) / each.redis - 1) for each in samples)
    worker_off = max(abs(prices.worker(each) / each.worker - 1) for each in samples if each.run)
    each_other = list(found[max(nodes for nodes, _ in found), "connections"].values())[-1].value
    head = ["claims find", "Redis", "servers", "a worker", "worker processes", "cores of producers"]
    head += ["connections to a server", "network of a server"]
    us = {name: _figure(getattr(prices, name), "us") for name in prices.__struct_fields__}
    lines = [
        "| | a job stored | a job run | each round trip | largest error |",
        "|---|---|---|---|---|",
        f"| Redis, all servers together | {us['stored']} | {us['run']} | {us['call']} | {100 * off:.0f} % |",
        f"| a worker | | {us['job']} | {us['trip']} | {100 * worker_off:.0f} % |",
        "",
        f"{RATE:,} jobs/s, with {100 * USED:.0f} % of each core used:",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for name, (trips, producers, produced, sent) in _scenarios(rows).items():
        needs = capacity.required(prices, RATE, trips, producers, used=USED)
        network = "" if sent is None else f"{sent * 8 * RATE / needs.nodes / 1e6:,.0f} Mbit/s"
        cells = [
            name, _figure(needs.redis, "us"), str(needs.nodes), _figure(needs.worker, "us"), str(needs.workers),
            f"{RATE * produced / 1e6 / USED:.0f}", f"{needs.workers * each_other:,.0f}", network,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


PICTURES: Final = ("throughput", "peers", "scaling", "nodes")
SOURCES: Final = {"million": "nodes"}
"""The files of a table that is not called as they are."""
TABLES: Final[Mapping[str, Callable[[Sequence[Row]], list[str]]]] = {
    "bench": _bench, "peers": _peers, "fleet": _fleet, "scaling": _scaling, "soak": _soak, "nodes": _nodes,
    "million": _million,
}  # fmt: skip


def drawn(text: str, folder: Path = RESULTS) -> str:
    """A page with its tables as the files say."""
    return BLOCK.sub(lambda found: f"{found['head']}{table(found['name'], folder)}{found['tail']}", text)


def picture(name: str, folder: Path = RESULTS) -> str:
    """``throughput``, ``peers``, ``scaling`` or ``nodes``, drawn from the files."""
    if name == "nodes":
        (file,) = measured("nodes", folder)
        return _capacity(file)
    if name == "scaling":
        return _curves(msgspec.json.decode((folder / "scaling.json").read_bytes(), type=Simulated))
    file = measured({"throughput": "bench"}.get(name, name), folder)[0]
    rows = file.rows
    title = "One worker process on one core, a hundred jobs at once"
    if name == "throughput":
        rows = [row for row in rows if row.question in ("no-op jobs", "jobs of 10 ms")]
        title = "streamworker, one worker process on one core, Redis on another"
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "picture.svg"
        report.as_svg(rows, path, f"{title} ({file.date})", file.missing)
        return path.read_text(encoding="utf-8")


class Curve(msgspec.Struct):
    """Workers, and the longest wait, over equal parts of the time; as `benchmarks.scaling.Curve`."""

    shape: str
    scaler: str
    seconds: int
    workers: list[float]
    waits: list[float]


class Simulated(Measured, kw_only=True):
    """The file of `benchmarks.scaling`.

    Attributes:
        curves: of each load and autoscaler.
        loads: what each load is, in words.
        wait: the target wait, in seconds.
    """

    curves: list[Curve]
    loads: dict[str, str]
    wait: float


COLOURS: Final = (report.BAR, "#2c6fbb", "#8a949e")
"""Of autoscalers, in their order."""
_LEFT, _WIDE, _HIGH, _ROW = (50, 430), 310, 84, 136
"""Of a panel: its left edges, width and height; and the height of a row of two panels."""


def _curves(file: Simulated) -> str:
    """Workers on the left, the longest waits on the right: a row for each load."""
    scalers = list(dict.fromkeys(curve.scaler for curve in file.curves))
    lines = []
    for n, scaler in enumerate(scalers):
        lines.append(f'<rect x="{50 + 200 * n}" y="34" width="14" height="4" fill="{COLOURS[n]}"/>')
        lines.append(f'<text x="{70 + 200 * n}" y="40">{escape(scaler)}</text>')
    y = 66
    for shape, words in file.loads.items():
        curves = [curve for curve in file.curves if curve.shape == shape]
        lines.append(f'<text x="16" y="{y}" font-weight="600">{escape(f"{shape}: {words}")}</text>')
        workers, waits = [curve.workers for curve in curves], [curve.waits for curve in curves]
        lines += _panel(_LEFT[0], y + 10, workers, "workers", None)
        lines += _panel(_LEFT[1], y + 10, waits, "wait, s", file.wait)
        y += _ROW
    body, width = "\n".join(lines), report.WIDTH
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y - 20}" viewBox="0 0 {width} {y - 20}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{report.INK}">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f'<text x="16" y="22" font-size="15" font-weight="600">Workers, and the longest wait, simulated '
        f"({file.date})</text>\n{body}\n</svg>\n"
    )


def _panel(x: int, y: int, curves: Sequence[Sequence[float]], unit: str, goal: float | None) -> list[str]:
    """A few curves over the same time, and perhaps a line that they should not cross."""
    top = max(1.0, goal or 0.0, *(max(curve) for curve in curves))
    lines = [
        f'<path d="M{x} {y}V{y + _HIGH}H{x + _WIDE}" fill="none" stroke="{report.FADED}"/>',
        f'<text x="{x - 6}" y="{y + 10}" text-anchor="end">{number(top)}</text>',
        f'<text x="{x - 6}" y="{y + _HIGH}" text-anchor="end">0</text>',
        f'<text x="{x + _WIDE}" y="{y + _HIGH + 14}" text-anchor="end">{escape(unit)}</text>',
    ]
    if goal is not None:
        at = y + _HIGH * (1 - goal / top)
        lines.append(f'<path d="M{x} {at:.1f}H{x + _WIDE}" stroke="{report.INK}" stroke-dasharray="4 4"/>')
    for curve, colour in reversed(list(zip(curves, COLOURS, strict=True))):
        step = _WIDE / (len(curve) - 1)
        points = " ".join(f"{x + n * step:.1f},{y + _HIGH * (1 - value / top):.1f}" for n, value in enumerate(curve))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return lines


STYLE: Final = (
    "<style>text{fill:#24292f}.paper{fill:#fff}.axis{stroke:#b8c0c8}.redis{stroke:#c0392b}.worker{stroke:#2c6fbb}"
    ".other{stroke:#8a949e}.goal{stroke:#24292f}.axis,.line,.goal{fill:none}.dot{stroke-width:2}"
    "circle.redis{fill:#c0392b}circle.worker{fill:#2c6fbb}"
    "@media(prefers-color-scheme:dark){text{fill:#d6dbe1}.paper{fill:#1e2129}.axis{stroke:#4a525c}.goal{stroke:#d6dbe1}"
    ".redis{stroke:#ef7d6d}.worker{stroke:#74aef0}circle.redis{fill:#ef7d6d}circle.worker{fill:#74aef0}}</style>"
)


class Axis(NamedTuple):
    """A logarithmic axis.

    Attributes:
        at: pixel of its low end.
        length: pixels; negative upwards.
        low: value at its low end.
        high: value at its other end.
    """

    at: int
    length: int
    low: float
    high: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.at + self.length * math.log(value / self.low) / math.log(self.high / self.low)

    def powers(self) -> list[float]:
        """The powers of ten on it."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return [10.0**power for power in range(first, last + 1)]


def _capacity(file: Measured) -> str:
    """Measured and modelled microseconds on the left; what so many servers can do on the right."""
    samples = _samples(file.rows)
    prices = capacity.fit(samples)
    top, high, width = 74, 250, report.WIDTH
    title = f"A queue over several servers: what a job costs, and what that allows ({file.date})"
    lines = [
        f'<text x="16" y="22" font-size="15" font-weight="600">{title}</text>',
        '<text x="50" y="50" font-weight="600">CPU of a job, µs: measured over the model</text>',
        '<text x="430" y="50" font-weight="600">jobs/s over servers: model, measured</text>',
    ]
    x, y = Axis(50, 300, 1, 1000), Axis(top + high, -high, 1, 1000)
    lines += _axes(x, y, lambda value: f"{value:,.0f}")
    lines.append(f'<path class="goal" d="M{x(1):.0f} {y(1):.0f}L{x(1000):.0f} {y(1000):.0f}" stroke-dasharray="4 4"/>')
    for each in samples:
        for kind, spent, by_model in (
            ("redis", each.redis, prices.redis(each)),
            ("worker", each.worker, prices.worker(each)),
        ):
            if spent:
                lines.append(f'<circle class="dot {kind}" cx="{x(by_model):.1f}" cy="{y(spent):.1f}" r="3"/>')
    for n, (kind, words) in enumerate((("redis", "Redis, all servers together"), ("worker", "workers"))):
        lines.append(f'<circle class="dot {kind}" cx="68" cy="{top + 16 + 18 * n}" r="3"/>')
        lines.append(f'<text x="78" y="{top + 20 + 18 * n}">{words}</text>')
    x, y = Axis(430, 300, 1, 256), Axis(top + high, -high, 5_000, 10_000_000)
    lines += _axes(x, y, lambda value: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1000:,.0f} k")
    lines.append(f'<path class="goal" d="M{x(1):.0f} {y(RATE):.1f}H{x(256):.0f}" stroke-dasharray="4 4"/>')
    for n, (name, (trips, producers, _, _)) in enumerate(_scenarios(file.rows).items()):
        at = [(nodes, capacity.most(prices, nodes, trips, producers, used=USED)) for nodes in (2**k for k in range(9))]
        points = " ".join(f"{x(nodes):.1f},{y(rate):.1f}" for nodes, rate in at if y.low <= rate <= y.high)
        kind, dashes = ("redis", "") if n == 0 else ("other", f' stroke-dasharray="{("8 3", "2 3", "6 3 2 3")[n - 1]}"')
        lines.append(f'<polyline class="line {kind}" points="{points}" stroke-width="1.5"{dashes}/>')
        left, below = (50, 180, 350, 520)[n], top + high + 48
        lines.append(f'<path class="line {kind}" d="M{left} {below}h24" stroke-width="1.5"{dashes}/>')
        lines.append(f'<text x="{left + 28}" y="{below + 4}" font-size="11">{escape(name)}</text>')
    found = _of_nodes(file.rows)
    for nodes in dict.fromkeys(nodes for nodes, _ in found):
        spent = sum(found[nodes, load]["redis"].value for load in ("in bulk", "backlog"))
        lines.append(f'<circle class="dot redis" cx="{x(nodes):.1f}" cy="{y(nodes * USED * 1e6 / spent):.1f}" r="3"/>')
    body, bottom = "\n".join(lines), top + high + 66
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom}" viewBox="0 0 {width} {bottom}" '
        f'font-family="system-ui, sans-serif" font-size="12">\n{STYLE}\n'
        f'<rect class="paper" width="100%" height="100%"/>\n'
        f"{body}\n</svg>\n"
    )


def _axes(x: Axis, y: Axis, words: Callable[[float], str]) -> list[str]:
    """The frame of a panel with logarithmic axes."""
    lines = [f'<path class="axis" d="M{x.at} {y.at + y.length}V{y.at}H{x.at + x.length}"/>']
    for value in y.powers():
        lines.append(f'<path class="axis" d="M{x.at} {y(value):.1f}h4"/>')
        lines.append(
            f'<text x="{x.at - 6}" y="{y(value) + 4:.1f}" text-anchor="end" font-size="11">{words(value)}</text>'
        )
    for value in x.powers():
        lines.append(f'<path class="axis" d="M{x(value):.1f} {y.at}v-4"/>')
        lines.append(
            f'<text x="{x(value):.1f}" y="{y.at + 16}" text-anchor="middle" font-size="11">{value:,.0f}</text>'
        )
    return lines


def main() -> int:
    """Draw all of them."""
    made = {page: drawn(page.read_text(encoding="utf-8")) for page in PAGES}
    made |= {IMAGES / f"{name}.svg": picture(name) for name in PICTURES}
    for path, text in made.items():
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'drawn anew' if changed else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
