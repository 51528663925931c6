"""Actions on jobs by hand, by their names on the dashboard; and the rate of many of them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

import anyio

from streamworker.broker import Operator, PendingEntry, StoredJob

StoredAction: TypeAlias = Literal["replay", "erase", "hasten", "forget"]
"""On a dead letter, or on a delayed job."""
PendingAction: TypeAlias = Literal["release", "bury", "drop"]
"""On a job that a worker holds."""


def stored_action(operator: Operator, name: StoredAction) -> Callable[[StoredJob], Awaitable[bool]]:
    """What does it; False if the job has moved on."""
    return {
        "replay": operator.replay,
        "erase": operator.erase,
        "hasten": operator.run_now,
        "forget": operator.forget,
    }[name]


def pending_action(operator: Operator, name: PendingAction, reason: str) -> Callable[[PendingEntry], Awaitable[bool]]:
    """What does it; False if the job has moved on. ``reason`` is read in the dead letter of one that is buried."""
    if name == "bury":
        return lambda entry: operator.bury(entry, reason)
    return operator.release if name == "release" else operator.drop


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
