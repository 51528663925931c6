"""Names of keys. The braces are literal: all keys of one queue share a Redis Cluster slot."""

from __future__ import annotations

from typing import Final

import msgspec

from streamworker.job import LEVELS, Level


class QueueKeys(msgspec.Struct, frozen=True):
    """The keys of one queue in stream mode; ``namespace`` goes before each, as it is."""

    queue: str
    namespace: str = ""

    @property
    def base(self) -> str:
        """What all keys of the queue start with."""
        return f"{self.namespace}stream:{{{self.queue}}}"

    def stream(self, level: Level) -> str:
        """Ready jobs of a level."""
        return self.base if level == "normal" else f"{self.base}:{level}"

    @property
    def streams(self) -> list[str]:
        """The three streams, in the order they are taken."""
        return [self.stream(level) for level in LEVELS]

    @property
    def due(self) -> str:
        """Sorted set: member to the ms at which it is due."""
        return f"{self.base}:due"

    @property
    def bodies(self) -> str:
        """Hash: member of the due set to bytes."""
        return f"{self.base}:bodies"

    @property
    def dead(self) -> str:
        """Stream of dead letters."""
        return f"{self.base}:dead"

    @property
    def meta(self) -> str:
        """Hash: epoch, paused, sweep cursors and tokens."""
        return f"{self.base}:meta"

    def key(self, name: str) -> str:
        """A deduplication key."""
        return f"{self.base}:key:{name}"


WORKER_KEY: Final = "streamworker:worker:"


def worker_key(namespace: str, worker_id: str) -> str:
    """The hash with a worker's heartbeat."""
    return f"{namespace}{WORKER_KEY}{worker_id}"
