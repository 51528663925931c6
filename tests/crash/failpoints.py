"""Death at named points, installed from outside by patching the broker of one worker process.

``CRASH_AT="settling:3:KILL"`` sends that signal to the process itself when it comes to the point for the third time.
Points: ``claimed`` (claims came back), ``started`` (in a handler), ``outcome`` (before settle is sent), ``settling`` (half
of a batch is settled), ``settled`` (all of it, and nobody here knows yet), ``draining`` (told to stop, before something
is settled), ``leaving`` (before the consumer is deleted), ``renewing`` (in the lease thread).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from streamworker.broker.stream import StreamBroker
from streamworker.execute import Executor

POINTS = ("claimed", "started", "outcome", "settling", "settled", "draining", "leaving", "renewing")


def install() -> None:
    """Patch what ``CRASH_AT`` names; without it nothing is touched."""
    wish = os.environ.get("CRASH_AT", "")
    if not wish:
        return
    point, _, rest = wish.partition(":")
    times, _, name = rest.partition(":")
    left = int(times or 1)
    number = signal.Signals[f"SIG{name or 'KILL'}"]

    def reached() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    _PATCHES[point](reached)


def _claimed(reached: Callable[[], None]) -> None:
    original = StreamBroker.claim

    async def claim(self: StreamBroker, *args: Any) -> Any:
        claims = await original(self, *args)
        if claims:
            reached()
        return claims

    StreamBroker.claim = claim  # type: ignore[method-assign]


def _started(reached: Callable[[], None]) -> None:
    original = Executor.call

    async def call(self: Executor, run: Any) -> Any:
        import asyncio

        asyncio.get_running_loop().call_soon(reached)  # after the handler's first line
        return await original(self, run)

    Executor.call = call  # type: ignore[method-assign]


def _settle(before: Callable[[], None], between: Callable[[], None], after: Callable[[], None]) -> None:
    original = StreamBroker.settle

    async def settle(self: StreamBroker, items: Any) -> Any:
        before()
        half = (len(items) + 1) // 2
        first = await original(self, items[:half])
        between()
        second = await original(self, items[half:]) if items[half:] else []
        after()
        return [*first, *second]

    StreamBroker.settle = settle  # type: ignore[method-assign]


def _nothing() -> None:
    pass


def _draining(reached: Callable[[], None]) -> None:
    interrupt, settle = StreamBroker.interrupt, StreamBroker.settle
    stopping = False

    async def interrupted(self: StreamBroker) -> None:
        nonlocal stopping
        stopping = True
        await interrupt(self)

    async def settled(self: StreamBroker, items: Any) -> Any:
        if stopping:
            reached()
        return await settle(self, items)

    StreamBroker.interrupt, StreamBroker.settle = interrupted, settled  # type: ignore[method-assign]


def _leaving(reached: Callable[[], None]) -> None:
    original = StreamBroker.leave

    async def leave(self: StreamBroker) -> bool:
        reached()
        return await original(self)

    StreamBroker.leave = leave  # type: ignore[method-assign]


def _renewing(reached: Callable[[], None]) -> None:
    original = StreamBroker.renew

    def renew(self: StreamBroker, claims: Any) -> Any:
        reached()
        return original(self, claims)

    StreamBroker.renew = renew  # type: ignore[method-assign]


_PATCHES: dict[str, Callable[[Callable[[], None]], None]] = {
    "claimed": _claimed,
    "started": _started,
    "outcome": lambda reached: _settle(reached, _nothing, _nothing),
    "settling": lambda reached: _settle(_nothing, reached, _nothing),
    "settled": lambda reached: _settle(_nothing, _nothing, reached),
    "draining": _draining,
    "leaving": _leaving,
    "renewing": _renewing,
}
