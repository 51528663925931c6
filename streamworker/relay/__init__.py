"""The two ports of a relay: the `Outbox`, jobs that wait in the ledger, and the `Dispatcher`, which adds them to Redis.

PostgreSQL implements the first, the broker the second, and neither imports the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from streamworker.job import Level, Until


class LedgerKey(msgspec.Struct, frozen=True):
    """A deduplication key that the ledger has noted for a job; its queue in Redis notes it with the job.

    Attributes:
        name: the key.
        until: ``done`` or ``started`` if it is held until then; ``None`` if it is for a time.
        life: seconds after which it is free whatever became of the job.
    """

    name: str
    until: Until | None
    life: float


class Dispatch(msgspec.Struct, frozen=True):
    """A job of the ledger for its queue. Redis remembers it by (id, hop)."""

    id: str
    hop: int
    level: Level
    body: bytes
    epoch: str = ""
    """The queue's identity by the ledger, without which a job with an order key is not added: an earlier one may be
    lost."""
    key: LedgerKey | None = None


class Dispatched(msgspec.Struct, frozen=True):
    """The result of a dispatch.

    Attributes:
        epoch: identity of the queue.
        there: per job whether it is in the queue now, added by this call or an earlier one.
        held: per job whether another one holds its key, for which it has to wait.
        error: why some jobs are not.
    """

    epoch: str
    there: list[bool]
    held: list[bool] = []
    error: str = ""


class LedgerGauge(msgspec.Struct, frozen=True):
    """A number of the ledger for /metrics.

    Attributes:
        gauge: ``flows``, ``blocked``, ``waiting`` or ``stuck``.
        label: the status of the flows, what the jobs wait for, or why the flows are stuck.
        value: how many; above 10,000 an estimate.
    """

    gauge: str
    label: str
    value: int


class Pulse(msgspec.Struct, frozen=True):
    """The state of a queue in Redis by which lost jobs are noticed.

    Attributes:
        queue: the queue.
        epoch: its identity; empty if it has none, as after FLUSHALL.
        relayed: jobs that relays have ever added.
        server: run id of the server; empty if it is unknown.
        held: the ledger pauses the queue.
    """

    queue: str
    epoch: str
    relayed: int
    server: str
    held: bool


class Dispatcher(Protocol):
    """Redis as a relay uses it: jobs of the ledger are added at most once, and lost jobs are noticed.

    Every method raises `Unreachable` when no server answers.
    """

    async def dispatch(self, queue: str, jobs: Sequence[Dispatch], until: float) -> Dispatched | None:
        """Add jobs, each at most once per (id, hop), however often this is repeated before `forget`.

        Args:
            queue: the queue.
            jobs: in order.
            until: monotonic seconds after which nothing may be added; the server checks it, so that it holds for a
                process that was frozen meanwhile.

        Returns:
            The result; ``None`` if it was too late.
        """

    async def forget(self, queue: str, jobs: Sequence[Dispatch]) -> None:
        """Remember these jobs no more: the ledger notes them as dispatched."""

    async def pulses(self, queues: Sequence[str]) -> list[Pulse]:
        """The pulse of each queue, in order."""

    async def found(self, queue: str) -> None:
        """Give a queue its epoch, if it has none."""

    async def hold(self, queue: str, *, held: bool) -> None:
        """Pause a queue on behalf of the ledger, or resume it."""

    def ids(self, queue: str) -> AsyncIterator[list[str]]:
        """Ids of all jobs in the queue: ready, pending or delayed; some may occur twice."""

    async def later(self, queue: str, hops: Mapping[str, int]) -> set[str]:
        """Ids of those jobs that are in the queue at a later hop than the given one: ready, pending or delayed.

        The whole queue is read, and the answer is cached for ten times as long as that took.

        Args:
            queue: the queue.
            hops: id to hop.
        """

    async def promote(self, queues: Sequence[str]) -> float:
        """Promote due jobs of the queues; returns the seconds until the next call."""

    async def queues(self) -> list[str]:
        """Names of all queues on the server."""

    async def close(self) -> None:
        """Close the connections."""


class Taken(msgspec.Struct, frozen=True):
    """A row of the ledger that this relay has marked ``dispatching``, and the document for its queue."""

    id: str
    queue: str
    level: Level
    hop: int
    body: bytes
    epoch: str = ""
    key: LedgerKey | None = None


class KnownQueue(msgspec.Struct, frozen=True):
    """The last state of a queue in the ledger, and whether its jobs are due to be compared with those in Redis."""

    name: str
    is_active: bool
    epoch: str
    relayed: int
    server: str
    due: bool


class KeptSchedule(msgspec.Struct, frozen=True):
    """A schedule that is kept as data, as the ledger knows it.

    Attributes:
        queue: its queue.
        name: unique among the schedules of an app.
        definition: as Redis has it; ``None``: it was removed.
        changed_at: when that was, in epoch seconds by the clock of Redis.
    """

    queue: str
    name: str
    definition: bytes | None
    changed_at: float


class ScheduleLook(msgspec.Struct, frozen=True):
    """What one relay of all compares with Redis.

    Attributes:
        counts: schedules of each queue.
        whole: every schedule is due to be compared.
    """

    counts: dict[str, int]
    whole: bool


class ScheduleLedger(Protocol):
    """The durable record of schedules that are kept as data. Every method raises `Unreachable` when no server
    answers."""

    async def keep(self, schedules: Sequence[KeptSchedule]) -> bool:
        """Keep schedules, unless later changes are kept; False if the schema is of an older release."""

    async def of(self, queue: str) -> dict[str, KeptSchedule]:
        """All of a queue by their names, removed ones too."""

    async def look(self, every: float, whole: float) -> ScheduleLook | None:
        """The counts, for one relay of all.

        Args:
            every: seconds between two looks.
            whole: seconds between two looks at every schedule.
        """


class Lost(msgspec.Struct, frozen=True):
    """Jobs that Redis lost.

    Attributes:
        queued: ids of those that are queued again.
        locked: ids of those that could not be: a run has locked the row in its transaction.
    """

    queued: list[str]
    locked: list[str]


class Outbox(Protocol):
    """The ledger as a relay uses it. Every method raises `Unreachable` when no server answers."""

    @property
    def schedules(self) -> ScheduleLedger:
        """Schedules that are kept as data."""

    async def claim(self) -> list[Taken]:
        """Mark due jobs as ``dispatching`` with their next hop, in order; those that cannot be decoded become dead."""

    async def retake(self) -> list[Taken]:
        """Take over jobs that another relay left ``dispatching``; their hop stays."""

    async def next_due(self) -> tuple[float | None, float | None]:
        """Seconds until a queued job is due, and until a waiting one is to be woken; ``None`` if there is none."""

    async def wake(self) -> int:
        """Queue waiting jobs whose time or signal has come, a batch; returns how many jobs and signals were changed."""

    async def gauges(self) -> list[LedgerGauge]:
        """How many flows there are, and jobs that wait in the ledger alone; its cost does not grow with them."""

    async def run_now(self, queues: Sequence[str]) -> int:
        """Make queued jobs of these queues due now; returns how many were not."""

    async def queued(self, queues: Sequence[str]) -> tuple[int, int]:
        """How many jobs of these queues are queued: (due, later)."""

    async def put_off(self, jobs: Sequence[Taken]) -> None:
        """Queue jobs again whose deduplication keys other jobs hold: they are looked at a second later."""

    async def note(self, jobs: Sequence[Taken], epochs: Sequence[str]) -> set[tuple[str, str]]:
        """Mark jobs as ``dispatched``, each with the epoch of its queue.

        Returns:
            (queue, id) of jobs that could not be marked yet, because a run has locked the row.
        """

    async def meet(self, queues: Mapping[str, str]) -> None:
        """Insert a row for each queue; an epoch is stored only if the row has none yet."""

    async def queues(self) -> list[KnownQueue]:
        """The state of every queue."""

    async def observe(
        self, known: KnownQueue, *, epoch: str, relayed: int, server: str, recheck: tuple[float, int] | None
    ) -> bool:
        """Store the state of a queue, unless another relay has since ``known``; returns whether it was stored.

        Args:
            known: the state before.
            epoch: its identity.
            relayed: jobs that relays have ever added.
            server: run id of the server.
            recheck: compare its jobs in so many seconds, so many times; ``None``: no need.
        """

    async def recheck(self, queue: str, within: float) -> datetime | None:
        """Take the due comparison of a queue for ``within`` seconds; returns now; ``None``: another relay has it."""

    async def rechecked(self, queue: str, again: float, *, done: bool = True) -> None:
        """End a comparison; the next one, if one is left, is due in ``again`` seconds.

        Args:
            queue: the queue.
            again: seconds.
            done: the comparison counts; one that met locked jobs does not, and is repeated.
        """

    async def now(self) -> datetime:
        """The ledger's clock."""

    async def open_ids(self, queue: str, after: str, before: datetime) -> list[str]:
        """Ids of jobs that should be in the queue, unchanged since ``before``: a page, after the id ``after``."""

    async def lost(self, queue: str, ids: Sequence[str], before: datetime) -> Lost:
        """Queue those of the jobs again that are still open and unchanged since ``before``."""

    async def look(self) -> int:
        """Decide on nodes of flows that transactions have left to look at after their commits; returns how many."""

    async def prune_keys(self) -> None:
        """Delete a batch of expired deduplication keys."""
