"""Forks worker processes: Python and the app are imported once, so that a worker starts within milliseconds.

``python -m tests.crash.nursery`` reads one JSON object a line: ``{"env": {...}, "log": path, "uvloop": bool, "fresh": bool}``, answers
``{"born": pid}``, and tells ``{"dead": pid, "code": n}`` (negative: a signal) of each that ended. It kills what is left
when its input ends. Each child runs the command line, `streamworker worker`; a ``fresh`` one in a Python of its own.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
from typing import Any, Final

import uvloop  # noqa: F401 - all of these are imported before forking, so that no child has to

import tests.crash.witness  # noqa: F401
from streamworker import cli


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
        # As the command line does, which has not come to it yet. An exception could come out of a callback of the import
        # system, which swallows it and prints a traceback; nothing is held yet that would have to be put away.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["env"])
        code = _worker(order)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


COMMAND: Final = ["worker", "tests.crash.app:app"]


def _worker(order: dict[str, Any]) -> int:
    if order["fresh"]:
        os.execv(sys.executable, [sys.executable, "-m", "streamworker", *COMMAND])
    if not order["uvloop"]:
        sys.modules["uvloop"] = None  # type: ignore[assignment] # as where it is not installed
    return cli.main(COMMAND)


if __name__ == "__main__":
    main()
