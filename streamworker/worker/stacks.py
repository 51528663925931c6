"""The line of code that a task or a thread is at, for log lines about code that does not end."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Iterable, Iterator
from types import AsyncGeneratorType, FrameType
from typing import Any, Final

from streamworker.execution import Execution

_WAITS: Final = ("asyncio", "anyio", "uvloop", "concurrent", "threading", "queue", "selectors", "streamworker")
"""Modules in which code waits for what others do: the line that called them says more."""
UNKNOWN: Final = "unknown"


def of_run(run: Execution) -> str:
    """The line at which a handler stands: in its thread if it has one, else where its task waits."""
    if run.in_thread and run.thread is not None:
        return of_thread(run.thread)
    return of_task(run.task) if run.task is not None else UNKNOWN


def of_task(task: asyncio.Task[Any]) -> str:
    """The line at which a task waits, or at which it is if it runs in this very moment."""
    return _line(_awaited(task.get_coro()))


def of_thread(ident: int) -> str:
    """The line at which a thread is.

    Args:
        ident: as `threading.get_ident` tells it.
    """
    return _line(reversed(list(_outwards(sys._current_frames().get(ident)))))


def busy_threads() -> list[str]:
    """Name and line of each thread that would keep the process from ending, and is not idle in a pool."""
    found = []
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.daemon or thread is threading.main_thread() or thread is threading.current_thread():
            continue
        stack = list(_outwards(frames.get(thread.ident or 0)))
        if any(not _is_waiting(frame) for frame in stack):
            found.append(f"{thread.name}: {_line(reversed(stack))}")
    return found


def _awaited(coroutine: Any) -> Iterator[FrameType]:
    """The frames of a coroutine and of what it awaits, outermost first."""
    while coroutine is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(coroutine, f"{kind}_frame", None)
            if frame is not None:
                yield frame
                break
        else:
            coroutine = _generator_in(coroutine)
            continue
        awaits = "gi_yieldfrom" if kind == "gi" else f"{kind}_await"
        coroutine = getattr(coroutine, awaits, None)


def _generator_in(awaitable: Any) -> AsyncGeneratorType[Any, Any] | None:
    """The async generator that a step of it, such as the exit of a lifespan, is awaited of: steps have no frame."""
    inner = gc.get_referents(awaitable)
    for each in (*inner, *gc.get_referents(*inner)):
        if isinstance(each, AsyncGeneratorType):
            return each
    return None


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_waiting(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in _WAITS


def _line(frames: Iterable[FrameType]) -> str:
    """The innermost line of users' code; of any code if there is none of theirs."""
    last = theirs = None
    for frame in frames:
        last = frame
        if not _is_waiting(frame):
            theirs = frame
    found = theirs or last
    return UNKNOWN if found is None else f"{found.f_code.co_filename}:{found.f_lineno} in {found.f_code.co_qualname}"
