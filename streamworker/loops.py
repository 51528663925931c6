"""`Pause`: back-off of a loop after an error, 1 s growing to 30 s, jittered, ended by a stop; `LookLoop`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import anyio

from streamworker.errors import UsageError

T = TypeVar("T")

FIRST: Final = 1.0
LONGEST: Final = 30.0


class Pause:
    """The pauses of one loop; `reset` after a success.

    Args:
        longest: most seconds of a pause.
    """

    def __init__(self, longest: float = LONGEST) -> None:
        self._next = FIRST
        self._longest = longest

    def reset(self) -> None:
        """Make the next pause short again."""
        self._next = FIRST

    def next(self) -> float:
        """Seconds of the next pause."""
        seconds = self._next * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load, hides nothing
        self._next = min(self._longest, self._next * 2)
        return seconds

    async def wait(self, stop: anyio.Event, *, least: float = 0.0) -> float:
        """Wait for the next pause or until ``stop``; returns the seconds of the pause.

        Args:
            stop: ends the wait.
            least: seconds to wait if ``stop`` is set already, for loops that go on after it.
        """
        if least and stop.is_set():
            await anyio.sleep(least)
            return least
        seconds = self.next()
        with anyio.move_on_after(seconds):
            await stop.wait()
        return seconds


class LookLoop:
    """A loop that looks, and looks again when its time has come or it is woken.

    Args:
        stopping: ends it; call `wake` with it.
    """

    def __init__(self, stopping: anyio.Event) -> None:
        self._stopping = stopping
        self._wake = anyio.Event()

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    async def run(self, look: Callable[[], Awaitable[float]], failed: Callable[[Exception], None]) -> None:
        """Look until stopped.

        Args:
            look: returns the seconds until the next look.
            failed: told of each error, which is followed by a pause.
        """
        pause = Pause()
        while not self._stopping.is_set():
            # Before the look, not after it: a stop, or what comes meanwhile, must not be slept over.
            self._wake = anyio.Event()
            try:
                seconds = await look()
                pause.reset()
            except Exception as error:  # noqa: BLE001 - the loop goes on when the servers are back
                failed(error)
                await pause.wait(self._stopping)
                continue
            with anyio.move_on_after(seconds):
                await self._wake.wait()


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends, without an event loop; raises what it raises.

    Code that serves connections which block and connections which do not is written once, as coroutines.
    """
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value  # type: ignore[no-any-return]
    finally:
        coroutine.close()
    raise AssertionError("this coroutine awaits something: it needs an event loop")


def in_loop(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that runs in an event loop, for a caller in a thread.

    Raises:
        UsageError: the caller is in an event loop, which it would block.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    coroutine.close()
    raise UsageError("this would block the event loop: await the method without _blocking instead")
