"""The worker processes of the demo."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import anyio
import anyio.abc

from streamworker.demo.children import start

STOP_WITHIN: Final = 20.0
"""Seconds workers may take to drain after SIGTERM; they have nothing to do by then."""


class Member:
    """One worker process."""

    def __init__(self, name: str, process: anyio.abc.Process, log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self.killed = False
        self._process = process
        self._log = log

    @property
    def exit_code(self) -> int | None:
        """``None`` while it runs; negative: the number of the signal that ended it."""
        return self._process.returncode

    @property
    def alive(self) -> bool:
        """It runs and nobody killed it."""
        return not self.killed and self.exit_code is None

    @property
    def last_words(self) -> str:
        """The last line of its log, for error messages."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.exit_code is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL: no chance to finish or to hand anything back; returns when it is dead."""
        self.killed = True
        self.signal(signal.SIGKILL)
        await self._process.wait()

    async def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        return await self._process.wait()


async def launch(stack: AsyncExitStack, count: int, logs: Path, env: Mapping[str, str]) -> list[Member]:
    """Start worker processes; killed when ``stack`` is left.

    Args:
        stack: ends them.
        count: how many.
        logs: directory for their logs.
        env: their settings.
    """
    members = []
    for number in range(1, count + 1):
        name, log = f"worker-{number}", logs / f"worker-{number}.log"
        process = await start(
            stack, "streamworker.demo.worker", log=log, env={**env, "STREAMWORKER_WORKER_ID": f"demo-{number}"}
        )
        members.append(Member(name, process, log))
    return members


async def stop(members: list[Member]) -> None:
    """SIGTERM for all; returns when they are gone, or after `STOP_WITHIN` seconds."""
    for member in members:
        member.signal(signal.SIGTERM)
    with anyio.move_on_after(STOP_WITHIN):
        for member in members:
            await member.wait()
