"""One worker process of the demo: what ``streamworker worker`` does, and it ends when its parent does."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import uvloop

from streamworker import QueueWorker, Settings
from streamworker.demo.app import app
from streamworker.telemetry.logs import configure


def _end_with_parent() -> None:
    """The parent holds the other end of our standard input and never writes to it."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read(): its lock would make the interpreter abort at its own end
    os._exit(1)  # no clean end: the servers are gone as well


def main() -> int:
    """Work until SIGTERM; returns the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = Settings.load()
    configure(settings.log_level, settings.log_format)
    worker = QueueWorker(app, redis=None, database=None, services=None, settings=settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(worker.run())


if __name__ == "__main__":
    sys.exit(main())
