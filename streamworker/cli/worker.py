"""``streamworker worker``: one worker in this process."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from signal import default_int_handler
from typing import Annotated, Final, NamedTuple

import anyio
import anyio.abc
from cyclopts import Parameter
from cyclopts.validators import Number

from streamworker.cli.app_loader import load_app, loop_options, with_own
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.cli.overrun import LastResort, leave, leave_threads
from streamworker.cli.streams import say
from streamworker.errors import ConfigurationError, StreamworkerError, StuckThread, UsageError
from streamworker.loops import Pause
from streamworker.redact import describe
from streamworker.settings import Address
from streamworker.settings.environment import PREFIX
from streamworker.telemetry.logs import get_logger
from streamworker.worker import QueueWorker, signals
from streamworker.worker.calls import JobThreads

log = get_logger("streamworker.worker")
supervisor_log = get_logger("streamworker.processes")

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
            with the supervisor, which tells the worker to end by itself.
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
                supervisor_log.error(
                    "worker_cannot_start", worker=number, code=code, hint="the others are stopped as well"
                )
                self._codes.append(code)
                self._pass_on(signal.SIGTERM)
                return
            if anyio.current_time() - began > STEADY:
                pause.reset()
            supervisor_log.warning("worker_ended", worker=number, code=code, hint="it is started again")
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
    """Hear the signals that the supervisor passes on; when it is gone, end this process in order.

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
    supervisor_log.warning("supervisor_gone", hint="this worker finishes what runs and ends")
    signals.deliver(signal.SIGTERM, signals.SUPERVISOR)


def worker(
    app: str | None = None,
    *,
    burst: bool = False,
    processes: Annotated[int, Parameter(validator=Number(gte=1, lte=1000))] = 1,
    supervisor: Annotated[int | None, Parameter(show=False)] = None,
    flags: WorkerFlags = WORKER,
) -> int:
    """Run a worker until SIGTERM or SIGINT: then it finishes what runs, and hands the rest back.

    Args:
        app: module:attribute, such as shop.jobs:app; STREAMWORKER_APP unless given.
        burst: End when nothing is ready any more.
        processes: Worker processes, each a consumer of its own; one that dies is started again.
        supervisor: The file descriptor of the socket of the process that started this one.
    """
    signals.exit_until_watched()
    settings = flags.settings(app=app)
    flags.export()
    if processes > 1:
        words, ports = command(app, burst=burst), addresses(settings.http, processes)
        return anyio.run(Supervisor(words, processes, burst=burst, ports=ports).run)
    loaded = load_app(settings)
    own = with_own(settings, loaded)
    made = QueueWorker(loaded, redis=None, database=None, services=None, settings=own)
    # What was imported stays for ever: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    return _run_to_the_end(made, burst, supervisor, uses_uvloop=loop_options(own)["use_uvloop"])


def _run_to_the_end(made: QueueWorker, burst: bool, supervisor: int | None, *, uses_uvloop: bool) -> int:
    """`anyio.run`, but SystemExit out of a task or a callback that a handler started does not end the worker.

    asyncio lets it out of the event loop, between two callbacks: the loop is whole, and goes on where it was.
    """
    owner, factory = os.getpid(), None
    if uses_uvloop:
        import uvloop  # noqa: PLC0415 - not there on every system

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        loop = runner.get_loop()
        JobThreads.install(loop)
        life = loop.create_task(_run(made, burst, supervisor))
        while True:
            try:
                return loop.run_until_complete(life)
            except (SystemExit, KeyboardInterrupt) as error:
                typed = isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is default_int_handler
                if life.done() or typed or os.getpid() != owner:  # a forked child ends
                    raise
                log.error(
                    "exit_ignored",
                    error=describe(error),
                    exc_info=error,
                    hint="a task or callback of a handler wants to end the process: raise another error there",
                )
                signals.call_first(loop, made.resumed)


async def _run(made: QueueWorker, burst: bool, supervisor: int | None) -> int:
    # No task group: it would wrap the errors that become exit codes.
    watcher = asyncio.create_task(watch(supervisor)) if supervisor is not None else None
    last = LastResort(made.shutdown, supervisor)
    last.start()
    code = 0
    try:
        code = await made.run(burst=burst)
        return code
    except StuckThread as error:
        say(str(error))
        leave(error.exit_code)
    except StreamworkerError as error:
        code = error.exit_code
        raise
    finally:
        last.over = True
        if watcher is not None:
            watcher.cancel()
        if made.shutdown.cut_short:
            leave_threads(code)
