"""Rows as a table for people, JSON for machines, and a picture for the docs."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Row
from benchmarks.server import binary

OURS = ("worker", "streamworker", "enqueue", "enqueue_many", "stream", "list", "ledger", "ctx.transaction()")
"""What is drawn in colour, beside what it is compared with."""
INK, BAR, FADED, WIDTH = "#24292f", "#c0392b", "#b8c0c8", 760


def table(rows: Sequence[Row]) -> None:
    """Print the rows."""
    drawn = Table(box=None, pad_edge=False)
    for name, justify in (
        ("question", "left"),
        ("what", "left"),
        ("median", "right"),
        ("ratio", "right"),
        ("versus", "left"),
        ("goal", "right"),
    ):
        drawn.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        goal = "" if row.goal is None else f"{'<=' if row.less else '>='} {row.goal:,g} {'yes' if row.holds else 'NO'}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        drawn.add_row(row.question, row.what, f"{number(row.value)} {row.unit}", ratio, row.versus, goal)
    Console(width=150).print(drawn)


def number(value: float) -> str:
    """Three or more digits that matter, with separators."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def as_json(rows: Sequence[Row], path: Path, missing: Mapping[str, str] | None = None, *, command: str) -> None:
    """Write the rows with how, when and on what they were measured, and who could not be measured and why.

    Args:
        rows: the figures, every round of them.
        path: the file; those in ``benchmarks/results`` are drawn into the pages by ``./dev figures``.
        missing: contestants without figures, and the reason.
        command: the recipe that ran, such as ``./dev bench``; its arguments are added.
    """
    document = {
        "command": shlex.join([*command.split(), *_arguments()]),
        "date": datetime.now(UTC).date().isoformat(),
        "version": f"streamworker {version('streamworker')} ({_commit()})",
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "software": _software(),
        "missing": dict(missing or {}),
        "rows": [{**msgspec.to_builtins(row), "median": row.value, "ratio": row.ratio} for row in rows],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def _arguments() -> list[str]:
    """The arguments that change a figure: where it is written does not."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in ("--json", "--svg"):
            next(words, None)
        elif not word.startswith(("--json=", "--svg=")):
            kept.append(word)
    return kept


def _software() -> str:
    server = subprocess.run([binary(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+) server v=([\d.]+)", server)
    packages = [f"{name} {version(name)}" for name in ("redis", "hiredis", "uvloop", "msgspec")]
    return ", ".join([f"Python {platform.python_version()}", f"{found[1]} {found[2]}" if found else "", *packages])


def _commit() -> str:
    """The commit that was measured, with a mark if the checkout differs from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "no checkout"


def _processor() -> str:
    """The name of the processor, as Linux gives it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def as_svg(rows: Sequence[Row], path: Path, title: str, missing: Mapping[str, str] | None = None) -> None:
    """Draw horizontal bars: one group a question, the longest bar of a group is its largest median."""
    lines: list[str] = []
    y = 44
    for question in dict.fromkeys(row.question for row in rows):
        group = [row for row in rows if row.question == question]
        largest = max(row.value for row in group) or 1.0
        lines.append(f'<text x="16" y="{y}" font-weight="600">{escape(question)} ({escape(group[0].unit)})</text>')
        y += 10
        for row in group:
            width = max(1.0, 360 * row.value / largest)
            fill = BAR if row.what in OURS else FADED
            told = number(row.value) + ("" if row.ratio is None else f"  ({row.ratio:.2f} of {row.versus})")
            lines.append(f'<text x="230" y="{y + 14}" text-anchor="end">{escape(row.what)}</text>')
            lines.append(f'<rect x="240" y="{y + 3}" width="{width:.0f}" height="14" rx="2" fill="{fill}"/>')
            lines.append(f'<text x="{246 + width:.0f}" y="{y + 14}">{escape(told)}</text>')
            y += 20
        y += 24
    for name, trouble in (missing or {}).items():
        lines.append(f'<text x="16" y="{y}">not measured: {escape(name)} ({escape(trouble)})</text>')
        y += 20
    body = "\n".join(lines)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f'<text x="16" y="22" font-size="15" font-weight="600">{escape(title)}</text>\n{body}\n</svg>\n'
    )
