"""The last resort of a worker's process: it ends, whatever users' code holds, and says where that stands.

A worker ends by itself what it can reach from its event loop. What blocks the loop, or Python's own way out (threads of
executors, tasks that swallow their cancellation, exit handlers), is seen from a thread here.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from time import monotonic
from typing import Final, NoReturn

from streamworker.cli.supervisor import RETIRE, SERVE
from streamworker.errors import StuckThread
from streamworker.telemetry.logs import get_logger
from streamworker.worker import Shutdown, signals, stacks

log = get_logger("streamworker.worker")

LOOK: Final = 0.25
"""Seconds between looks."""
BLOCKED: Final = 1.0
"""Seconds of silence after which the event loop counts as blocked."""
PATIENCE: Final = 30.0
"""Seconds more for a worker whose event loop turns: it is a server that keeps it, and it knows its own limits."""
LAST_WORDS: Final = 1.0
"""Seconds for the last line of the log: the thread that blocks may hold its lock."""


class LastResort:
    """Ends this process when its worker should have ended and has not.

    Args:
        shutdown: the worker's.
        link: file descriptor of the socket through which a supervisor passes signals on; ``None`` without one.
    """

    def __init__(self, shutdown: Shutdown, link: int | None) -> None:
        self._shutdown = shutdown
        self._link = socket.socket(fileno=os.dup(link)) if link is not None else None
        self._main_thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()
        self._turned = monotonic()
        self._unread: list[tuple[int, float]] = []
        self.over = False
        """The worker has ended, and everything is settled: only Python's way out is left."""

    def start(self) -> None:
        """Start to look."""
        threading.Thread(target=self._run, name="streamworker-last-resort", daemon=True).start()

    def _run(self) -> None:
        signals.leave_to_main()
        asked = 0.0
        while True:
            if self._turned >= asked:
                asked = monotonic()
                with suppress(RuntimeError):  # it is closed
                    self._loop.call_soon_threadsafe(self._answer)
            threading.Event().wait(LOOK)
            now = monotonic()
            blocked = self._turned < asked and now - asked > BLOCKED
            told = self._told(now) if blocked else []
            end = self._shutdown.end(began=told[0] if told else None, hurried=told[1] if len(told) > 1 else None)
            if now > end and (blocked or self.over or now > end + PATIENCE):
                self._end()

    def _answer(self) -> None:
        self._turned = monotonic()

    def _told(self, now: float) -> list[float]:
        """When signals came that the event loop may not have heard yet."""
        if self._link is not None:
            with suppress(OSError):  # nothing there
                numbers = self._link.recv(64, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                new = numbers[len(self._unread) :] if numbers else bytes([signal.SIGTERM] * (not self._unread))
                self._unread += [(number, now) for number in new]
        told = [(number, at) for number, at in [*signals.arrivals, *self._unread] if number != SERVE]
        return [at for number, at in told if number not in (signals.HANG_UP, RETIRE)][:2] or [at for _, at in told[:1]]

    def _end(self) -> NoReturn:
        where, threads = stacks.of_thread(self._main_thread), stacks.busy_threads()
        last = threading.Thread(target=_say, args=(where, threads), daemon=True)
        last.start()
        last.join(LAST_WORDS)
        os._exit(StuckThread.exit_code)


def _say(where: str, threads: list[str]) -> None:
    log.error("process_overran", where=where, threads=threads, hint="the process ends here, in the middle of that")
    _flush()


def leave_threads(code: int) -> None:
    """End the process now if threads go on with jobs that were handed back; returns if there are none."""
    threads = stacks.busy_threads()
    if not threads:
        return
    log.warning("threads_cut_short", threads=threads, hint="their jobs were handed back and run elsewhere")
    with suppress(Exception):
        atexit._run_exitfuncs()  # what exporters and logs hold; Python itself would wait for the threads first
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process now: leaving in order would wait for what does not end."""
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
