"""The asyncio task of one job: who cancelled it, and which async generators it left behind."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Callable
from contextvars import Context, ContextVar
from types import FrameType
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar
from weakref import WeakValueDictionary

from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

JOB: Final[ContextVar[bytes | None]] = ContextVar("streamworker_job", default=None)
"""Set in the context of a job, and so in those of the tasks, timers and threads that it starts. Compared by identity.
It is the entry of the claim, small enough to be kept by whatever keeps the context."""
_MACHINERY: Final = ("asyncio", "anyio", "uvloop", "streamworker.worker.job_task")
"""Modules that call `cancel` for others."""

P = ParamSpec("P")
T = TypeVar("T")
Generator: TypeAlias = Any  # types.AsyncGeneratorType; the stubs of sys know only the abstract class
Hook: TypeAlias = Callable[[Any], None] | None


class JobTask(asyncio.Task[Any]):
    """The task of one job. It ends with the job, so that nothing a job leaves behind can reach the next one.

    Attributes:
        by: the line of code outside of the job that cancelled it first, worker included; ``None`` if nothing did.
        context: what it runs in; only set where `asyncio.Task.get_context` does not exist (3.11).
    """

    by: str | None = None
    context: Context | None = None

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel, and remember by whom unless it is the job itself: its code, or a task, timer or thread it started."""
        if self.done():
            return False
        if inspect.getcoroutinestate(self.get_coro()) == inspect.CORO_CREATED:  # type: ignore[arg-type]
            # Not begun yet (3.11 only): cancelled now it never would begin, and its run would have no end.
            self.get_loop().call_soon(self._cancel_begun, msg)
            return True
        if self.by is None and not self._called_by_itself():
            self.by = _caller()
        return super().cancel(msg)

    def _cancel_begun(self, msg: Any | None) -> None:
        super().cancel(msg)

    def _called_by_itself(self) -> bool:
        context = self.context if self.context is not None else self.get_context()  # type: ignore[attr-defined]
        return JOB.get() is not None and JOB.get() is context.get(JOB)


def _caller() -> str:
    """The nearest line of code that is not event loop."""
    nearest = sys._getframe(2)
    frame: FrameType | None = nearest
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(_MACHINERY):
            nearest = frame
            break
        frame = frame.f_back
    return f"{nearest.f_code.co_filename}:{nearest.f_lineno} in {nearest.f_code.co_qualname}"


class _Begun:
    """The async generators of one task, in the order they were begun, and those that only we hold still."""

    __slots__ = ("alive", "count", "dropped")

    def __init__(self) -> None:
        self.alive: WeakValueDictionary[int, Generator] = WeakValueDictionary()
        self.count = 0
        self.dropped: list[Generator] = []


class AsyncGenerators:
    """Async generators that jobs began and did not exhaust, to be closed in the task of their job when it ends.

    A generator that holds a timeout or a task group is bound to the task that began it: closed in another one, as
    asyncio does it, it fails halfway. The hooks are only called for async generators; jobs that begin none pay nothing.
    """

    begun: Final[dict[JobTask, _Begun]] = {}
    """By task, of all workers in this process; empty while no job has begun one."""

    def __init__(self) -> None:
        self._hooked = self
        self._users = 0
        self._firstiter: Hook = None
        self._finalizer: Hook = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hook into the running event loop; call it in its thread. Several workers of a loop share the hooks."""
        hook = sys.get_asyncgen_hooks().firstiter
        theirs = getattr(hook, "__self__", None)
        self._hooked = theirs if isinstance(theirs, AsyncGenerators) and theirs._loop is loop else self
        self._hooked._users += 1
        if self._hooked is not self:
            return
        self._firstiter, self._finalizer = sys.get_asyncgen_hooks()
        self._loop, self._thread = loop, threading.get_ident()
        sys.set_asyncgen_hooks(firstiter=self._begin, finalizer=self._drop)

    def close(self) -> None:
        """Note no more. With the last worker the hooks go, if they are the outermost; else they pass everything on."""
        self._hooked._users -= 1
        if not self._hooked._users:
            self._hooked._unhook()

    def resume(self) -> None:
        """Hook into the loop again: it sets its own hooks whenever it begins to run."""
        if self._hooked._loop is not None:
            sys.set_asyncgen_hooks(firstiter=self._hooked._begin, finalizer=self._hooked._drop)

    def _unhook(self) -> None:
        self._loop = None
        if sys.get_asyncgen_hooks().firstiter == self._begin:
            sys.set_asyncgen_hooks(self._firstiter, self._finalizer)

    def take(self, task: asyncio.Task[Any] | None) -> list[Generator]:
        """What a job that ends has left open, the newest first; not noted any more."""
        begun = self.begun.pop(task, None) if isinstance(task, JobTask) else None
        if begun is None:
            return []
        left = [*begun.dropped, *begun.alive.values()]
        begun.dropped = []
        return [generator for generator in reversed(left) if generator.ag_frame is not None]

    def _begin(self, generator: Generator) -> None:
        if self._firstiter is not None:
            self._firstiter(generator)
        task = asyncio.current_task(self._loop) if self._loop is not None else None
        if isinstance(task, JobTask):
            begun = self.begun.get(task)
            if begun is None:
                begun = self.begun[task] = _Begun()
            begun.count += 1
            begun.alive[begun.count] = generator

    def _drop(self, generator: Generator) -> None:
        """The last reference went; maybe because the handler is about to return, in which case we close it."""
        here = self._loop is not None and threading.get_ident() == self._thread  # else the collector ran elsewhere
        task = asyncio.current_task(self._loop) if here else None
        begun = self.begun.get(task) if isinstance(task, JobTask) else None
        if begun is None or self._loop is None:
            self._close_elsewhere(generator)
            return
        begun.dropped.append(generator)
        self._loop.call_soon(self._job_goes_on, begun, generator)

    def _job_goes_on(self, begun: _Begun, generator: Generator) -> None:
        """The job is not about to end: let asyncio close the generator now, as it does everywhere."""
        if generator in begun.dropped:
            begun.dropped.remove(generator)
            self._close_elsewhere(generator)

    def _close_elsewhere(self, generator: Generator) -> None:
        if self._finalizer is not None:
            self._finalizer(generator)
