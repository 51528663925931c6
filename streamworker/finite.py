"""NaN and the infinities: floats that JSON has no word for, and that its encoders write as null without a word."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec


def infinity_in(value: Any) -> str | None:
    """Where something that was written as JSON holds NaN or an infinity: ``.field[0]``; ``None`` if it holds none."""
    try:
        value = msgspec.to_builtins(value)
    except Exception:  # noqa: BLE001 - it holds JSON as it is, or an object of a user's
        value = msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else value
    return next(_infinities(value, ""), None)


def _infinities(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _infinities(each, f"{path}.{name}")
    elif isinstance(value, list | tuple | set | frozenset):
        for number, each in enumerate(value):
            yield from _infinities(each, f"{path}[{number}]")
