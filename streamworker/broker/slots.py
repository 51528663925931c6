"""Which node of a cluster serves a key, and what its refusals mean. No I/O here."""

from __future__ import annotations

import time
from bisect import bisect_right
from functools import lru_cache
from typing import Any, Final

from redis import exceptions as redis_errors
from redis.crc import key_slot

from streamworker.broker.forms import Form, Host, NotExecuted
from streamworker.errors import ConfigurationError

PATIENCE: Final = 8
"""Redirections and refusals one command bears; the pauses between them add up to about 2 s."""
PAUSE: Final = 0.05
_KEYLESS: Final = frozenset({"ACL", "CLIENT", "CLUSTER", "CONFIG", "INFO", "PING", "PUBLISH", "SCAN", "TIME"})


@lru_cache(8192)
def slot_of(key: str) -> int:
    """The slot of a key."""
    return int(key_slot(key.encode()))


def key_of(args: tuple[Any, ...]) -> str | None:
    """The first key of a command of ours; ``None`` if any node may answer it."""
    name, _, sub = str(args[0]).partition(" ")
    if name in _KEYLESS:
        return None
    at = 2 if name in ("XINFO", "XGROUP", "OBJECT", "MEMORY") and not sub else 1
    if name in ("EVAL", "EVALSHA"):
        at = 3 if int(args[2]) else len(args)
    elif name in ("XREADGROUP", "XREAD"):
        at = args.index("STREAMS") + 1
    key = args[at] if at < len(args) else None
    return key.decode() if isinstance(key, bytes) else None if key is None else str(key)


class Slots:
    """Which node serves which slot: shared by the event loop and the lease thread, always replaced as a whole.

    Args:
        form: a form of the kind "cluster".
    """

    def __init__(self, form: Form) -> None:
        self.form: Final = form
        self._ranges: tuple[list[int], list[tuple[int, Host]]] = ([], [])
        self._moved: dict[int, Host] = {}
        self._doubted: dict[Host, float] = {}
        self.stale = True

    def node(self, slot: int) -> Host | None:
        """Who serves a slot, as far as is known."""
        moved = self._moved.get(slot)
        if moved is not None:
            return moved
        starts, ranges = self._ranges
        at = bisect_right(starts, slot) - 1
        return ranges[at][1] if at >= 0 and slot <= ranges[at][0] else None

    @property
    def masters(self) -> list[Host]:
        """Everybody who serves slots."""
        return list(dict.fromkeys([*(host for _, host in self._ranges[1]), *self._moved.values()]))

    def candidates(self) -> list[Host]:
        """Whom to ask for the map: who is known to serve, then the URL's hosts; who was silent lately comes last."""
        known = dict.fromkeys([*self.masters, *self.form.hosts])
        return sorted(known, key=lambda host: self._doubted.get(host, 0.0))

    def doubt(self, host: Host) -> None:
        """It did not answer: the map may have changed."""
        self._doubted[host] = time.monotonic()
        self.stale = True

    def moved(self, slot: int, host: Host) -> None:
        """A node says who serves a slot; the others of the map are looked up at the next chance."""
        self._moved = {**self._moved, slot: host}
        self.stale = True

    def load(self, reply: Any, asked: Host) -> None:
        """Take the answer to CLUSTER SLOTS; a node that does not know its own name is where it was asked."""
        found = []
        for first, last, (name, port, *_), *_replicas in reply:
            host = name.decode() if isinstance(name, bytes) else name
            found.append((int(first), (int(last), (host or asked[0], int(port)))))
        found.sort()
        self._ranges = ([first for first, _ in found], [rest for _, rest in found])
        self._moved = {}
        self._doubted.pop(asked, None)
        self.stale = False


class Route:
    """Where one command goes, by what the nodes answered so far."""

    def __init__(self, slots: Slots, key: str | None) -> None:
        self._slots = slots
        self.slot: Final = None if key is None else slot_of(key)
        self.asking: Host | None = None
        self._tries = 0

    def home(self) -> Host | None:
        """Where to send it; ``None``: the map has to be looked up first."""
        if self._slots.stale:
            return None
        if self.slot is None:
            return self._slots.candidates()[0]
        return self._slots.node(self.slot)

    def uncovered(self) -> float:
        """The map is fresh and nobody serves the slot: seconds to wait before looking again."""
        self._slots.stale = True
        return self._again(f"no node serves slot {self.slot}")

    def refused(self, error: Exception, host: Host) -> float:
        """Judge an error: seconds to wait before the command is sent again, which is only done if it was not executed.

        Raises:
            Exception: ``error``, if it is none of a cluster's refusals.
            NotExecuted: the cluster refused too often.
        """
        self.asking = None
        if isinstance(error, redis_errors.MovedError):
            self._slots.moved(error.slot_id, (error.host or host[0], error.port))
            self._again(str(error))
            return 0.0
        if isinstance(error, redis_errors.AskError):
            self.asking = (error.host or host[0], error.port)
            self._again(str(error))
            return 0.0
        if isinstance(error, redis_errors.ClusterDownError | redis_errors.TryAgainError):
            self._slots.stale = True
            return self._again(str(error))
        if isinstance(error, redis_errors.ConnectionError | redis_errors.TimeoutError | OSError):
            self._slots.doubt(host)
        raise error

    def _again(self, why: str) -> float:
        self._tries += 1
        if self._tries > PATIENCE:
            raise NotExecuted(why)
        return float(PAUSE * min(self._tries, 8))


class Lookup:
    """One round of asking nodes for the map."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._last: Exception | None = None

    def failed(self, error: Exception, host: Host) -> None:
        if "cluster support disabled" in str(error):
            raise ConfigurationError(
                f"Redis at {self._slots.form} is no cluster: write redis:// instead of redis+cluster:// in REDIS_URL"
            ) from error
        if isinstance(error, redis_errors.AuthenticationError | redis_errors.NoPermissionError):
            raise error
        self._slots.doubt(host)
        self._last = error

    def nobody(self) -> Exception:
        # The word "connecting" tells the publisher that nothing was sent.
        return redis_errors.ConnectionError(f"no node of the cluster answers; the last, connecting to it: {self._last}")
