"""``streamworker worker``: one worker in this process."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from types import FrameType
from typing import Any

import anyio

from streamworker.cli import say
from streamworker.cli.loading import load_app, with_own
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.errors import StuckThread, UsageError
from streamworker.worker import QueueWorker


def worker(app: str | None = None, *, burst: bool = False, processes: int = 1, flags: WorkerFlags = WORKER) -> int:
    """Run a worker until SIGTERM or SIGINT: then it finishes what runs, and hands the rest back.

    Args:
        app: module:attribute, such as shop.jobs:app; STREAMWORKER_APP unless given.
        burst: End when nothing is ready any more.
        processes: Worker processes; only 1 so far.
    """
    if processes != 1:
        raise UsageError(f"--processes={processes} is not there yet: start several workers, each is a process")
    # Until the worker listens itself nothing is there to drain; process 1 of a container would ignore the signal.
    signal.signal(signal.SIGTERM, _leave)
    settings = flags.settings(app=app)
    flags.export()
    loaded = load_app(settings)
    made = QueueWorker(loaded, redis=None, database=None, services=None, settings=with_own(settings, loaded))
    # What was imported stays for ever: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    return anyio.run(_run, made, burst, backend_options={"use_uvloop": importlib.util.find_spec("uvloop") is not None})


async def _run(made: QueueWorker, burst: bool) -> int:
    try:
        return await made.run(burst=burst)
    except StuckThread as error:
        say(str(error))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(error.exit_code)  # leaving the loop in order would wait for the handler that does not end


def _leave(_signal: int, _frame: FrameType | None) -> Any:
    sys.exit(0)
