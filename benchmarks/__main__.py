"""All questions in one run: ``./dev bench [QUESTION …] [--rounds N] [--scale X] [--json FILE] [--svg FILE]``.

``./dev bench guard [BASE]`` compares this checkout with a commit instead, see `benchmarks.guard`.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from benchmarks import guard, measure, report
from benchmarks.measure import Row

QUESTIONS = (
    "throughput", "cost", "enqueueing", "latency", "ledger", "transactions", "concurrency", "modes", "processes",
    "idle", "recovery", "flow", "flows", "history", "emission", "profile",
)  # fmt: skip
LONG = ("memory",)


def main() -> int:
    """Ask, and tell; 1 if a goal is missed."""
    if sys.argv[1:2] == ["guard"]:
        return guard.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS + LONG)}")
    measure.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--svg", type=Path, help="draw the picture into this file")
    arguments = parser.parse_args()
    unknown = set(arguments.questions) - set(QUESTIONS + LONG)
    if unknown:
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    measure.quiet()
    rows: list[Row] = []
    for name in arguments.questions or QUESTIONS:
        print(f"{name} …", file=sys.stderr)
        rows += measure.ask(import_module(f"benchmarks.{name}").ask, measure.options_of(arguments))
    report.table(rows)
    if arguments.json:
        report.as_json(rows, arguments.json, command="./dev bench")
    if arguments.svg:
        report.as_svg(rows, arguments.svg, "streamworker, one worker process on one core, Redis on another")
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
