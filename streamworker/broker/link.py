"""The connections of one broker, and how long they were down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from time import monotonic
from typing import Any, Final

from streamworker.broker import scripts
from streamworker.broker.client import Address, understood
from streamworker.errors import Unreachable

BLOCK: Final = 5.0
"""Most seconds of one blocking read: Redis 6.2 does not tell a blocked reader that its stream is gone."""


class Link:
    """Commands, the reader and the lease thread's client to one address; all errors come out as ours."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.commands: Final = address.commands()
        self.reader = address.reader(BLOCK, self.commands)
        self._branches: list[tuple[Link, str]] = []
        self.lease_client = address.blocking()
        self._down_since: float | None = None

    def named(self, name: str) -> None:
        """From now on CLIENT LIST shows the reader and the lease thread's client under this name."""
        address = self.address.renamed(name)
        self.reader, self.lease_client = address.reader(BLOCK, self.commands), address.blocking()
        for branch, key in self._branches:
            branch.reader = address.reader(BLOCK, self.commands, key)

    def branch(self, key: str) -> Link:
        """The same link with a reader of its own, for the slot of a key."""
        other = copy(self)
        other._branches = []
        other.reader = self.address.reader(BLOCK, self.commands, key)
        self._branches.append((other, key))
        return other

    async def unblock(self) -> None:
        """End blocking reads."""
        for link in (self, *(branch for branch, _ in self._branches)):
            with self.watched():
                await link.reader.unblock()

    async def close(self) -> None:
        """Close all connections."""
        for link in (self, *(branch for branch, _ in self._branches)):
            await link.reader.close()
        await self.commands.aclose()
        self.lease_client.close()

    async def run(self, script: scripts.Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script on a command connection."""
        with self.watched():
            return await script(self.commands, keys, args)

    async def read(self, script: scripts.Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script on the reader's connection."""
        with self.watched():
            return await script(self.reader, keys, args)

    def in_thread(self, script: scripts.Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script from the lease thread."""
        with self.watched():
            return script.blocking(self.lease_client.execute_command, keys, args)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Translate errors, and note since when nothing gets through."""
        started = monotonic()
        try:
            with understood(self.address):
                yield
        except Unreachable:
            if self._down_since is None:
                self._down_since = started
            raise

    def outage(self) -> float:
        """Seconds the link was down before it last came back; asked once, then 0 again."""
        if self._down_since is None:
            return 0.0
        seconds, self._down_since = monotonic() - self._down_since, None
        return seconds

    def longest_outage(self) -> float:
        """`outage` of this link and of its branches."""
        return max(self.outage(), *(branch.outage() for branch, _ in self._branches), 0.0)
