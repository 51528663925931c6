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

from streamworker.broker.lists import ListBroker
from streamworker.broker.stream import StreamBroker
from streamworker.worker.executor import Executor
from tests.crash.ground import MODE

BROKER: Any = {"stream": StreamBroker, "list": ListBroker}[MODE]

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
    original = BROKER.claim

    async def claim(self: Any, *args: Any, **options: Any) -> Any:
        claims = await original(self, *args, **options)
        if claims:
            reached()
        return claims

    BROKER.claim = claim


def _started(reached: Callable[[], None]) -> None:
    original = Executor.call

    async def call(self: Executor, *args: Any) -> Any:
        import asyncio

        asyncio.get_running_loop().call_soon(reached)  # after the handler's first line
        return await original(self, *args)

    Executor.call = call  # type: ignore[method-assign]


def _settle(before: Callable[[], None], between: Callable[[], None], after: Callable[[], None]) -> None:
    original = BROKER.settle

    async def settle(self: Any, items: Any) -> Any:
        before()
        half = (len(items) + 1) // 2
        first = await original(self, items[:half])
        between()
        second = await original(self, items[half:]) if items[half:] else []
        after()
        return [*first, *second]

    BROKER.settle = settle


def _nothing() -> None:
    pass


def _draining(reached: Callable[[], None]) -> None:
    interrupt, settle = BROKER.interrupt, BROKER.settle
    stopping = False

    async def interrupted(self: Any) -> None:
        nonlocal stopping
        stopping = True
        await interrupt(self)

    async def settled(self: Any, items: Any) -> Any:
        if stopping:
            reached()
        return await settle(self, items)

    BROKER.interrupt, BROKER.settle = interrupted, settled


def _leaving(reached: Callable[[], None]) -> None:
    original = BROKER.leave

    async def leave(self: Any) -> bool:
        reached()
        return await original(self)

    BROKER.leave = leave


def _renewing(reached: Callable[[], None]) -> None:
    original = BROKER.renew

    async def renew(self: Any, claims: Any) -> Any:
        reached()
        return await original(self, claims)

    BROKER.renew = renew


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
