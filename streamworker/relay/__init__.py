"""The two sides of a relay: the outbox, where jobs wait in the ledger, and the dispatcher, which puts them on Redis.

A relay needs no more of PostgreSQL and Redis than is said here; both implement it, and neither knows the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from streamworker.job import Level


class Dispatch(msgspec.Struct, frozen=True):
    """A job out of the ledger on its way to its queue. (id, hop) is what it is remembered by."""

    id: str
    hop: int
    level: Level
    body: bytes


class Dispatched(msgspec.Struct, frozen=True):
    """What became of jobs that were dispatched.

    Attributes:
        epoch: identity of the queue they lie in.
        there: per job whether it is in the queue now, added by this call or an earlier one.
        error: why some are not.
    """

    epoch: str
    there: list[bool]
    error: str = ""


class Pulse(msgspec.Struct, frozen=True):
    """What tells whether a queue lost jobs.

    Attributes:
        queue: whose.
        epoch: its identity; empty if it has none, as after everything was deleted.
        relayed: jobs that relays have added, ever.
        server: identity of the running server; empty if it is not told.
        held: the database pauses it.
    """

    queue: str
    epoch: str
    relayed: int
    server: str
    held: bool


class Dispatcher(Protocol):
    """What a relay needs: jobs out of the ledger are added at most once, and lost ones are noticed.

    Every method raises `Unreachable` when no server answers.
    """

    async def dispatch(self, queue: str, jobs: Sequence[Dispatch], until: float) -> Dispatched | None:
        """Add jobs, each at most once per (id, hop), however often this is repeated before `forget`.

        Args:
            queue: where to.
            jobs: in order.
            until: monotonic seconds after which nothing must be added any more; judged by the server, so that it
                holds for a process that is frozen in between.

        Returns:
            What became of them; ``None`` if it was too late.
        """

    async def forget(self, queue: str, jobs: Sequence[Dispatch]) -> None:
        """The jobs are noted as dispatched: they need not be remembered any more."""

    async def pulses(self, queues: Sequence[str]) -> list[Pulse]:
        """One per queue, in order."""

    async def found(self, queue: str) -> None:
        """Give a queue its identity, if it has none."""

    async def hold(self, queue: str, *, held: bool) -> None:
        """Pause a queue on behalf of the database, or take that back."""

    def ids(self, queue: str) -> AsyncIterator[list[str]]:
        """Ids of all jobs that lie in the queue, ready, held or delayed; some may be told twice."""

    async def later(self, queue: str, hops: Mapping[str, int]) -> set[str]:
        """Ids of those jobs that are in the queue at a later hop than the one given: ready, held or delayed.

        What is in the queue is read from end to end, and remembered for ten times as long as that took.

        Args:
            queue: whose jobs.
            hops: id to hop.
        """

    async def promote(self, queues: Sequence[str]) -> float:
        """Move due jobs of the queues; returns the seconds until it should be called again."""

    async def queues(self) -> list[str]:
        """Names of all queues that exist on the server."""

    async def close(self) -> None:
        """Close the connections."""


class Taken(msgspec.Struct, frozen=True):
    """A job that this relay is dispatching: what of it goes to its queue."""

    id: str
    queue: str
    level: Level
    hop: int
    body: bytes


class KnownQueue(msgspec.Struct, frozen=True):
    """What the ledger last saw of a queue, and whether its jobs are due to be compared with those that lie there."""

    name: str
    is_active: bool
    epoch: str
    relayed: int
    server: str
    due: bool


class Lost(msgspec.Struct, frozen=True):
    """What became of jobs that Redis lost.

    Attributes:
        queued: ids of those that are queued again.
        locked: ids of those that could not be: a run of theirs is in its transaction.
    """

    queued: list[str]
    locked: list[str]


class Outbox(Protocol):
    """What a relay needs of the ledger. Every method raises `Unreachable` when no server answers."""

    async def claim(self) -> list[Taken]:
        """Take due jobs for dispatching, in order: they are at their next hop then. The unreadable ones are dead."""

    async def retake(self) -> list[Taken]:
        """Take over jobs that a relay left half dispatched a while ago; their hop stays."""

    async def next_due(self) -> float | None:
        """Seconds until the next queued job is due; ``None`` if there is none."""

    async def run_now(self, queues: Sequence[str]) -> int:
        """Queued jobs of these queues are due now; returns how many were not."""

    async def queued(self, queues: Sequence[str]) -> tuple[int, int]:
        """How many jobs of these queues are queued: (due, later)."""

    async def note(self, jobs: Sequence[Taken], epochs: Sequence[str]) -> set[tuple[str, str]]:
        """The jobs are in their queues, each in the one with that epoch.

        Returns:
            (queue, id) of jobs that could not be noted yet, because a run of theirs has locked them.
        """

    async def meet(self, queues: Mapping[str, str]) -> None:
        """Make sure that the queues are known; the epochs count only for those that have none yet."""

    async def queues(self) -> list[KnownQueue]:
        """What is known of every queue."""

    async def observe(
        self, known: KnownQueue, *, epoch: str, relayed: int, server: str, recheck: tuple[float, int] | None
    ) -> bool:
        """Note what was seen of a queue, unless somebody else did since ``known``; returns whether it was noted.

        Args:
            known: what was known before.
            epoch: its identity.
            relayed: jobs added by relays, ever.
            server: whose it is.
            recheck: compare its jobs in so many seconds, so many times; ``None``: no need.
        """

    async def recheck(self, queue: str, within: float) -> datetime | None:
        """Take the due comparison of a queue for ``within`` seconds: now, or ``None`` if somebody else has it."""

    async def rechecked(self, queue: str, again: float, *, done: bool = True) -> None:
        """The comparison has ended; the next one, if there is one, in ``again`` seconds.

        Args:
            queue: whose.
            again: seconds.
            done: it counts; one that met locked jobs does not, and is made again.
        """

    async def now(self) -> datetime:
        """The ledger's clock."""

    async def open_ids(self, queue: str, after: str, before: datetime) -> list[str]:
        """Ids of jobs that should lie in the queue, unchanged since ``before``: a page, from ``after`` on."""

    async def lost(self, queue: str, ids: Sequence[str], before: datetime) -> Lost:
        """Queue those jobs of a queue again that are still open and unchanged since ``before``."""

    async def prune_keys(self) -> None:
        """Delete some deduplication keys that are remembered no more."""
