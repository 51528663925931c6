"""Protocols of a broker, one a role, without a Redis word. Both modes implement them; the contract suite holds both.

`Broker` has the six verbs that move jobs. The other roles stand beside it: `Consumer`, `Heartbeats`, `Limiter`,
`Results`, `Outputs`, `Signals`, `CronStore`. One class implements them all (`WorkerBroker`); each user asks for the
roles it calls. `Operator` is what operators do to jobs by hand, by resource.
"""

# ceiling: protocols, read one by one; one split off would be looked for here
from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Generic, Literal, Protocol, TypeAlias

import msgspec
from typing_extensions import TypeVar

from streamworker.job import (
    Claim,
    CronTick,
    CronTickResult,
    DeadError,
    Depth,
    DueSchedules,
    Enqueued,
    KeyUse,
    Level,
    PackedJob,
    Progress,
    ScheduleEntry,
    ScheduleTick,
    Settled,
    StoredDocument,
    Verdict,
)  # fmt: skip
from streamworker.limits import AcquireRequest, AcquireResult, Permit
from streamworker.results import Outputs, ResultWaiter
from streamworker.telemetry.run_history import HistoryReader, HistoryWriter

T = TypeVar("T")


class SettleRequest(msgspec.Struct, frozen=True, gc=False):
    """One claim to settle, and how.

    Attributes:
        claim: the claim, and the fence.
        verdict: what to do with the job.
        body: document to store if the job goes on; ``None`` keeps the bytes as they are.
        job_id: the job's id, stored beside its document.
        kind: the job's kind, for dead letters.
        attempts: failed attempts, this execution included, for dead letters.
        member: member of the due set under which the job waits for a limit; empty if it waits for none.
        note: result note of a job that has ended for good, see `streamworker.results`; ``None`` notes only the verdict.
        keep: seconds for which the note can be read; 0 only publishes it.
        order: order key of a job that has ended for good, which is passed on; empty without one.
        halts: a dead job keeps its order key until it is replayed or deleted.
        key: deduplication key that a finished job frees; other endings take it from the document.
    """

    claim: Claim
    verdict: Verdict
    body: bytes | None = None
    job_id: str = ""
    kind: str = ""
    attempts: int = 0
    member: str = ""
    note: bytes | None = None
    keep: float = 0.0
    order: str = ""
    halts: bool = False
    key: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """Error with which the server refused to store an ending, and what an operator can do about it."""

    error: str
    cure: str


class Connected(Protocol):
    """The broker's connections to its server."""

    async def open(self) -> None:
        """Connect and check the server; a producer needs no more.

        Raises:
            Unreachable: no server answers.
            ConfigurationError: a server answers that cannot be used.
        """

    async def close(self) -> None:
        """Close the connections."""

    @property
    def reconnects(self) -> int:
        """How often the server answered again after it had not."""


class Broker(Protocol):
    """Six verbs that move jobs. Every settlement is fenced by the claim that it settles."""

    async def publish(self, jobs: Sequence[PackedJob]) -> list[Enqueued]:
        """Store jobs; answers in order.

        Raises:
            PublishUncertain: the reply was lost, the jobs may or may not be stored.
        """

    async def claim(
        self,
        limit: int,
        wait: float,
        running: Collection[Claim],
        ended: Callable[[str], int] = ...,
        shut: Collection[str] = (),
    ) -> list[Claim]:
        """Claim up to ``limit`` jobs: expired leases and new ones, in order; wait up to ``wait`` seconds for the first.

        Args:
            limit: most jobs.
            wait: seconds.
            running: claims that this worker holds: never claimed again, counted against the caps of queues.
            ended: how many of ``running`` of a queue have ended and only wait to be settled; a cap does not count them.
            shut: queues of which nothing is claimed now.
        """

    async def renew(self, claims: Collection[Claim]) -> list[Claim]:
        """Renew leases, in the lease thread; returns the claims that are lost."""

    async def settle(self, items: Sequence[SettleRequest]) -> list[Settled]:
        """Settle claims, each atomically and only if the claim still holds; answers in order."""

    @property
    def refusals(self) -> Mapping[str, Refusal]:
        """Why the last `settle` was refused some endings, by queue."""

    async def promote(self) -> float:
        """Move due jobs behind the ready ones; returns the seconds after which it must be called again."""

    async def depth(self) -> list[Depth]:
        """Numbers of ready, running, delayed and dead jobs of each queue."""


class Consumer(Broker, Protocol):
    """A broker as one worker consumes from it: a consumer of the group, under the worker's id."""

    async def join(self, worker_id: str) -> None:
        """Become the consumer ``worker_id``: creates the groups, refuses streams that a foreign group reads.

        Raises:
            ConfigurationError: another group reads one of our streams, or none of the queues can be used.
        """

    async def look_again(self) -> None:
        """End a waiting `claim` soon, without cancelling it: a queue that was at its cap may be claimed from again."""

    async def interrupt(self) -> None:
        """End a waiting `claim` soon, without cancelling it; from now on claims do not wait. May be repeated."""

    async def confirm(self, claim: Claim) -> Claim | None:
        """Count the delivery of a suspect that is about to run; ``None`` if the claim is lost."""

    async def own_pending(self, running: Collection[Claim]) -> list[Claim]:
        """This consumer's claims on the server that are not in ``running``: the reply to their claim was lost."""

    async def leave(self) -> bool:
        """Stop being a consumer; False if it has pending entries (nothing is deleted then)."""


class Heartbeats(Protocol):
    """Signs of life of one worker, written by its lease thread.

    That thread has an event loop and a connection of its own; all that it calls is called on that loop: `beat`,
    `progress`, `Broker.renew`, `Limiter.renew_permits` and `Signals.cancelled`.
    """

    async def beat(self, report: dict[str, str | int | float]) -> None:
        """Write the heartbeat; operators read the report."""

    async def progress(self, told: Mapping[str, Progress], ended: Collection[str]) -> None:
        """Store the progress of this worker's jobs by their ids, and delete that of ended ones."""

    async def leave_thread(self) -> None:
        """Close the connection of the lease thread, in it; the next call there opens it again."""

    def standby(self, longest: float) -> bytes | None:
        """Commands for the renewing child process (`streamworker.worker.renewer`).

        Args:
            longest: seconds of silence after which this worker counts as hung for good.

        Returns:
            One line of JSON; ``None`` if another process cannot log in, or no lease is ever renewed.
        """


class Limiter(Protocol):
    """Permits of kinds with limits."""

    async def acquire(
        self, queue: str, requests: Sequence[AcquireRequest], released: Sequence[Permit]
    ) -> list[AcquireResult]:
        """Release permits, then acquire others, all of one queue; answers in order. Safe to repeat after an error."""

    async def renew_permits(self, permits: Collection[Permit]) -> None:
        """Renew the permits of executions whose claims were renewed; in the lease thread."""


class Results(Protocol):
    """Results of jobs."""

    def ended(self, queues: Sequence[str], job_id: str) -> AbstractAsyncContextManager[ResultWaiter]:
        """Subscribe to the end of a job in one of the queues; what is published inside the block is received.

        Raises:
            Unreachable: no server answers.
        """


class Signals(Protocol):
    """Notifications between processes, and the cancellations that they announce."""

    async def listen(self, parked: Callable[[float], None], cancelled: Callable[[], None] = ...) -> None:
        """Receive notifications. Never returns; cancel it.

        A missed notification loses nothing: `Broker.promote` and `cancelled` find what it announced.

        Args:
            parked: called with epoch seconds when another process parks a job that is the first to be due.
            cancelled: called when a job is cancelled that this worker may hold.
        """

    async def cancelled(self, claims: Collection[Claim]) -> list[Claim]:
        """Claims whose jobs were cancelled since they were claimed; in the lease thread."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """Cancel a job, whatever its state; True if it was delayed, which deletes it at once.

        A ready job is claimed as ``cancelled``, a running one is found by `cancelled`. Settling it with `Drop` deletes
        the cancellation; the cancellation of a job that is never claimed expires after a week.
        """

    async def pass_on(self, queue: str, order: str, job_id: str) -> None:
        """Pass an order key on that a job kept while it waited in the ledger."""

    async def dispose(self, queue: str, job_id: str, body: bytes) -> None:
        """Note that the stored payload of a job that has ended is needed no more, if its document has one."""


class CronStore(Protocol):
    """Schedules of a queue, by the clock of its server."""

    async def offer_tick(self, tick: CronTick) -> CronTickResult:
        """Add the job of a tick, once, however many workers offer it; a schedule's first tick adds none."""


class ScheduleStore(Protocol):
    """Schedules that are kept as data, beside their queues."""

    async def queues(self) -> list[str]:
        """Queues that have, or had, schedules."""

    async def find(self, queue: str, name: str) -> ScheduleEntry | None:
        """A schedule; ``None`` if the queue has none of that name."""

    async def page(self, queue: str, after: int = 0) -> tuple[list[ScheduleEntry], int | None]:
        """(some of a queue's schedules, the next to tick first; where the next page begins, if there is one)."""

    async def put(self, new: ScheduleEntry, before: bytes, *, keep: bool) -> bool:
        """Store a schedule, or delete it if its definition is empty; False if the stored one is not ``before``.

        Args:
            new: as it shall be.
            before: the definition that is replaced; empty if there is none.
            keep: a schedule that has a next tick keeps it.
        """

    async def count(self, queue: str) -> int:
        """How many schedules a queue has."""

    async def removed(self, queue: str, names: Sequence[str]) -> dict[str, float]:
        """When those of these schedules were removed that were, in epoch seconds; noted where there is a ledger."""

    async def forget_removed(self, queue: str, removed: Mapping[str, float]) -> None:
        """Forget these removals, which the ledger knows; those that come from now on are noted."""

    async def look(self, queue: str, process: str) -> DueSchedules:
        """What is due, for one process of all that look."""

    async def tick(self, queue: str, ticks: Sequence[ScheduleTick]) -> list[bool]:
        """Add the jobs of ticks, each once; whether it was added here. A tick that the server refuses stays due."""

    async def now(self, queue: str) -> float:
        """Time of the queue's server, in epoch seconds."""

    async def listen(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` whenever a schedule was changed, or may have been. Never returns; cancel it."""


class ScheduleStorage(Protocol):
    """What has schedules that are kept as data."""

    @property
    def schedules(self) -> ScheduleStore:
        """They."""


class ServerClock(Protocol):
    """The clock that decides what is due."""

    async def clock(self, queue: str) -> float:
        """Time of the queue's server, in epoch seconds."""


class RecordsHistory(Protocol):
    """Where workers without a ledger keep the history of their runs."""

    @property
    def history(self) -> HistoryWriter:
        """It."""


class OrderKeys(Protocol):
    """Order keys of a queue."""

    async def turns(self, queue: str, jobs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each job, given as (order key, id), holds its key: it may start."""


class HeldKeys(Protocol):
    """Deduplication keys that are held until their jobs have started or ended."""

    async def begin(self, queue: str, jobs: Sequence[tuple[str, str, bool]]) -> list[bool]:
        """Jobs are about to start: they cannot be replaced any more. Repeating it is safe.

        Args:
            queue: their queue.
            jobs: (key, job id, whether the key is free now).

        Returns:
            Whether each may start: not if it was cancelled meanwhile.
        """


class EndedPayload(msgspec.Struct, frozen=True):
    """A stored payload whose job has ended in Redis.

    Attributes:
        queue: of the job.
        job_id: the job's id; empty if it never had one.
        hop: of the document that was deleted.
        payload: id of the data in the store; empty if the note cannot be read.
        note: where this is noted.
    """

    queue: str
    job_id: str
    hop: int
    payload: str
    note: tuple[str, bytes]


class EndedPayloads(Protocol):
    """Notes of stored payloads whose jobs were deleted in Redis, for a process that has the store."""

    async def some(self) -> list[EndedPayload]:
        """Some that are noted, the oldest of each queue."""

    async def forget(self, payloads: Sequence[EndedPayload]) -> None:
        """These are deleted."""

    async def listen(self, told: Callable[[], None]) -> None:
        """Call ``told()`` when there are new ones, until cancelled; it returns where that cannot be known."""


class HoldsPayloads(Protocol):
    """Where jobs end whose payloads are in a store."""

    @property
    def payloads(self) -> EndedPayloads:
        """They."""


class WorkerBroker(
    Connected, Consumer, Heartbeats, Limiter, Results, Outputs, Signals, CronStore, ScheduleStorage, ServerClock,
    RecordsHistory, OrderKeys, HeldKeys, HoldsPayloads, Protocol
):  # fmt: skip
    """All roles: what `App` opens for a worker or a producer."""


class PendingEntry(msgspec.Struct, frozen=True):
    """A delivered and unsettled job, as operators see it (`pending --json` of the command line, in this order)."""

    queue: str
    level: Level
    entry_id: str
    job_id: str | None
    kind: str | None
    worker_id: str
    idle_ms: int
    deliveries: int
    alive: bool
    progress: Progress | None = None


class StoredJob(msgspec.Struct, frozen=True):
    """A delayed or dead job, as operators see it. Commands that act on it name it by its ``handle``."""

    queue: str
    level: Level
    handle: str
    job_id: str | None
    kind: str | None
    at_ms: float
    body: bytes | None
    details: dict[str, str] = {}


class WorkerInfo(msgspec.Struct, frozen=True):
    """A worker as operators see it: its last heartbeat, and the pending entries of its consumer."""

    worker_id: str
    alive: bool
    pending: int
    queues: list[str]
    report: dict[str, str]


class Finding(msgspec.Struct, frozen=True):
    """Result of one check: an ``error`` loses jobs, a ``warning`` may lose jobs, ``ok`` loses none.

    Attributes:
        severity: one of the three words.
        subject: what was checked, in two or three words.
        sentence: what was found, and what to do about it.
    """

    severity: Literal["error", "warning", "ok"]
    subject: str
    sentence: str


Place: TypeAlias = Literal["ready", "delayed", "dead"]
"""State of a job that no worker holds."""


class Page(msgspec.Struct, Generic[T], frozen=True):
    """A page of a listing, of bounded cost for the server.

    Attributes:
        rows: entries that match; may be empty although there are more pages.
        after: cursor of the next page; ``None`` for the last page.
        looked: number of entries that were read.
    """

    rows: list[T]
    after: str | None
    looked: int = 0


class KindCount(msgspec.Struct, frozen=True):
    """Number of sampled jobs of a kind in one state; ``kind`` is ``None`` where the document names none."""

    queue: str
    place: Place
    kind: str | None
    count: int


class PendingJobs(Protocol):
    """Operations on delivered and unsettled jobs."""

    async def pending(
        self,
        queue: str,
        after: str = "",
        *,
        consumer: str | None = None,
        min_idle: float = 0.0,
        only: str | None = None,
    ) -> Page[PendingEntry]:
        """A page of pending entries, oldest first within a level.

        Args:
            queue: its name.
            after: cursor of the page before; empty for the first page.
            consumer: only entries of this worker.
            min_idle: only entries that were not renewed for so many seconds.
            only: one entry id, found without reading the others.
        """

    async def body(self, entry: PendingEntry) -> bytes | None:
        """The document of a pending entry; ``None`` if it has none or was deleted."""

    async def release(self, entry: PendingEntry) -> bool:
        """Release a pending job to its queue at once, uncharged.

        Raises:
            StreamworkerError: it has no document.
        """

    async def bury(self, entry: PendingEntry, reason: str) -> bool:
        """Move a pending job to the dead letters."""

    async def drop(self, entry: PendingEntry) -> bool:
        """Delete a pending job for good."""

    async def progress(self, jobs: Sequence[tuple[str, str]]) -> list[Progress | None]:
        """Progress of running jobs, each given as (worker id, job id)."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """Cancel a job, as `Signals.cancel` does."""

    async def pass_on(self, queue: str, order: str, job_id: str) -> None:
        """Pass an order key on that a job kept while it waited in the ledger."""

    async def dispose(self, queue: str, job_id: str, body: bytes) -> None:
        """Note that the stored payload of a job that has ended is needed no more, if its document has one."""

    async def uncancel(self, queue: str, job_id: str) -> bool:
        """Delete the cancellation of a job; False if it was not cancelled, or has ended since."""


class DelayedJobs(Protocol):
    """Operations on parked jobs."""

    async def delayed(self, queue: str, after: str = "") -> Page[StoredJob]:
        """A page of parked jobs, soonest first."""

    async def delayed_job(self, queue: str, handle: str) -> StoredJob | None:
        """One parked job, found without reading the others; ``None`` if it is not parked any more."""

    async def run_now(self, job: StoredJob) -> bool:
        """Make a parked job ready now."""

    async def forget(self, job: StoredJob) -> bool:
        """Delete a parked job for good."""


class WaitingJobs(Protocol):
    """Ready jobs, and changes of those and of delayed ones."""

    async def ready(self, queue: str, after: str = "") -> Page[StoredJob]:
        """A page of ready jobs that no worker has claimed, the next one first."""

    async def change(
        self, job: StoredJob, body: bytes, *, queue: str, level: Level, due: float | None = None, park: bool = True
    ) -> bool:
        """Change a job that waits, as it was read; False if it does not wait like that any more.

        Args:
            job: as a listing has it, with its document.
            body: its new document.
            queue, level: where it goes.
            due: epoch seconds at which it is due; ``None`` as before.
            park: it is delayed from now on, else ready.

        """


class DeadLetters(Protocol):
    """Operations on dead letters."""

    async def dead(self, queue: str, after: str = "", *, only: str | None = None) -> Page[StoredJob]:
        """A page of dead letters, newest first.

        Args:
            queue: its name.
            after: cursor of the page before; empty for the first page.
            only: one handle, found without reading the others.
        """

    async def replay(self, job: StoredJob) -> bool:
        """Put a dead letter back on its queue with fresh attempts; bytes that cannot be read go back unchanged.

        Raises:
            StreamworkerError: it has no document.
        """

    async def errors(self, queue: str, after: str = "", *, ids: bool = False) -> list[DeadError]:
        """Some dead letters, oldest first, without their documents; empty behind the last.

        Args:
            queue: whose.
            after: the entry id behind which they begin.
            ids: entry ids are enough.
        """

    async def muted(self, queue: str) -> dict[str, str]:
        """Muted groups of dead letters: id to by whom, and when."""

    async def mute(self, queue: str, group: str, note: str) -> bool:
        """Mute a group of dead letters, or with an empty note unmute it; False if it was so already."""

    async def erase(self, job: StoredJob) -> bool:
        """Delete a dead letter for good."""


class Queues(Protocol):
    """Operations on whole queues."""

    async def queues(self) -> list[str]:
        """Names of all queues on the server, sorted."""

    async def depth(self, queues: Sequence[str]) -> list[Depth]:
        """Numbers of ready, running, delayed and dead jobs of each queue."""

    async def departed(self, queues: Sequence[str]) -> list[int | None]:
        """Number of entries that ever left each queue, for rates; ``None`` if the server does not count."""

    async def waiting(self, queues: Sequence[str], limit: int) -> list[KindCount]:
        """Kinds of the jobs in the queues, by a sample of about ``limit`` jobs."""

    async def ticks(self, queue: str) -> dict[str, float]:
        """Last tick of each schedule of a queue, in epoch seconds."""

    async def pause(self, queue: str, note: str) -> bool:
        """Pause a queue: no worker claims from it, running jobs go on; False if an operator has paused it already.

        Args:
            queue: its name.
            note: who paused it, and when, for operators.
        """

    async def resume(self, queue: str) -> bool:
        """Undo `pause`; False if no operator had paused it."""

    async def paused(self, queue: str) -> str | None:
        """The note with which an operator paused a queue; ``None`` if no operator has."""

    async def purge(self, queue: str, place: Place, limit: int) -> int:
        """Delete up to ``limit`` jobs for good, but none that a worker holds; returns the number deleted."""

    async def now(self) -> float:
        """The server's clock, in epoch seconds: ages by another clock are wrong by the difference."""

    def documents(self, queue: str) -> AsyncIterator[StoredDocument]:
        """All documents of a queue, in any state."""

    async def remove(self, found: StoredDocument) -> bool:
        """Delete a document for good; False if it is not there any more, or a worker holds it."""

    async def forget_traces(self, queue: str, ids: Sequence[str]) -> dict[str, int]:
        """Delete results, outputs, logs and marks of jobs; returns how many of each there were."""

    async def key_uses(self) -> list[KeyUse]:
        """The keys with which values are sealed, and how many. It reads everything in the namespace."""

    async def refusal(self, queues: Sequence[str]) -> str | None:
        """Why the server refuses writes although it answers, in a sentence; ``None`` if it takes them.

        Args:
            queues: in a cluster, the nodes of these are asked.
        """

    async def findings(self, queues: Sequence[str]) -> list[Finding]:
        """Checks of the server for settings that lose jobs."""


class Workers(Protocol):
    """Operations on workers."""

    async def workers(self, queues: Sequence[str], *, everywhere: bool = True) -> list[WorkerInfo]:
        """Consumers of the queues' groups and, with ``everywhere``, workers with a heartbeat, which walks all keys."""

    async def prune(self, queues: Sequence[str], worker_id: str) -> bool:
        """Delete a dead worker's consumer from the groups; False if it has pending entries or a heartbeat."""


class Operator(PendingJobs, DelayedJobs, WaitingJobs, DeadLetters, Queues, Workers, ScheduleStorage, Protocol):
    """Operations by hand. Each change is fenced by what was listed; the answer tells whether that still held.

    Listings are read page by page, each of bounded cost, and consume nothing. Every method raises `Unreachable` when no
    server answers, and `StreamworkerError` when the server cannot or will not do it.
    """

    lease: float
    """Seconds after which an unrenewed claim is reclaimed."""

    @property
    def history(self) -> HistoryReader:
        """The history of runs, where there is no ledger."""
