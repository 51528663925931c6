"""A daemon thread with an event loop, so that sync code can await one thing without a second implementation of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Generic

import anyio
from anyio.from_thread import BlockingPortal
from typing_extensions import TypeVar

from streamworker.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")


def refuse_on_loop(sentence: str, own: asyncio.AbstractEventLoop | None) -> None:
    """Refuse to block an event loop on which there is a better way.

    Args:
        sentence: what that is.
        own: the loop on which it is; ``None``: any.

    Raises:
        UsageError: ``sentence``, if this thread runs that loop.
    """
    loop = running_loop()
    if loop is not None and (own is None or loop is own):
        raise UsageError(sentence)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that this thread runs; a forked child runs none, though its parent did."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def refuse_patched() -> None:
    """Refuse a process whose threads, sockets or selectors gevent or eventlet have replaced.

    There every thread would be a green one of a single real thread: an event loop in one of them counts as running in
    all, and a lease thread would stand still with the handler that it has to outlive.

    Raises:
        UsageError: they have.
    """
    for name, module, asks, parts in _PATCHERS:
        patcher = sys.modules.get(module)
        patched = getattr(patcher, asks, None)
        if patched is not None and any(patched(part) for part in parts):
            raise UsageError(
                f"{name} has patched this process, and asyncio cannot work in it: enqueue from another process, or add "
                "jobs with a Redis client of yours (XADD, as docs/design.md says)"
            )


_PATCHERS: Final = (
    ("gevent", "gevent.monkey", "is_module_patched", ("socket", "threading", "select")),
    ("eventlet", "eventlet.patcher", "is_monkey_patched", ("socket", "thread", "select")),
)


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
