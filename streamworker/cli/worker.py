"""``streamworker worker``: one worker in this process."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from typing import Annotated

import anyio
from cyclopts import Parameter
from cyclopts.validators import Number

from streamworker import signals
from streamworker.cli import say
from streamworker.cli.loading import load_app, loop_options, with_own
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.cli.processes import Supervisor, addresses, command, watch
from streamworker.errors import StuckThread
from streamworker.worker import QueueWorker


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
    return anyio.run(_run, made, burst, supervisor, backend_options=loop_options(own))


async def _run(made: QueueWorker, burst: bool, supervisor: int | None) -> int:
    # No task group: it would wrap the errors that become exit codes.
    watcher = asyncio.create_task(watch(supervisor)) if supervisor is not None else None
    try:
        return await made.run(burst=burst)
    except StuckThread as error:
        say(str(error))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(error.exit_code)  # leaving the loop in order would wait for the handler that does not end
    finally:
        if watcher is not None:
            watcher.cancel()
