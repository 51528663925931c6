"""Runs as values PostgreSQL can store. Text holds no NUL and no lone surrogate, and jsonb less than JSON."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID, uuid5

import msgspec

from streamworker.codec import FIRST_MOMENT, LAST_MOMENT

_NAMESPACE: Final = UUID("0b1d2e3c-7f55-5b0e-8a41-3f2f6c1b9d10")
_encode = msgspec.json.encode
_NO_JSONB: Final = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
# What looks like that and is none: an escaped backslash before a "u", and both halves of a pair.
_HARMLESS: Final = re.compile(r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_ODD: Final = re.compile("[\x00\ud800-\udfff]")
SEPARATOR: Final = "\x1f"
"""Joins many texts into one, which costs a tenth of an array: neither JSON nor any sane id contains it."""


def text(value: str) -> str:
    """The text, with what PostgreSQL cannot hold written as escapes."""
    if value.isascii() and "\x00" not in value:
        return value
    return _ODD.sub(lambda match: f"\\u{ord(match.group()):04x}", value)


def stored_id(job_id: str) -> str:
    """The id a job is stored under: its own, or for one that text cannot hold the UUIDv5 of it."""
    if "\x00" in job_id:
        return str(uuid5(_NAMESPACE, job_id))
    return job_id


def separable(joined: str, count: int) -> bool:
    """Whether ``count`` texts that were joined with `SEPARATOR` can be taken apart again, and stored."""
    return joined.count(SEPARATOR) == count - 1 and "\x00" not in joined


def json_text(raw: msgspec.Raw | bytes | None) -> str | None:
    """JSON as text for jsonb; ``None`` for what jsonb refuses as far as can be told cheaply."""
    if raw is None:
        return None
    try:
        written = str(raw, "utf-8")
    except UnicodeDecodeError:
        return None
    return None if refused_by_jsonb(written) else written


def refused_by_jsonb(written: str) -> bool:
    """Whether JSON text holds the escape of a NUL, or of half a surrogate pair."""
    if "\\u" not in written or _NO_JSONB.search(written) is None:
        return False
    return _NO_JSONB.search(_HARMLESS.sub(".", written)) is not None


def headers_text(headers: dict[str, Any] | None) -> str | None:
    """The headers as text for jsonb, or ``None``."""
    return json_text(_encode(headers)) if headers else None


def within_python(column: str) -> str:
    """SQL for a column of times, moved to `codec.FIRST_MOMENT` or `codec.LAST_MOMENT` where Python has no such time."""
    early, late = (
        f"timestamptz '{datetime.fromtimestamp(moment, UTC).isoformat()}'" for moment in (FIRST_MOMENT, LAST_MOMENT)
    )
    return f"case when {column} < {early} then {early} when {column} > {late} then {late} else {column} end"
