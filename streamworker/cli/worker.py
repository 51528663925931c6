"""``streamworker worker``: one worker in this process."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from functools import partial
from signal import default_int_handler
from time import monotonic
from typing import Annotated, Any, Final

import anyio
from cyclopts import Parameter
from cyclopts.validators import Number

from streamworker.cli.app_loader import load_app, loop_options, with_own
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.cli.overrun import LastResort, leave, leave_threads
from streamworker.cli.streams import say
from streamworker.cli.supervisor import LISTENING, READY, RECYCLE, RETIRE, SERVE, Supervisor
from streamworker.errors import ConfigurationError, StreamworkerError, StuckThread
from streamworker.redact import describe
from streamworker.settings import Address, Settings
from streamworker.telemetry.http import listen
from streamworker.telemetry.logs import get_logger
from streamworker.worker import QueueWorker, signals
from streamworker.worker.calls import JobThreads
from streamworker.worker.health import Inherited
from streamworker.worker.lease import rss_bytes

log = get_logger("streamworker.worker")
supervisor_log = get_logger("streamworker.processes")

LOOK: Final = 0.25
"""Seconds between two looks whether a worker is to be replaced."""
SPREAD: Final = 0.2
"""The share of a limit by which workers differ, so that a fleet that was started at once is not replaced at once."""
MB: Final = 1_048_576


class RecycleLimits:
    """When a worker is to be replaced by a new process.

    Args:
        settings: with ``max_jobs``, ``max_rss`` and ``max_age``; of jobs and age each worker takes 80 to 100 %.
    """

    def __init__(self, settings: Settings) -> None:
        share = 1 - random.uniform(0, SPREAD)  # noqa: S311 - spreads load, hides nothing
        self._jobs = math.ceil(settings.max_jobs * share) if settings.max_jobs is not None else None
        self._age = settings.max_age * share if settings.max_age is not None else None
        self._rss = settings.max_rss
        self._began = monotonic()

    @staticmethod
    def wanted(settings: Settings) -> bool:
        """Whether there is a limit."""
        return any(limit is not None for limit in (settings.max_jobs, settings.max_rss, settings.max_age))

    def begin(self) -> None:
        """The worker is ready. A memory limit that is reached already does not count: each successor would reach it."""
        if self._rss is not None and (rss := memory()) >= self._rss * MB:
            hint = (
                "it is not replaced for its memory: raise STREAMWORKER_MAX_RSS above what a worker takes at its start"
            )
            log.error("max_rss_too_small", rss_mb=rss // MB, max_rss_mb=self._rss, hint=hint)
            self._rss = None

    def reached(self, runs: int) -> str | None:
        """Which limit is reached, in words; ``None`` if none is.

        Args:
            runs: that ended on this worker.
        """
        if self._jobs is not None and runs >= self._jobs:
            return f"{runs} jobs"
        if self._age is not None and (age := monotonic() - self._began) >= self._age:
            return f"{age:.1f} s old"
        if self._rss is not None and (rss := memory()) >= self._rss * MB:
            return f"{rss // MB} MB of memory"
        return None


def memory() -> int:
    """Resident memory of this process in bytes; its peak, where the system does not say what it is now."""
    if rss := rss_bytes():
        return rss
    import resource  # noqa: PLC0415 - not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def addresses(first: Address | None, count: int) -> list[str]:
    """Where each worker answers HTTP: the port of the setting, and those after it; any free ones for port 0."""
    if first is None:
        return []
    return [str(first._replace(port=first.port + number if first.port else 0)) for number in range(count)]


def command(app: str | None, *, burst: bool) -> list[str]:
    """What one worker is started with; flags of settings travel in the environment."""
    words = [sys.executable, "-m", "streamworker", "worker"]
    return [*words, *([app] if app else []), *(["--burst"] if burst else [])]


async def watch(link: int, made: QueueWorker, limits: RecycleLimits | None) -> None:
    """Do what the supervisor says, and tell it what it must know; when it is gone, end this process in order.

    Args:
        link: file descriptor of the socket that the supervisor made.
        made: the worker of this process.
        limits: when it is to be replaced.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(fileno=link) as supervisor:
        supervisor.set_inheritable(False)
        supervisor.setblocking(False)
        _tell(supervisor, LISTENING)
        tasks = {asyncio.create_task(_report(supervisor, made, limits))}
        try:
            while words := await _words(loop, supervisor):
                for word in words:
                    if word == RETIRE:
                        tasks.add(asyncio.create_task(made.retire()))
                    elif word == SERVE:
                        made.answer_probes()
                    else:
                        signals.deliver(word, signals.SUPERVISOR)
        finally:
            for task in tasks:
                task.cancel()
    supervisor_log.warning("supervisor_gone", hint="this worker finishes what runs and ends")
    signals.deliver(signal.SIGTERM, signals.SUPERVISOR)


async def _words(loop: asyncio.AbstractEventLoop, supervisor: socket.socket) -> bytes:
    try:
        return await loop.sock_recv(supervisor, 64)
    except OSError:
        return b""


async def _report(supervisor: socket.socket, made: QueueWorker, limits: RecycleLimits | None) -> None:
    """Tell the supervisor that the worker is ready, and when it is to be replaced."""
    await made.ready.wait()
    _tell(supervisor, READY)
    if limits is None:
        return
    limits.begin()
    while (why := limits.reached(made.ended_runs)) is None:  # noqa: ASYNC110 - looking costs less than telling each job
        await asyncio.sleep(LOOK)
    log.info("worker_recycling", worker_id=made.worker_id, reached=why)
    _tell(supervisor, RECYCLE)


def _tell(supervisor: socket.socket, word: int) -> None:
    with suppress(OSError):
        supervisor.send(bytes([word]))


def worker(
    app: str | None = None,
    *,
    burst: bool = False,
    processes: Annotated[int, Parameter(validator=Number(gte=1, lte=1000))] = 1,
    supervisor: Annotated[int | None, Parameter(show=False)] = None,
    listener: Annotated[int | None, Parameter(show=False)] = None,
    succeeds: Annotated[bool, Parameter(show=False)] = False,
    flags: WorkerFlags = WORKER,
) -> int:
    """Run a worker until SIGTERM or SIGINT: then it finishes what runs, and hands the rest back.

    Args:
        app: module:attribute, such as shop.jobs:app; STREAMWORKER_APP unless given.
        burst: End when nothing is ready any more.
        processes: Worker processes, each a consumer of its own; one that dies is started again.
        supervisor: The file descriptor of the socket of the process that started this one.
        listener: The file descriptor of the socket that listens for probes.
        succeeds: A worker before this one still runs.
    """
    signals.exit_until_watched()
    settings = flags.settings(app=app)
    flags.export()
    recycles = RecycleLimits.wanted(settings)
    if processes > 1 or (recycles and supervisor is None):
        return _supervise(command(app, burst=burst), settings, processes, burst=burst, recycles=recycles)
    loaded = load_app(settings)
    own = with_own(settings, loaded)
    if not recycles and RecycleLimits.wanted(own):
        hint = "set max_jobs, max_rss and max_age as variables or flags: who replaces workers reads no app"
        log.warning("recycling_without_effect", hint=hint)
    inherited = _inherited(own, listener, succeeds=succeeds) if recycles else Inherited()
    made = QueueWorker(loaded, redis=None, database=None, services=None, settings=own, inherited=inherited)
    limits = RecycleLimits(settings) if recycles else None
    # What was imported stays for ever: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    life = partial(_run, made, burst, supervisor, limits)
    return _run_to_the_end(made, life, uses_uvloop=loop_options(own)["use_uvloop"])


def _inherited(own: Settings, listener: int | None, *, succeeds: bool) -> Inherited:
    """What the supervisor shares with this worker.

    Args:
        own: the worker's settings.
        listener: file descriptor of the socket for probes.
        succeeds: a worker before this one still runs.

    Raises:
        ConfigurationError: the app alone says where probes are answered.
    """
    if listener is None:
        if own.http is not None and own.http.port:
            raise ConfigurationError(
                f"A worker that is replaced shares its address with its successor: set STREAMWORKER_HTTP={own.http} or "
                "--http, beside App(settings=...), or leave it out there"
            )
        return Inherited(None, succeeds)
    probes = socket.socket(fileno=listener)
    probes.set_inheritable(False)
    return Inherited(probes, succeeds)


def _supervise(words: list[str], settings: Settings, count: int, *, burst: bool, recycles: bool) -> int:
    """Run workers in processes of their own."""
    ports = addresses(settings.http, count)
    with ExitStack() as stack:
        listeners = []
        if recycles and settings.http is not None:
            # Two generations of a worker overlap, and answer at one address: the socket belongs to neither.
            wanted = [settings.http._replace(port=int(port.rpartition(":")[2])) for port in ports]
            listeners = [stack.enter_context(listen(address)) for address in wanted]
            ports = [
                str(address._replace(port=each.getsockname()[1]))
                for address, each in zip(wanted, listeners, strict=True)
            ]
        return anyio.run(Supervisor(words, count, burst=burst, ports=ports, listeners=listeners).run)


def _run_to_the_end(made: QueueWorker, run: Callable[[], Coroutine[Any, Any, int]], *, uses_uvloop: bool) -> int:
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
        life = loop.create_task(run())
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


async def _run(made: QueueWorker, burst: bool, supervisor: int | None, limits: RecycleLimits | None) -> int:
    # No task group: it would wrap the errors that become exit codes.
    watcher = asyncio.create_task(watch(supervisor, made, limits)) if supervisor is not None else None
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
