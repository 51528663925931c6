"""Forks worker processes: Python and the app are imported once, so that a worker starts within milliseconds.

``python -m tests.crash.nursery`` reads one JSON object a line: ``{"env": {...}, "log": path, "uvloop": bool}``, answers
``{"born": pid}``, and tells ``{"dead": pid, "code": n}`` (negative: a signal) of each that ended. It kills what is left
when its input ends. Each child is a worker as the command line makes it: its own process, signals, exit code.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import signal
import sys
from typing import Any

import uvloop

import tests.crash.witness  # noqa: F401 - imported before forking, so that no child has to
from streamworker import StreamworkerError


def main() -> None:
    gc.collect()
    gc.freeze()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until the child has a handler for it
    alive: set[int] = set()
    orders = b""
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 1000)
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, orders = (orders + data).split(b"\n")
            for line in lines:
                alive.add(pid := _fork(json.loads(line)))
                _tell(born=pid)
        for pid in list(alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.discard(pid)
                _tell(dead=pid, code=os.waitstatus_to_exitcode(status))
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _tell(**what: int) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(0)
        )  # as the command line does until the worker listens itself
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["env"])
        code = _worker(uses_uvloop=order["uvloop"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def _worker(*, uses_uvloop: bool) -> int:
    from streamworker import QueueWorker
    from streamworker.telemetry import logs
    from tests.crash.app import app

    settings = app.resolve(None)
    logs.configure(settings.log_level, "json")
    worker = QueueWorker(app, redis=None, database=None, services=None)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if uses_uvloop else None) as runner:
            return runner.run(worker.run())
    except StreamworkerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    main()
