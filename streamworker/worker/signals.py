"""Signals of this process, and what its forked children inherit of them.

Every worker of a process hears a signal, whichever loop and thread it runs in, and hears it once however it was sent:
a supervisor and a service manager that both signal a worker count as one. A forked child gets back the handlers that
were there before ours, and no wake-up descriptor: else its SIGTERM would arrive in the worker that forked it.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import thread
from contextlib import contextmanager, suppress
from queue import Empty
from time import monotonic
from types import FrameType
from typing import Any, Final, NamedTuple, NoReturn

import anyio
import anyio.abc

HANG_UP: Final[int | None] = getattr(signal, "SIGHUP", None)
"""SIGHUP, where the system has it."""
STOP: Final = (signal.SIGTERM, signal.SIGINT, *((signal.Signals(HANG_UP),) if HANG_UP is not None else ()))
"""Signals that ask a process to end. SIGQUIT is left to the system: it ends the process at once, with a core dump."""
SUPERVISOR: Final = "supervisor"
"""Source of signals that a supervisor passes on; those that the system delivers come from ``""``."""
RETURNED: Final = (
    b"streamworker: a forked child came back into its worker's handler or event loop and ends here: "
    b"end it with os._exit(), or use multiprocessing or subprocess\n"
)


class _Listener(NamedTuple):
    loop: asyncio.AbstractEventLoop
    told: Callable[[int], None]


class _Guard(NamedTuple):
    loop: asyncio.AbstractEventLoop
    thread: int
    forked: Callable[[], None]


# Signals belong to the process, and so do these; only the main thread installs handlers.
_listeners: list[_Listener] = []
_guards: list[_Guard] = []
_before: dict[int, Any] = {}
"""The handlers that were there before ours, by number."""
_counts: dict[str, int] = {}
"""Signals so far, by source."""
_early: list[int] = []
"""Signals that a supervisor passed on before anyone watched."""
_masks: dict[int, Any] = {}
"""Signal masks of threads that are forking."""
arrivals: Final[list[tuple[int, float]]] = []
"""Number and time (time.monotonic) of each signal that Python code saw while `watch` listens. The event loop hears it
later, and not at all while a handler blocks it."""
_owner: list[asyncio.AbstractEventLoop] = []
"""The loop whose signal handlers are ours; at most one."""


def exit_until_watched() -> None:
    """SIGTERM ends the process with exit code 0 until `watch` listens: nothing has begun that must be ended in order.

    Process 1 of a container would ignore the signal.
    """
    _before.setdefault(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, _leave)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    # Not an exception: where a callback of the import system is interrupted, it would be printed and forgotten.
    os._exit(0)


async def watch(told: Callable[[int], None], *, task_status: anyio.abc.TaskStatus[None]) -> None:
    """Call ``told`` with the number of each SIGTERM, SIGINT and SIGHUP, on this loop, until cancelled.

    Outside of the main thread signals are heard while a `watch` in the main thread runs: one signal is for all.
    """
    listener = _Listener(asyncio.get_running_loop(), told)
    _listeners.append(listener)
    try:
        if threading.current_thread() is threading.main_thread() and not _owner:
            _install(listener.loop)
        task_status.started()
        while _early:
            told(_early.pop(0))
        await anyio.sleep_forever()
    finally:
        _listeners.remove(listener)
        if listener.loop in _owner and not any(each.loop is listener.loop for each in _listeners):
            _remove(listener.loop)


def leave_to_main() -> None:
    """In a thread of ours that runs no code of users: signals that ask the process to end go to another thread.

    Where the system delivers one here, the main thread sleeps on, if it sleeps: `_hear` runs when it wakes. Of two that
    come soon after each other it does so when the main thread has not been given the processor yet.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def deliver(number: int, source: str = "") -> None:
    """Tell all who watch. The n-th signal of one source is the same as the n-th of another.

    SIGHUP is never a second signal: service managers send it right after SIGTERM, and terminals as they close.

    Args:
        number: of the signal.
        source: who sent it: ``""`` is the system.
    """
    heard = max(_counts.values(), default=0)
    if number == HANG_UP and heard:
        return
    _counts[source] = _counts.get(source, 0) + 1
    if _counts[source] <= heard:
        return
    if not _listeners:
        _early.append(number)
    for loop, told in tuple(_listeners):
        with suppress(RuntimeError):  # that loop was closed
            loop.call_soon_threadsafe(told, number)


def _install(loop: asyncio.AbstractEventLoop) -> None:
    for number in STOP:
        before = signal.getsignal(number)
        if number == HANG_UP and before is signal.SIG_IGN:
            continue  # nohup: the person said that a hang-up does not matter
        if before is not _leave:
            _before[number] = before
        loop.add_signal_handler(number, deliver, number)
        # In place of the loop's own, which does nothing: what the loop hears of comes by its wake-up descriptor.
        signal.signal(number, _hear)
    _owner.append(loop)


def _hear(number: int, _frame: FrameType | None) -> None:
    arrivals.append((number, monotonic()))


def _remove(loop: asyncio.AbstractEventLoop) -> None:
    arrivals.clear()
    _owner.clear()
    _counts.clear()
    _early.clear()
    for number, before in _before.items():
        loop.remove_signal_handler(number)
        signal.signal(number, _handler(before))
    _before.clear()


def _handler(before: Any) -> Any:
    """What to put back; ``None`` stands for a handler that was not installed by Python, which cannot be."""
    return signal.SIG_DFL if before is None else before


# -- forks


@contextmanager
def guard(forked: Callable[[], None]) -> Iterator[None]:
    """While the body runs: a forked child that returns into this thread's event loop ends before that does anything.

    Args:
        forked: called in the child, before the code that forked goes on: what the child must not do can be closed.
    """
    made = _Guard(asyncio.get_running_loop(), threading.get_ident(), forked)
    _guards.append(made)
    try:
        yield
    finally:
        _guards.remove(made)


def end_child(error: BaseException | None = None) -> NoReturn:
    """End a forked child where it came back to us: with the exit code of its ``sys.exit()``, else with a sentence.

    Nothing is flushed and no exit handler runs: buffers and handlers are copies of the worker's.
    """
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        with suppress(OSError):
            os.write(2, RETURNED)
    os._exit(code if isinstance(code, int) else int(code is not None))


def _before_fork() -> None:
    # A signal between the fork and the reset below would still arrive in the parent.
    if _guards or _before:
        _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def _after_fork_in_parent() -> None:
    mask = _masks.pop(threading.get_ident(), None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    try:
        _forget_parent()
    finally:
        _after_fork_in_parent()
        _masks.clear()


def _forget_parent() -> None:
    if _guards or _before:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
    for number, before in _before.items():
        signal.signal(number, signal.default_int_handler if _is_runner(before) else _handler(before))
    guards = tuple(_guards)
    for state in (_before, _guards, _listeners, _counts, _early, _owner, arrivals):
        state.clear()
    for each in guards:
        each.forked()
        if each.thread == threading.get_ident():
            _end_on_return(each.loop)
    if guards:
        _end_in_pool()


def _is_runner(handler: Any) -> bool:
    """Whether it is asyncio's own handler of SIGINT, which would cancel a task of the parent's loop."""
    return isinstance(handler, functools.partial) and isinstance(
        getattr(handler.func, "__self__", None), asyncio.Runner
    )


def _end_on_return(loop: asyncio.AbstractEventLoop) -> None:
    """Let a loop that was running when the process was forked end the child, before any other callback of it."""
    call_first(loop, end_child)


def call_first(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Call a function in the loop's next turn, before whatever is ready already."""
    handle = loop.call_soon(callback)
    # Neither asyncio nor uvloop offers a way to be first; both keep what is ready in a deque.
    for ready in gc.get_referents(loop, *gc.get_referents(loop)):
        if type(ready) is deque and ready and ready[-1] is handle:
            ready.rotate(1)
            return


class _End:
    """A work item that ends the process."""

    def run(self, *_: object) -> None:
        end_child()


def _end_in_pool() -> None:
    """Let a thread of a pool, such as that of `asyncio.to_thread`, end the child when it looks for more work.

    Its copy of the queue may hold calls of other jobs, which the parent's threads run.
    """
    queue = thread._threads_queues.get(threading.current_thread())
    if queue is not None:
        with suppress(Empty):
            while True:
                queue.get_nowait()
        queue.put(_End())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
