"""Calls that jobs make outside of the event loop: in threads, and in processes, where they can be killed.

A handler with ``process=True`` runs in a process of `anyio.to_process`: spawned, used again, killed when the call is
cancelled. It ends with its worker, whatever it computes: no job may run on beside the worker that rescued it. Payloads
are decoded here, by their type, and go to the process as objects: bytes from Redis choose no code.
"""

from __future__ import annotations

import asyncio
import copy
import ctypes
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

import anyio
import anyio.to_process
import msgspec

from streamworker.context import Context, LogReport, ProcessContext, ProgressReport
from streamworker.errors import ProcessDied
from streamworker.handlers import Registration
from streamworker.redact import describe
from streamworker.telemetry.logs import get_logger
from streamworker.worker.job_task import JOB

log = get_logger("streamworker.worker")

PARENT_LOOK: Final = 0.5
"""Seconds between looks whether the worker lives, where the kernel does not tell."""
Answer: TypeAlias = tuple[bool, Any, str]
"""Whether the handler returned; what it returned or raised; the traceback, or why the result cannot be sent."""
Begins: TypeAlias = Callable[[], datetime | None]
"""Called when a handler's clock starts; returns its deadline."""

P = ParamSpec("P")
T = TypeVar("T")


class ThreadCall:
    """One call that a job made in a thread of the event loop's default executor.

    Attributes:
        future: ends with the call.
        thread: that runs it, as `threading.get_ident` tells; ``None`` until it has begun.
    """

    __slots__ = ("_function", "future", "thread")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.future: Future[Any]
        self.thread: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called by the thread."""
        self.thread = threading.get_ident()
        return self._function(*args, **kwargs)


class JobThreads(ThreadPoolExecutor):
    """The default executor of a worker's event loop: it knows which job made a call that has not returned.

    `asyncio.to_thread` stops waiting when its job is cancelled, and the thread goes on. A job that would run again
    waits for what it finds here.
    """

    calls: Final[dict[int, tuple[bytes, list[ThreadCall]]]] = {}
    """By identity of the jobs' `JOB`, of all workers in this process; empty while no job has a call in a thread."""
    _lock: Final = threading.Lock()

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="asyncio")  # as asyncio names its own

    @classmethod
    def install(cls, loop: asyncio.AbstractEventLoop) -> None:
        """Become the default executor, unless the program chose one; uvloop cannot be asked, and has none."""
        if getattr(loop, "_default_executor", None) is None:
            loop.set_default_executor(cls())

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function in a thread; see `concurrent.futures.Executor.submit`."""
        job = JOB.get()
        if job is None:
            return super().submit(fn, *args, **kwargs)
        call = ThreadCall(fn)
        with self._lock:
            self.calls.setdefault(id(job), (job, []))[1].append(call)
        try:
            call.future = super().submit(call, *args, **kwargs)
        except BaseException:
            self._forget(job, call)
            raise
        call.future.add_done_callback(lambda _: self._forget(job, call))
        return call.future

    @classmethod
    def of(cls, job: bytes) -> list[ThreadCall]:
        """The calls of a job that have not returned."""
        with cls._lock:
            return list(cls.calls.get(id(job), (job, []))[1])

    @classmethod
    def _forget(cls, job: bytes, call: ThreadCall) -> None:
        with cls._lock:
            known = cls.calls.get(id(job), (job, []))[1]
            if call in known:
                known.remove(call)
            if not known:
                cls.calls.pop(id(job), None)


class HandlerProcesses:
    """Calls handlers in processes, as many at once as the machine has processors."""

    def __init__(self) -> None:
        self._free: anyio.CapacityLimiter | None = None
        self._reports = ProgressReports()

    async def call(self, registration: Registration, payload: Any, context: Context[Any], begins: Begins) -> Any:
        """Call a handler in a process, and wait for it; a cancellation kills the process.

        Args:
            registration: of a handler with ``process=True``.
            payload: decoded.
            context: of the job.
            begins: called when a process is free.

        Raises:
            ProcessDied: the process ended without an answer.
            BaseException: what the handler raised.
        """
        if self._free is None:
            self._free = anyio.CapacityLimiter(os.cpu_count() or 1)
        async with self._free:
            seen, limiter = None, anyio.CapacityLimiter(1)  # anyio's own would count all jobs of this process
            try:
                # A new process takes a second to start and to import: no handler's time.
                await anyio.to_process.run_sync(ready, registration.function, cancellable=True, limiter=limiter)
                deadline = begins()
                if registration.wants_context:
                    seen = self._reports.follow(context, deadline)
                returned, value, trace = await anyio.to_process.run_sync(
                    in_process, os.getpid(), registration.function, payload, seen,
                    cancellable=True, limiter=limiter,
                )  # fmt: skip
            except anyio.BrokenWorkerProcess as error:
                raise ProcessDied(f"the process of {registration.name} ended without an answer") from error.__cause__
            finally:
                if seen is not None:
                    self._reports.forget(seen.number)
        if returned:
            if trace:
                log.warning("result_not_sent", handler=registration.name, job_id=context.job.id, error=trace)
            return value
        value.__cause__ = RemoteTraceback(trace)
        raise value

    def close(self) -> None:
        """Receive no more reports. The processes end with the event loop."""
        self._reports.close()


class RemoteTraceback(Exception):
    """The traceback of an error that was raised in a handler's process, as text."""

    def __str__(self) -> str:
        return f"in the handler's process:\n{self.args[0]}"


class HandlerError(Exception):
    """An error that cannot be sent from the handler's process, as text: ``Type: message``."""


LEVELS: Final = frozenset({"debug", "info", "warning", "error", "critical"})
MOST_REPORT: Final = 131_072
"""Bytes of the largest report."""


class ProgressReports:
    """Receives what handlers report and log in processes, by datagrams of a Unix socket."""

    def __init__(self) -> None:
        self._contexts: dict[int, Context[Any]] = {}
        self._numbers = count(1)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._socket: socket.socket | None = None
        self._path = ""

    def follow(self, context: Context[Any], deadline: datetime | None) -> ProcessContext:
        """What the handler gets as its context; until `forget`, its reports reach ``context``."""
        if self._socket is None:
            self._open()
        number = next(self._numbers)
        self._contexts[number] = context
        job = msgspec.structs.replace(context.job, payload=msgspec.Raw(b"null"))
        return ProcessContext(
            job=job, attempt=context.attempt, last_attempt=context.last_attempt, delivery=context.delivery,
            worker_id=context.worker_id, deadline=deadline, number=number, address=self._path,
        )  # fmt: skip

    def forget(self, number: int) -> None:
        """The handler has ended."""
        self._contexts.pop(number, None)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None and self._folder is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._folder.cleanup()
            self._socket = self._folder = None

    def _open(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="streamworker-")  # readable only by this user
        self._path = str(Path(self._folder.name, "progress"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self._receive)

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                message = self._socket.recv(MOST_REPORT)
            except BlockingIOError:
                return
            try:
                report = msgspec.msgpack.decode(message, type=ProgressReport | LogReport)
            except msgspec.MsgspecError:
                continue  # no process of ours wrote it
            if (context := self._contexts.get(report.number)) is None:
                continue
            if isinstance(report, ProgressReport):
                context.progress(report.done, report.total, report.note)
            elif report.level in LEVELS:
                getattr(context.log, report.level)(
                    report.event, **{k: v for k, v in report.values.items() if k != "event"}
                )


def ready(function: Callable[..., Any]) -> None:
    """The process has started, and imported the handler; the next call finds it idle."""
    del function


def in_process(worker: int, function: Callable[..., Any], payload: Any, context: ProcessContext | None) -> Answer:
    """Call a handler; runs in the process.

    Args:
        worker: pid of the worker.
        function: the handler.
        payload: its payload.
        context: its context, if it takes one.
    """
    _end_with(worker)
    # The worker decides when the handler ends: a signal to the whole group is for the worker alone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stderr.fileno() != 2:  # anyio silences it; what handlers log belongs to the worker's log
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
    try:
        value = function(payload) if context is None else function(payload, context)
    except BaseException as error:  # noqa: BLE001 - also SystemExit ends the job only
        return False, _sendable(error), traceback.format_exc()
    try:
        return True, msgspec.to_builtins(value), ""
    except Exception as error:  # noqa: BLE001 - the job is done: what it returned is lost
        return True, None, describe(error)


def _sendable(error: BaseException) -> BaseException:
    """The error, or its text if the worker could not make it anew."""
    if "<" in type(error).__qualname__:
        return HandlerError(describe(error))
    try:
        return copy.deepcopy(error)
    except Exception:  # noqa: BLE001 - whatever users' errors do
        return HandlerError(describe(error))


@cache  # once in each process
def _end_with(worker: int) -> None:
    """Let this process end when the worker does, whatever it computes."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
    else:
        threading.Thread(target=_watch, args=(worker,), daemon=True).start()
    if os.getppid() != worker:
        os._exit(1)


def _watch(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(PARENT_LOOK)
    os._exit(1)
