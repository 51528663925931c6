"""A daemon thread with an event loop, so that sync code can await one thing without a second implementation of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic

import anyio
from anyio.from_thread import BlockingPortal
from typing_extensions import TypeVar

from streamworker.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")


def refuse_on_loop(sentence: str) -> None:
    """Refuse to block an event loop.

    Raises:
        UsageError: ``sentence``, if this thread runs a loop.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UsageError(sentence)


class BackgroundLoop(Generic[T]):
    """Keeps ``resource`` open on a loop of its own and calls functions with it.

    The thread is a daemon: a script that enqueues and ends must not wait for it. Threads are not inherited by a fork; a
    child process makes its own.

    Args:
        resource: makes the async context manager whose value functions are called with.
    """

    def __init__(self, resource: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._resource = resource
        self._ready = threading.Event()
        self._portal: BlockingPortal | None = None
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="streamworker-blocking", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The loop still runs in this process."""
        return self._thread.is_alive()

    def call(self, function: Callable[[T], Awaitable[R]]) -> R:
        """Await ``function(resource)`` on the loop; raises what it raises, or what opening the resource raised."""
        self._ready.wait()
        if self._portal is None or self._error is not None:
            raise self._error or RuntimeError("the background loop has ended")

        async def on_loop() -> Any:
            return await function(self._value)  # type: ignore[arg-type]  # set before the portal is

        result: R = self._portal.call(on_loop)
        return result

    def _run(self) -> None:
        try:
            anyio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whose call is the one that failed
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        async with self._resource() as value, BlockingPortal() as portal:
            self._value, self._portal = value, portal
            self._ready.set()
            await portal.sleep_until_stopped()
