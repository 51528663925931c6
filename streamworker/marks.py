"""The mark of list mode: what a list's element remembers of having been taken and given back.

It is put in front of an object's own fields, textually, so that all other bytes stay what the producer wrote::

    {"streamworker":{"id":"0198…","deliveries":2},"payload":…}

Lua writes and takes off the same text (broker/lua/list_return.lua, list_take.lua); readers of a document find the mark
as a field, also where a bridge moved the element into a stream.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

MOST: Final = 10**6
"""More deliveries than this are no count of ours."""
_MARKED: Final = re.compile(rb'(\s*\{)"streamworker":\{"id":"([0-9A-Fa-f-]{36})","deliveries":(\d{1,6})\},')


class Mark(NamedTuple):
    """The id a job was given when it was first taken, and how often it was delivered."""

    id: str
    deliveries: int


def mark_of(value: Any) -> Mark | None:
    """The mark in a document's field ``streamworker``; ``None`` for whatever else somebody may write there."""
    if not isinstance(value, dict):
        return None
    name, deliveries = value.get("id"), value.get("deliveries")
    if not isinstance(name, str) or not 0 < len(name) <= 36 or type(deliveries) is not int:
        return None
    return Mark(name, deliveries) if 0 <= deliveries <= MOST else None


def unmarked(element: bytes) -> tuple[bytes, Mark | None]:
    """The bytes as the producer wrote them, and the mark in front of them if there is one."""
    match = _MARKED.match(element)
    if match is None:
        return element, None
    return match[1] + element[match.end() :], Mark(match[2].decode(), int(match[3]))
