"""What all questions share: taking turns, medians, ratios, and the way they are asked from the command line."""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import structlog
import uvloop

from benchmarks.server import server

Contestant: TypeAlias = Callable[[], Awaitable[float]]


class Options(msgspec.Struct, frozen=True):
    """How long to look.

    Attributes:
        rounds: measurements of each contestant; medians are told.
        scale: multiplies the number of jobs; below 1 for a quick look.
    """

    rounds: int = 5
    scale: float = 1.0

    def jobs(self, number: int) -> int:
        """So many jobs at this scale, never fewer than a thousand."""
        return max(min(1000, number), int(number * self.scale))


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table: what was measured, and what it is held against.

    Attributes:
        question: the file that asked.
        what: what was measured, in a few words.
        unit: of ``values`` and ``against``.
        values: one a round.
        against: of the contestant it is compared with, in the same rounds; empty if the value itself is judged.
        versus: who that was.
        goal: what the ratio (or, without ``against``, the value) shall reach.
        less: smaller is better.
        absolute: the value itself is judged, although it is compared.
    """

    question: str
    what: str
    unit: str
    values: list[float]
    against: list[float] = []
    versus: str = ""
    goal: float | None = None
    less: bool = False
    absolute: bool = False

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """Median over median."""
        return self.value / statistics.median(self.against) if self.against else None

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached; ``None`` without a goal."""
        if self.goal is None:
            return None
        judged = self.value if self.ratio is None or self.absolute else self.ratio
        return judged <= self.goal if self.less else judged >= self.goal


Ask: TypeAlias = Callable[[str, Options], Awaitable[list[Row]]]


async def take_turns(rounds: int, contestants: Mapping[str, Contestant], unit: str = "/s") -> dict[str, list[float]]:
    """Measure each contestant once a round, so that a noisy machine is noisy for all of them."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, contestant in contestants.items():
            gc.collect()
            figures[name].append(await contestant())
        told = ", ".join(f"{name} {values[-1]:,.4g}{unit}" for name, values in figures.items())
        print(f"  round {number + 1}: {told}", file=sys.stderr)
    return figures


def quiet() -> None:
    """No log lines below warnings."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def options_of(arguments: argparse.Namespace) -> Options:
    """From what `arguments_of` added."""
    return Options(rounds=arguments.rounds, scale=arguments.scale)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options every question takes."""
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contestant (medians are told)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of jobs")


def ask(question: Ask, options: Options) -> list[Row]:
    """Ask one question with a fresh server of its own."""
    with server() as url:
        return uvloop.run(question(url, options))  # type: ignore[arg-type]


def main(question: Ask, about: str | None) -> None:
    """Run one question as a program."""
    from benchmarks.report import table  # noqa: PLC0415 - the report draws tables of questions

    parser = argparse.ArgumentParser(description=about)
    add_arguments(parser)
    quiet()
    begun = time.perf_counter()
    rows = ask(question, options_of(parser.parse_args()))
    table(rows)
    print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)


def rows_of(
    question: str, unit: str, figures: Mapping[str, Sequence[float]], reference: str, **goals: Any
) -> list[Row]:
    """A row for each contestant, held against the one named ``reference``."""
    base = list(figures[reference])
    return [
        Row(question=question, what=name, unit=unit, values=list(values))
        if name == reference
        else Row(
            question=question,
            what=name,
            unit=unit,
            values=list(values),
            against=base,
            versus=reference,
            goal=goals.get(name),
        )
        for name, values in figures.items()
    ]
