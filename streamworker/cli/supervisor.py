"""Supervisor: keeps worker processes running, and replaces those that ask for it.

A worker and its supervisor talk through a socket, a byte each. The supervisor passes signals on (the byte is the
number of the signal), and says `RETIRE` and `SERVE`; the worker says `LISTENING`, `READY` and `RECYCLE`. A worker that
asks to be replaced goes on claiming until its successor is ready, so that there is no gap.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import anyio
import anyio.abc

from streamworker.errors import ConfigurationError, UsageError
from streamworker.loops import Pause
from streamworker.settings.environment import PREFIX
from streamworker.telemetry.logs import get_logger
from streamworker.worker import signals

log = get_logger("streamworker.processes")

HOPELESS: Final = (ConfigurationError.exit_code, UsageError.exit_code)
"""Exit codes that another start would only repeat."""
STEADY: Final = 60.0
"""Seconds a worker has to last before its next end counts as a first one."""
START: Final = 300.0
"""Seconds a successor has to be ready; then it is killed."""
HTTP: Final = f"{PREFIX}HTTP"

LISTENING: Final = 0
"""A worker says: it reads signals from the socket."""
READY: Final = 1
"""A worker says: it is about to claim."""
RECYCLE: Final = 2
"""A worker says: it is to be replaced."""
RETIRE: Final = 200
"""A supervisor says: the successor is ready, drain. No signal has this number, nor the next one."""
SERVE: Final = 201
"""A supervisor says to a successor: the worker before is gone, answer probes although you are not ready."""


class _Child:
    """A worker process.

    Args:
        process: it.
        link: signals are passed on through this socket, so that the worker can tell them from those that reach it
            directly: a service manager may signal all processes, and the worker must count one. It closes with the
            supervisor, which tells the worker to end by itself.
    """

    def __init__(self, process: anyio.abc.Process, link: socket.socket) -> None:
        self.process: Final = process
        self._link = link
        self._heard: set[int] = set()
        self.ended: Final = anyio.Event()
        self.code = 0
        """Its exit code as a shell tells it, once it has ended."""

    def said(self, word: int) -> bool:
        """Whether it has said this byte."""
        return word in self._heard

    def pass_on(self, number: int) -> None:
        """Pass a signal on."""
        try:
            self._link.send(bytes([number]))
        except BlockingIOError:
            pass
        except OSError:
            return  # it has ended
        self._read()
        if not self.said(LISTENING):
            # It is still starting, and holds nothing: this ends it now, see `signals.exit_until_watched`.
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def tell(self, word: int) -> None:
        """Say `RETIRE` or `SERVE`."""
        with suppress(OSError):
            self._link.send(bytes([word]))

    def kill(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            self.process.kill()

    async def attend(self, stir: Callable[[], None]) -> int:
        """Its life; returns how it ended, as `Process.wait` does.

        Args:
            stir: called whenever it has said something.
        """
        async with self.process, anyio.create_task_group() as group:
            group.start_soon(self._listen, stir)
            code = await self.process.wait()
            group.cancel_scope.cancel()
        return code

    async def _listen(self, stir: Callable[[], None]) -> None:
        open_ = True
        while open_:
            await anyio.wait_readable(self._link)
            open_ = self._read()
            stir()

    def _read(self) -> bool:
        """Whether the other end of the socket is open."""
        try:
            words = self._link.recv(64)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._heard.update(words)
        return bool(words)


class _Slot:
    """One of the workers that a supervisor keeps: its process, and for a while the one before or after.

    Args:
        number: from 0.
        address: where it answers HTTP, or ``None``.
        listener: the socket that listens there, for all its generations; ``None``: each process makes its own.
    """

    def __init__(self, number: int, address: str | None, listener: socket.socket | None) -> None:
        self.number: Final = number
        self.address: Final = address
        self.listener: Final = listener
        self._stirred = anyio.Event()

    def stir(self) -> None:
        """Something of it has changed."""
        self._stirred.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that changes with `stir`; one task may wait."""
        while not condition():
            self._stirred = anyio.Event()
            await self._stirred.wait()


class Supervisor:
    """Keeps ``count`` worker processes running until a signal; the first is passed on once, the second again.

    Args:
        command: the worker's, run with its number's HTTP port if there is one.
        count: processes.
        burst: workers end by themselves when nothing is ready any more; then they are not started again.
        ports: one HTTP address a worker, or empty.
        listeners: one socket a worker that listens at its address, so that two generations of a worker can run at
            once; or empty.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        *,
        burst: bool,
        ports: Sequence[str] = (),
        listeners: Sequence[socket.socket] = (),
    ) -> None:
        self._command = list(command)
        self._burst = burst
        self._slots = [
            _Slot(number, ports[number] if ports else None, listeners[number] if listeners else None)
            for number in range(count)
        ]
        self._stopping = anyio.Event()
        self._replacing = False
        self._running: list[_Child] = []
        self._codes: list[int] = []

    async def run(self) -> int:
        """Until all have ended; returns the worst of their last exit codes."""
        async with anyio.create_task_group() as group:
            await group.start(signals.watch, self._pass_on)
            async with anyio.create_task_group() as workers:
                for slot in self._slots:
                    workers.start_soon(self._keep, slot)
            group.cancel_scope.cancel()
        return max(self._codes, default=0)

    async def _keep(self, slot: _Slot) -> None:
        """Start one worker, again whenever it ends unasked, and another in its place when it wants to be replaced."""
        pause = Pause()
        child: _Child | None = None
        async with anyio.create_task_group() as lives:
            while not self._stopping.is_set():
                began = anyio.current_time()
                child = child or await self._start(slot, lives)
                successor = await self._outlive(slot, child, lives)
                if successor is not None or self._stopping.is_set():
                    child = successor
                    continue
                code, child = child.code, None
                if self._burst and code == 0:
                    return
                if code in HOPELESS:
                    hint = "the others are stopped as well"
                    log.error("worker_cannot_start", worker=slot.number, code=code, hint=hint)
                    self._codes.append(code)
                    self._pass_on(signal.SIGTERM)
                    return
                if anyio.current_time() - began > STEADY:
                    pause.reset()
                log.warning("worker_ended", worker=slot.number, code=code, hint="it is started again")
                await pause.wait(self._stopping)

    async def _outlive(self, slot: _Slot, child: _Child, lives: anyio.abc.TaskGroup) -> _Child | None:
        """Until a worker has ended, or is replaced: then its successor is returned."""

        def over() -> bool:
            return child.ended.is_set() or self._stopping.is_set()

        def free() -> bool:
            return over() or not self._replacing

        pause = Pause()
        await slot.until(lambda: over() or child.said(RECYCLE))
        while not over():
            # One of all at a time: the machine may have memory for one more.
            await slot.until(free)
            if over():
                break
            self._replacing = True
            try:
                successor = await self._succeed(slot, lives, over)
            finally:
                self._replacing = False
                self._stir()
            if self._stopping.is_set():
                return None
            if not successor.ended.is_set():
                self._hand_over(slot, child, successor)
                return successor
            if self._burst and successor.code == 0:
                await child.ended.wait()  # nothing was ready, so that no successor is needed
            elif not child.ended.is_set():
                hint = "the worker that was to be replaced goes on; another successor is tried later"
                log.error("successor_failed", worker=slot.number, code=successor.code, hint=hint)
                await pause.wait(child.ended)
        return None

    async def _succeed(self, slot: _Slot, lives: anyio.abc.TaskGroup, over: Callable[[], bool]) -> _Child:
        """Start a successor, and wait until it is ready or has ended, or the worker before is ``over``."""
        successor = await self._start(slot, lives, succeeds=True)

        def known() -> bool:
            return over() or successor.ended.is_set() or successor.said(READY)

        with anyio.move_on_after(START):
            await slot.until(known)
        if not known():
            successor.kill()
            await successor.ended.wait()
        return successor

    def _hand_over(self, slot: _Slot, child: _Child, successor: _Child) -> None:
        if child.ended.is_set():
            successor.tell(SERVE)
            hint = "its successor, which was starting, takes its place"
            log.warning("worker_ended", worker=slot.number, code=child.code, hint=hint)
            return
        child.tell(RETIRE)
        log.info("worker_replaced", worker=slot.number, pid=child.process.pid, successor=successor.process.pid)

    async def _start(self, slot: _Slot, lives: anyio.abc.TaskGroup, *, succeeds: bool = False) -> _Child:
        """Start a process; ``lives`` attends to it until it has ended."""
        env = dict(os.environ)
        if slot.address is not None:
            env[HTTP] = slot.address
            env.pop(f"{HTTP}_FILE", None)  # set in both forms would be a contradiction
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        words, passed = ["--supervisor", str(theirs.fileno())], [theirs.fileno()]
        if slot.listener is not None:
            words += ["--listener", str(slot.listener.fileno())]
            passed.append(slot.listener.fileno())
        if succeeds:
            words.append("--succeeds")
        with theirs:
            # A session of its own: Ctrl-C reaches the supervisor alone, which passes it on.
            process = await anyio.open_process(
                [*self._command, *words],
                stdin=None, stdout=None, stderr=None, env=env, start_new_session=True, pass_fds=passed,
            )  # fmt: skip
        child = _Child(process, ours)
        self._running.append(child)
        lives.start_soon(self._attend, slot, child, ours)
        if self._stopping.is_set():
            child.pass_on(signal.SIGTERM)
        return child

    async def _attend(self, slot: _Slot, child: _Child, link: socket.socket) -> None:
        try:
            with link:
                code = await child.attend(slot.stir)
        finally:
            self._running.remove(child)
        if code == -signal.SIGTERM and self._stopping.is_set():
            code = 0  # it was told to end before it could listen, and held nothing yet
        child.code = code if code >= 0 else 128 - code
        child.ended.set()
        if self._stopping.is_set():
            self._codes.append(child.code)
        elif child.said(RECYCLE) and child.code:
            log.warning("worker_ended", worker=slot.number, code=child.code, hint="it was being replaced")
        slot.stir()

    def _pass_on(self, number: int) -> None:
        self._stopping.set()
        for child in list(self._running):
            child.pass_on(number)
        self._stir()

    def _stir(self) -> None:
        for slot in self._slots:
            slot.stir()
