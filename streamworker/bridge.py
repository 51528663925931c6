"""The loop of the bridge: moves jobs from lists into streams, and blocks while the lists are empty.

An error is logged and followed by a pause. A job is in the list or in the stream at any moment, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import anyio
import msgspec

from streamworker.errors import ConfigurationError, StreamworkerError
from streamworker.job import Level, Moved
from streamworker.loops import Pause
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.bridge")

LINGER: Final = 0.002
"""Seconds before the second look at lists that were just emptied: cheaper than a blocking read while producers push."""
REFUSALS: Final = 3
"""Times in a row a password or a permission may be refused: an operator may be changing it right now."""


class Mover(Protocol):
    """The broker's moves, as the loop uses them."""

    async def open(self) -> None:
        """Connect and check the server.

        Raises:
            ConfigurationError: a server answers that cannot be used.
            Unreachable: no server answers.
        """

    async def move(self, *, everything: bool = False) -> Sequence[Moved]:
        """Move one batch; returns the result for each level that was looked at.

        Args:
            everything: look at every list, not only at those that may hold jobs.

        Raises:
            ConfigurationError: the server refuses us for good.
            Unreachable: no server answers.
        """

    async def held(self) -> int:
        """How many jobs workers of list mode have claimed: each may return to its list."""

    async def wait(self) -> None:
        """Wait until a list may hold jobs, or a timeout.

        Raises:
            ConfigurationError: the server refuses us for good.
            Unreachable: no server answers.
        """

    async def interrupt(self) -> None:
        """End `wait` soon, without cancelling a command. Call it again until `wait` has ended."""

    async def close(self) -> None:
        """Close the connections."""


class BridgeTotals(msgspec.Struct):
    """What a bridge has moved. A batch whose reply was lost is moved, and not counted.

    Attributes:
        jobs: moved.
        bytes: of these jobs.
        left: jobs that waited in each level at the last look.
        held: jobs that workers of list mode had claimed; known only while draining.
        stuck: levels whose jobs cannot be moved now, and why.
    """

    jobs: int = 0
    bytes: int = 0
    left: dict[tuple[str, Level], int] = {}
    held: int = 0
    stuck: dict[tuple[str, Level], str] = {}

    def note(self, moved: Sequence[Moved]) -> None:
        """Add a batch."""
        for each in moved:
            spot = (each.queue, each.level)
            self.jobs += each.jobs
            self.bytes += each.bytes
            self.left[spot] = each.left
            self.stuck.pop(spot, None)
            if each.trouble:
                self.stuck[spot] = each.trouble


class BridgeLoop:
    """Runs a bridge until it is stopped.

    Args:
        mover: moves the jobs; its owner opens and closes it.
        drain: stop when every list is empty, and no worker of list mode has claimed a job.
    """

    def __init__(self, mover: Mover, *, drain: bool = False) -> None:
        self._mover = mover
        self._drain = drain
        self._stopping, self._ended = anyio.Event(), anyio.Event()
        self.totals: Final = BridgeTotals()

    def stop(self) -> None:
        """Move no more than the batch in flight."""
        self._stopping.set()

    async def run(self) -> None:
        """Move until stopped, or drained.

        Raises:
            ConfigurationError: the server keeps refusing us for good.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self._unblock)
            try:
                await self._loop()
            finally:
                self._ended.set()
                self._stopping.set()

    async def _unblock(self) -> None:
        """Once stopped, interrupt the wait; repeated, since it may begin just after an interrupt."""
        await self._stopping.wait()
        while not self._ended.is_set():
            try:
                await self._mover.interrupt()
            except StreamworkerError as error:  # the wait ends by its own timeout
                log.warning("unblock_failed", error=str(error))
            with anyio.move_on_after(0.05):
                await self._ended.wait()

    async def _loop(self) -> None:
        pause, refusals = Pause(), 0
        while not self._stopping.is_set():
            try:
                if await self._turn():
                    break
                pause.reset()
                refusals = 0
            except StreamworkerError as error:
                log.error("bridge_error", error=str(error))
                refusals = refusals + 1 if isinstance(error, ConfigurationError) else 0
                if refusals >= REFUSALS:
                    raise
                await pause.wait(self._stopping)

    async def _turn(self) -> bool:
        """Move one batch, and wait if there is nothing more; True if all is drained."""
        moved = await self._mover.move(everything=self._drain)
        self.totals.note(moved)
        if self._drain and all(each.lasting or not (each.jobs or each.left) for each in moved):
            self.totals.held = await self._mover.held()
            if not self.totals.held:
                return True
        if any(each.left and not each.trouble for each in moved):
            return False
        if any(each.jobs for each in moved):
            await anyio.sleep(LINGER)
        elif not self._stopping.is_set():
            await self._mover.wait()
        return False
