"""The trace a job belongs to, as its headers tell it: W3C Trace Context, https://www.w3.org/TR/trace-context/."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

HEADER: Final = "traceparent"
_FORM: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


def trace_id(headers: Mapping[str, Any] | None) -> str | None:
    """The trace's id; ``None`` without a ``traceparent`` that holds one."""
    value = headers.get(HEADER) if headers else None
    found = _FORM.fullmatch(value) if isinstance(value, str) else None
    return found.group(1) if found else None
