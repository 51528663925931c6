"""Doing many things at a rate that others can bear."""

from __future__ import annotations

import time

import anyio


class Throttle:
    """Spaces turns evenly; who comes late does not make up for it in a burst.

    Args:
        rate: turns a second; ``None`` for as fast as it goes.
    """

    def __init__(self, rate: float | None) -> None:
        self._gap = 1 / rate if rate else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        """Wait for the next turn."""
        if not self._gap:
            return
        now = time.monotonic()
        # A tenth of a second is made up for: sleeps overrun, and the rate shall hold on average.
        self._next = max(self._next + self._gap, now - 0.1)
        if self._next > now:
            await anyio.sleep(self._next - now)
