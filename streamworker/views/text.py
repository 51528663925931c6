"""Numbers and foreign text as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from streamworker.redact import clean as printable

__all__ = ["age", "moment", "printable", "size"]


def age(seconds: float | None) -> str:
    """Seconds in two units at most: ``0.3s``, ``42s``, ``5m 03s``, ``3h 20m``, ``2d 04h``; empty for ``None``.

    Infinity and its like, which anybody may have written to the server, are shown as they are.
    """
    if seconds is None:
        return ""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 0:
        return f"-{age(-seconds)}"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"


def moment(epoch_ms: float) -> str:
    """Milliseconds since the epoch in ISO 8601, UTC; empty for a time no calendar has."""
    try:
        return datetime.fromtimestamp(epoch_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return ""


def size(count: int | None) -> str:
    """Bytes as ``84 MB``; empty for ``None`` and 0."""
    if not count:
        return ""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
