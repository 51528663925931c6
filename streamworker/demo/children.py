"""Child processes of the demo: they see our modules and none of the user's settings, and end when we do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import anyio.abc


async def start(
    stack: AsyncExitStack, module: str, *, log: Path, env: Mapping[str, str] | None = None
) -> anyio.abc.Process:
    """Start ``python -m module`` with pipes for standard input and output; killed when ``stack`` is left.

    In a session of its own, so that a Ctrl-C in the terminal reaches the demo alone, which ends its children in order.

    Args:
        stack: ends the process.
        module: of ours.
        log: file its standard error is added to.
        env: goes over the environment.
    """
    with log.open("ab") as errors:
        process = await anyio.open_process(
            # -P: a file email.py in the directory where somebody happens to be must not become the standard library's.
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**environment(os.environ), **(env or {})},
            start_new_session=True,
        )
    stack.push_async_callback(end, process)
    return process


async def end(process: anyio.abc.Process) -> None:
    """Kill a process if it still runs, and wait for its end."""
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            process.kill()
        await process.aclose()


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: the user's without what configures streamworker, and with our module path."""
    ours = ("STREAMWORKER_", "REDIS_URL", "DATABASE_URL", "PYTHONPATH")
    kept = {name: value for name, value in env.items() if not name.startswith(ours)}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
