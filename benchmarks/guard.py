"""Did this checkout become slower than a base commit? ``./dev bench guard [BASE] [QUESTION …] [--pairs N]``.

Both are measured in turns, each in processes of its own, so that a noisy machine is noisy for both. A figure counts as
slower if its median is worse by more than the scatter of either side: half of the distance between their quartiles, and
at least three percent. The base runs with this checkout's installed packages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[1]
QUESTIONS = ("throughput", "cost", "enqueueing")
LEAST = 0.03
"""Share of the base's median below which nothing is a difference."""
Key: TypeAlias = tuple[str, str, str]
Figures: TypeAlias = dict[Key, list[float]]


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print what became slower; 1 if anything did."""
    parser = argparse.ArgumentParser(prog="./dev bench guard", description=__doc__)
    parser.add_argument("base", nargs="?", default="HEAD~1", help="commit to compare with (default: %(default)s)")
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), help=f"default: {' '.join(QUESTIONS)}")
    parser.add_argument("--pairs", type=int, default=5, help="turns of both sides (default: %(default)s)")
    parser.add_argument("--scale", default="1", help="multiplies the number of jobs")
    options = parser.parse_args(arguments)
    before: Figures = {}
    now: Figures = {}
    less: dict[Key, bool] = {}
    with tempfile.TemporaryDirectory(prefix="streamworker-guard-") as folder:
        base = Path(folder, "base")
        add = ["git", "-C", ROOT, "worktree", "add", "-q", "--detach", base, options.base]
        made = subprocess.run(add, capture_output=True, text=True, check=False)
        if made.returncode:
            raise SystemExit(
                f"{options.base} cannot be checked out ({made.stderr.strip()}): name a commit of this checkout"
            )
        try:
            for number in range(options.pairs):
                sides = [(base, before), (ROOT, now)]
                for root, figures in sides if number % 2 == 0 else sides[::-1]:
                    less |= measured(root, options.questions, options.scale, Path(folder, "out.json"), figures)
                print(f"  pair {number + 1} of {options.pairs}", file=sys.stderr)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", base], check=True)
    slower = compared(before, now, less)
    for line in table(before, now, slower):
        print(line)
    return int(bool(slower))


def measured(root: Path, questions: list[str], scale: str, out: Path, figures: Figures) -> dict[Key, bool]:
    """Ask one side once, and add its figures; for each of them whether less is better."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", *questions, "--rounds", "1", "--scale", scale]
    environment = os.environ | {"PYTHONPATH": str(root)}
    # A goal that is missed is no error here.
    done = subprocess.run([*command, "--json", out], cwd=root, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, 1) or not out.exists():
        raise SystemExit(f"the benchmarks of {root} did not run (exit {done.returncode}): see above")
    rows = json.loads(out.read_text())["rows"]
    out.unlink()
    found: dict[Key, bool] = {}
    for row in rows:
        key = row["question"], row["what"], row["unit"]
        figures.setdefault(key, []).extend(row["values"])
        found[key] = bool(row.get("less")) or row["unit"] in {"us", "ms", "s", "MB"}
    return found


def compared(before: Figures, now: Figures, less: Mapping[Key, bool]) -> dict[Key, float]:
    """Figures that became worse by more than noise, and by which share of the base's median."""
    slower: dict[Key, float] = {}
    for key in before.keys() & now.keys():
        old, new = statistics.median(before[key]), statistics.median(now[key])
        if not old or "bare" in key[1]:
            continue
        change = (new - old) / old if less[key] else (old - new) / old
        noise = max(LEAST, (scatter(before[key]) + scatter(now[key])) / 2 / old)
        if change > noise:
            slower[key] = change
    return slower


def scatter(values: list[float]) -> float:
    """The distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def table(before: Figures, now: Figures, slower: Mapping[Key, float]) -> list[str]:
    """A line a figure, the slower ones marked."""
    lines = [f"{'':34}{'what':22}{'base':>12}{'now':>12}{'now/base':>10}"]
    for key in sorted(before.keys() & now.keys()):
        old, new = statistics.median(before[key]), statistics.median(now[key])
        mark = f"  SLOWER by {slower[key]:.0%}" if key in slower else ""
        share = f"{new / old:.3f}" if old else ""
        lines.append(f"{key[0]:34}{key[1]:22}{old:12,.4g}{new:12,.4g}{share:>10}{mark}")
    verdict = f"{len(slower)} figures became slower by more than noise" if slower else "nothing became slower"
    return [*lines, f"guard: {verdict}"]
