"""``streamworker worker``: one worker in this process."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from signal import default_int_handler
from typing import Annotated

import anyio
from cyclopts import Parameter
from cyclopts.validators import Number

from streamworker import signals
from streamworker.cli import say
from streamworker.cli.loading import load_app, loop_options, with_own
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.cli.overrun import LastResort, leave, leave_threads
from streamworker.cli.processes import Supervisor, addresses, command, watch
from streamworker.errors import StreamworkerError, StuckThread
from streamworker.redact import describe
from streamworker.task import JobThreads
from streamworker.telemetry.logs import get_logger
from streamworker.worker import QueueWorker

log = get_logger("streamworker.worker")


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
