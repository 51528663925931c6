"""``streamworker worker --processes N``: several workers side by side, each a process with an id of its own.

The supervisor imports no app and talks to no server: what it may not do, it cannot do wrong. A worker that ends by
itself is started again after a pause; one that was told to end is not.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import anyio
import anyio.abc

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
WATCH: Final = 1.0
"""Seconds between looks at whether the supervisor still lives."""


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
        self._running: dict[int, anyio.abc.Process] = {}
        self._codes: list[int] = []

    async def run(self) -> int:
        """Until all have ended; returns the worst of their last exit codes."""
        async with anyio.create_task_group() as group:
            await group.start(self._signals)
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
        # A session of its own: Ctrl-C reaches the supervisor alone, which passes it on once; twice would cancel jobs.
        async with await anyio.open_process(
            [*self._command, "--supervisor", str(os.getpid())],
            stdin=None, stdout=None, stderr=None, env=env, start_new_session=True,
        ) as process:  # fmt: skip
            self._running[number] = process
            if self._stopping.is_set():
                _send(process, signal.SIGTERM)
            try:
                code = await process.wait()
            finally:
                del self._running[number]
        if code == -signal.SIGTERM and self._stopping.is_set():
            return 0  # it was told to end before it could listen, and held nothing yet
        return code if code >= 0 else 128 - code

    async def _signals(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            task_status.started()
            async for number in received:
                self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        self._stopping.set()
        for process in list(self._running.values()):
            _send(process, number)


def _send(process: anyio.abc.Process, number: int) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.Signals(number))


def addresses(first: Address | None, count: int) -> list[str]:
    """Where each worker answers HTTP: the port of the setting, and those after it; any free ones for port 0."""
    if first is None:
        return []
    return [str(first._replace(port=first.port + number if first.port else 0)) for number in range(count)]


def command(app: str | None, *, burst: bool) -> list[str]:
    """What one worker is started with; flags of settings travel in the environment."""
    words = [sys.executable, "-m", "streamworker", "worker"]
    return [*words, *([app] if app else []), *(["--burst"] if burst else [])]


async def watch(supervisor: int) -> None:
    """End this process in order when the process that started it is gone: nobody else would ever tell it to."""
    while os.getppid() == supervisor:  # noqa: ASYNC110 - the parent's end is no event here
        await anyio.sleep(WATCH)
    log.warning("supervisor_gone", hint="this worker finishes what runs and ends")
    os.kill(os.getpid(), signal.SIGTERM)
