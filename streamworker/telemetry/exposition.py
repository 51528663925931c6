"""Metrics as text that Prometheus reads, https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).

Pure. The sizes are plain numbers that their owners keep as they like; only asking costs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Family(msgspec.Struct, frozen=True):
    """One metric: its name, its type and its labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """Of a histogram: upper bounds of its buckets, rising; the last bucket, up to infinity, is not named."""


class Histogram:
    """A histogram's numbers."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


Numbers = Mapping[tuple[str, ...], float | Histogram]
"""Values of the labels, in the order of `Family.labels`, to what is measured."""


def render(families: Iterable[tuple[Family, Numbers]]) -> bytes:
    """The text of a scrape. A metric without numbers is named all the same, so that queries find it."""
    lines: list[str] = []
    for family, numbers in families:
        lines += (f"# HELP {family.name} {_escaped(family.help)}", f"# TYPE {family.name} {family.kind}")
        for values, number in numbers.items():
            pairs = zip(family.labels, values, strict=True)
            labels = [f'{name}="{_escaped(value, quote=True)}"' for name, value in pairs]
            if isinstance(number, Histogram):
                lines += _histogram(family, labels, number)
            else:
                lines.append(f"{family.name}{_braced(labels)} {_number(number)}")
    return ("\n".join(lines) + "\n").encode()


def _histogram(family: Family, labels: list[str], tally: Histogram) -> Iterable[str]:
    below = 0
    counts, total = list(tally.counts), tally.total
    for bound, count in zip((*family.bounds, math.inf), counts, strict=True):
        below += count
        edge = f'le="{_number(bound)}"'
        yield f"{family.name}_bucket{_braced([*labels, edge])} {below}"
    yield f"{family.name}_sum{_braced(labels)} {_number(total)}"
    yield f"{family.name}_count{_braced(labels)} {below}"


def _braced(labels: Sequence[str]) -> str:
    return "{" + ",".join(labels) + "}" if labels else ""


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text
