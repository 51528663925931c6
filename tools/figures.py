"""Draws measured figures into the pages and pictures that show them: ``./dev figures``.

The figures are the files in ``benchmarks/results``, which ``./dev bench``, ``bench-peers`` and ``bench-fleet`` write
with ``--json``. A page names a table between two comments, ``<!-- figures: bench -->`` and ``<!-- /figures -->``; all
files of that name (``bench.json``, ``bench-memory.json`` …) are its rows. tests/docs/test_figures.py holds that pages
and pictures are what the files say.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from benchmarks import report
from benchmarks.measure import Row
from benchmarks.report import number

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks/results"
PAGES: Final = tuple(ROOT / "docs" / name for name in ("benchmarks.md", "comparison.md", "scaling.md"))
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
    paths = [folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json"))]
    return [msgspec.json.decode(path.read_bytes(), type=Measured) for path in paths]


def table(name: str, folder: Path = RESULTS) -> str:
    """One table, and below it where each of its figures comes from."""
    files = measured(name, folder)
    lines = TABLES[name]([row for file in files for row in file.rows])
    lines += ["", "Medians of all rounds.", ""]
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
    unit = "" if row.against else row.unit
    return f"{'≤' if row.less else '≥'} {_figure(row.goal, unit)}" + ("" if row.holds else ": **missed**")


def _figure(value: float, unit: str) -> str:
    unit = {"us": "µs"}.get(unit, unit)
    return f"{number(value)}{'' if unit.startswith('/') or not unit else ' '}{unit}"


def _peers(rows: Sequence[Row]) -> list[str]:
    """A line for each contestant, the fastest first."""
    questions = list(dict.fromkeys(row.question for row in rows))
    lines = [f"| | {questions[0]}, /s | of the loop | " + " | ".join(f"{one}" for one in questions[1:]) + " |"]
    lines.append("|---|---" + "|---" * len(questions) + "|")
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


TABLES: Final[Mapping[str, Callable[[Sequence[Row]], list[str]]]] = {"bench": _bench, "peers": _peers, "fleet": _fleet}


def drawn(text: str, folder: Path = RESULTS) -> str:
    """A page with its tables as the files say."""
    return BLOCK.sub(lambda found: f"{found['head']}{table(found['name'], folder)}{found['tail']}", text)


def picture(name: str, folder: Path = RESULTS) -> str:
    """``throughput`` or ``peers``, drawn from the files."""
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


def main() -> int:
    """Draw all of them."""
    made = {page: drawn(page.read_text(encoding="utf-8")) for page in PAGES}
    made |= {IMAGES / f"{name}.svg": picture(name) for name in ("throughput", "peers")}
    for path, text in made.items():
        changed = path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'drawn anew' if changed else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
