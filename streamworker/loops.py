"""How long to wait after an error in a loop: 1 s, growing to 30 s, jittered, ended early by a stop."""

from __future__ import annotations

import random
from typing import Final

import anyio

FIRST: Final = 1.0
LONGEST: Final = 30.0


class Pause:
    """One loop's pauses; `reset` after a success.

    Args:
        longest: seconds.
    """

    def __init__(self, longest: float = LONGEST) -> None:
        self._next = FIRST
        self._longest = longest

    def reset(self) -> None:
        """The next pause is short again."""
        self._next = FIRST

    async def wait(self, stop: anyio.Event, *, least: float = 0.0) -> float:
        """Wait, or until ``stop``; returns the seconds that were meant.

        Args:
            stop: ends the wait.
            least: seconds that are waited if ``stop`` is set already, by loops that have to go on all the same.
        """
        if least and stop.is_set():
            await anyio.sleep(least)
            return least
        seconds = self._next * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load, hides nothing
        self._next = min(self._longest, self._next * 2)
        with anyio.move_on_after(seconds):
            await stop.wait()
        return seconds
