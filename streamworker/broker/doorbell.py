"""Waiting for jobs in lists: BLMOVE of a list's last element to where it lies already, on one connection per list.

The server wakes whoever waits so, and nothing is taken: whatever becomes of the connection or of the reply, no job is
on its way. A wait that nothing ended goes on while the worker works, and tells of its news the next time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Final

import anyio

from streamworker.broker.client import understood
from streamworker.broker.cluster import ClusterReader
from streamworker.broker.link import Link
from streamworker.broker.reactions import row_of
from streamworker.broker.reader import Reader
from streamworker.errors import StreamworkerError

BLOCK: Final = 30.0
"""Seconds one wait of a single list takes; more lists wait longer, so that all together ask the server rarely."""
LAST_CALL: Final = 1.0
"""Seconds a wait may take to end after it was unblocked."""


class Doorbells:
    """One bell per list, put up when it is first waited for.

    Args:
        link: the connections.
        count: most bells there will be.
    """

    def __init__(self, link: Link, count: int) -> None:
        self._link = link
        self._block = max(BLOCK, 3.0 * count)
        self._readers: dict[str, Reader | ClusterReader] = {}
        self._waits: dict[str, asyncio.Task[bool]] = {}
        self._recalled: asyncio.Future[None] | None = None

    async def ring(self, keys: Collection[str], wait: float) -> bool:
        """Wait until one of the lists may hold something, at most ``wait`` seconds; False if none does.

        Raises:
            Unreachable: the server is gone.
            StreamworkerError: a list cannot be waited for.
        """
        for key in keys:
            if key not in self._readers:
                self._readers[key] = self._link.address.reader(self._block, self._link.commands)
            if key not in self._waits:
                # Tasks of asyncio's own: a wait outlives this call, which no task group allows.
                self._waits[key] = asyncio.ensure_future(self._wait(key))
        watched = {self._waits[key]: key for key in keys}
        self._recalled = asyncio.get_running_loop().create_future()
        ends: list[asyncio.Future[Any]] = [*watched, self._recalled]
        await asyncio.wait(ends, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        self._recalled = None
        done = [task for task in watched if task.done()]
        for task in done:
            del self._waits[watched[task]]
        failures = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
        if failures:
            raise failures[0]
        return any(not task.cancelled() and task.result() for task in done)

    async def _wait(self, key: str) -> bool:
        reader = self._readers[key]
        try:
            with understood(self._link.address):
                reply = await reader.execute_command("BLMOVE", key, key, "RIGHT", "RIGHT", self._block)
        except StreamworkerError as error:
            row = row_of(error.__cause__) if error.__cause__ is not None else None
            if row is not None and row.name == "OOM":  # BLMOVE could grow, and so is refused while memory is out
                await anyio.sleep(LAST_CALL)
                return True
            await reader.close()  # whatever it was, the next wait finds its server anew
            raise
        return reply is not None

    def recall(self) -> None:
        """End `ring` now; the lists are waited for on."""
        if self._recalled is not None and not self._recalled.done():
            self._recalled.set_result(None)

    async def unblock(self) -> None:
        """End all waits soon."""
        for key in [key for key, wait in self._waits.items() if not wait.done()]:
            with understood(self._link.address):
                await self._readers[key].unblock()

    async def close(self) -> None:
        """End all waits and close their connections."""
        waits = [wait for wait in self._waits.values() if not wait.done()]
        if waits:
            with suppress(StreamworkerError), anyio.move_on_after(LAST_CALL):
                await self.unblock()
                await asyncio.wait(waits)
            for wait in waits:
                wait.cancel()
        if self._waits:
            await asyncio.gather(*self._waits.values(), return_exceptions=True)
        self._waits.clear()
        for reader in self._readers.values():
            await reader.close()
        self._readers.clear()
