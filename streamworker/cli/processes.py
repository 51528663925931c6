"""``streamworker worker --processes N``: several workers side by side, each a process with an id of its own.

The supervisor imports no app and talks to no server: what it may not do, it cannot do wrong. A worker that ends by
itself is started again after a pause; one that was told to end is not.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import anyio
import anyio.abc

from streamworker import signals
from streamworker.environment import PREFIX
from streamworker.errors import ConfigurationError, UsageError
from streamworker.pause import Pause
from streamworker.settings import Address
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.processes")

HOPELESS: Final = (ConfigurationError.exit_code, UsageError.exit_code)
"""Exit codes that another start would only repeat."""
STEADY: Final = 60.0
"""Seconds a worker has to last before its next end counts as a first one."""
HTTP: Final = f"{PREFIX}HTTP"
LISTENING: Final = b"\0"
"""What a worker writes to its supervisor as soon as it reads signals from it."""


class _Child(NamedTuple):
    """A worker process.

    Attributes:
        process: it.
        link: signals are passed on through this socket, a byte each, so that the worker can tell them from those that
            reach it directly: a service manager may signal all processes, and the worker must count one. It closes
            with the supervisor, which tells the worker that nobody else would end it.
    """

    process: anyio.abc.Process
    link: socket.socket

    def pass_on(self, number: int) -> None:
        """Pass a signal on."""
        listening = True
        try:
            self.link.send(bytes([number]))
            listening = bool(self.link.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            listening = False
        except OSError:
            pass  # it has ended
        if not listening:
            # It is still starting, and holds nothing: this ends it now, see `signals.exit_until_watched`.
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)


class Supervisor:
    """Keeps ``count`` worker processes running until a signal; the first is passed on once, the second again.

    Args:
        command: the worker's, run with its number's HTTP port if there is one.
        count: processes.
        burst: workers end by themselves when nothing is ready any more; then they are not started again.
        ports: one HTTP address a worker, or empty.
    """

    def __init__(self, command: Sequence[str], count: int, *, burst: bool, ports: Sequence[str] = ()) -> None:
        self._command = list(command)
        self._count = count
        self._burst = burst
        self._ports = list(ports)
        self._stopping = anyio.Event()
        self._running: dict[int, _Child] = {}
        self._codes: list[int] = []

    async def run(self) -> int:
        """Until all have ended; returns the worst of their last exit codes."""
        async with anyio.create_task_group() as group:
            await group.start(signals.watch, self._pass_on)
            async with anyio.create_task_group() as workers:
                for number in range(self._count):
                    workers.start_soon(self._keep, number)
            group.cancel_scope.cancel()
        return max(self._codes, default=0)

    async def _keep(self, number: int) -> None:
        """Start one worker, and again whenever it ends unasked."""
        pause = Pause()
        while not self._stopping.is_set():
            began = anyio.current_time()
            code = await self._live(number)
            if self._stopping.is_set() or (self._burst and code == 0):
                self._codes.append(code)
                return
            if code in HOPELESS:
                log.error("worker_cannot_start", worker=number, code=code, hint="the others are stopped as well")
                self._codes.append(code)
                self._pass_on(signal.SIGTERM)
                return
            if anyio.current_time() - began > STEADY:
                pause.reset()
            log.warning("worker_ended", worker=number, code=code, hint="it is started again")
            await pause.wait(self._stopping)

    async def _live(self, number: int) -> int:
        """One life of one worker; its exit code, as a shell tells it."""
        env = dict(os.environ)
        if self._ports:
            env[HTTP] = self._ports[number]
            env.pop(f"{HTTP}_FILE", None)  # set in both forms would be a contradiction
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            with theirs:
                # A session of its own: Ctrl-C reaches the supervisor alone, which passes it on.
                process = await anyio.open_process(
                    [*self._command, "--supervisor", str(theirs.fileno())],
                    stdin=None, stdout=None, stderr=None, env=env, start_new_session=True, pass_fds=[theirs.fileno()],
                )  # fmt: skip
            async with process:
                self._running[number] = child = _Child(process, ours)
                if self._stopping.is_set():
                    child.pass_on(signal.SIGTERM)
                try:
                    code = await process.wait()
                finally:
                    del self._running[number]
        if code == -signal.SIGTERM and self._stopping.is_set():
            return 0  # it was told to end before it could listen, and held nothing yet
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int) -> None:
        self._stopping.set()
        for child in list(self._running.values()):
            child.pass_on(number)


def addresses(first: Address | None, count: int) -> list[str]:
    """Where each worker answers HTTP: the port of the setting, and those after it; any free ones for port 0."""
    if first is None:
        return []
    return [str(first._replace(port=first.port + number if first.port else 0)) for number in range(count)]


def command(app: str | None, *, burst: bool) -> list[str]:
    """What one worker is started with; flags of settings travel in the environment."""
    words = [sys.executable, "-m", "streamworker", "worker"]
    return [*words, *([app] if app else []), *(["--burst"] if burst else [])]


async def watch(link: int) -> None:
    """Hear the signals that the supervisor passes on; when it is gone, end this process in order: nobody else would.

    Args:
        link: file descriptor of the socket that the supervisor made.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(fileno=link) as supervisor:
        supervisor.set_inheritable(False)
        supervisor.setblocking(False)
        with suppress(OSError):
            supervisor.send(LISTENING)
        while True:
            try:
                numbers = await loop.sock_recv(supervisor, 64)
            except OSError:
                numbers = b""
            for number in numbers:
                signals.deliver(number, signals.SUPERVISOR)
            if not numbers:
                break
    log.warning("supervisor_gone", hint="this worker finishes what runs and ends")
    signals.deliver(signal.SIGTERM, signals.SUPERVISOR)
