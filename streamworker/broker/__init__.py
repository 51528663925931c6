"""What a worker needs of a broker, without a Redis word. Both modes implement it; the contract suite holds them to it.

Six verbs move jobs (publish, claim, renew, settle, tick, depth). `Operator` is what people do to jobs by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Generic, Literal, Protocol, TypeAlias

import msgspec
from typing_extensions import TypeVar

from streamworker.job import Claim, Depth, Enqueued, Level, Outgoing, Progress, Settled, Verdict
from streamworker.limits import Limiting

T = TypeVar("T")


class Ending(msgspec.Struct, frozen=True, gc=False):
    """One claim to end.

    Attributes:
        claim: what is ended, and the fence.
        verdict: how.
        body: the document to store if the job goes on; ``None`` keeps the bytes as they are.
        job_id: the job's id, for what is stored beside it.
        kind: its kind, for dead letters.
        attempts: failed attempts, this run included, for dead letters.
        member: what it is called by while it waits for a limit; empty where it is not called.
        note: what is told of a job that has ended for good, see `streamworker.results`; ``None`` says only how.
        keep: seconds for which that can be read; 0 tells it to those who wait right now.
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


class Refusal(msgspec.Struct, frozen=True):
    """Why the server refuses to store an ending, and what people can do about it."""

    error: str
    cure: str


class CronTick(msgspec.Struct, frozen=True):
    """One tick of a schedule.

    Attributes:
        queue: where its job goes.
        level: and on which level.
        schedule: what its last tick is remembered by, one of a kind in the queue.
        at: epoch seconds.
        body: the job's document; empty if the tick passes without one.
        name: of the schedule, whatever its expression is; of two with one name the one whose worker started last is in
            force. Empty if it has none.
        before: the tick that this worker proposed before; ``None`` if this is its first.
        now: what the worker takes for the server's clock, in epoch seconds; ``None`` if it does not say.
    """

    queue: str
    level: Level
    schedule: str
    at: float
    body: bytes
    name: str = ""
    before: float | None = None
    now: float | None = None


class CronTickResult(msgspec.Struct, frozen=True):
    """What became of a tick that was proposed.

    Attributes:
        early: seconds until it should be proposed again: it is still to come by the server's clock, or the worker is
            mistaken about that clock by more than five seconds. 0 if it is dealt with.
        added: its job was added by this call.
        now: the server's clock, in epoch seconds.
    """

    early: float
    added: bool
    now: float


class ResultWaiter(Protocol):
    """How one job ends."""

    async def kept(self) -> bytes | None:
        """The note that was kept of it, if there is one; and for the next half a minute its end is told."""

    async def heard(self, timeout: float) -> bytes | None:
        """The next note; empty if some may have been missed, ``None`` after ``timeout`` seconds without one."""


class Broker(Limiting, Protocol):
    """Hands out claims and takes them back. Every ending is fenced by the claim it ends."""

    async def open(self) -> None:
        """Connect and check the server; producing needs no more.

        Raises:
            Unreachable: no server answers there.
            ConfigurationError: a server answers that cannot be used.
        """

    async def join(self, worker_id: str) -> None:
        """Become a consumer named ``worker_id``: groups exist, no foreign group reads along.

        Raises:
            ConfigurationError: another group reads one of our streams, or a permission is missing.
        """

    async def publish(self, jobs: Sequence[Outgoing]) -> list[Enqueued]:
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
        """Up to ``limit`` jobs, orphans and new ones in order; waits up to ``wait`` seconds only if there is none.

        Args:
            limit: most jobs.
            wait: seconds.
            running: everything this worker holds: never claimed again, counted against the caps of queues.
            ended: how many of ``running`` of a queue have ended and only wait to be settled: they fill no cap.
            shut: queues of which nothing is claimed now.
        """

    async def look_again(self) -> None:
        """A queue that was at its cap has room again: end a waiting `claim` soon, without cancelling it."""

    async def interrupt(self) -> None:
        """End a waiting `claim` soon, without cancelling it; from now on claims do not wait. May be called again."""

    async def confirm(self, claim: Claim) -> Claim | None:
        """Count the delivery of a suspect that is about to run; ``None`` if it is no longer ours."""

    def renew(self, claims: Collection[Claim]) -> list[Claim]:
        """Prolong the leases, from the lease thread; returns those that are lost."""

    def standby(self, longest: float) -> bytes | None:
        """The line for the renewing child process (`streamworker.worker.renewer`). Called from the lease thread.

        Args:
            longest: seconds of silence after which this worker counts as hung for good.

        Returns:
            One line of JSON; ``None`` if no other process can log in, or nothing is ever renewed.
        """

    def cancelled(self, claims: Collection[Claim]) -> list[Claim]:
        """Those whose jobs were cancelled since they were claimed; called from the lease thread."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """Cancel a job wherever it is; True if it was delayed: then it is gone already.

        One that waits is claimed as ``cancelled``, one that is held is found by `cancelled`. Settling it with `Drop`
        forgets that it was cancelled; what is never claimed is forgotten after a week.
        """

    async def clock(self, queue: str) -> float:
        """What the clock of the queue's server shows, in epoch seconds: it alone decides what is due."""

    async def offer_tick(self, tick: CronTick) -> CronTickResult:
        """Add the job of a tick, once, however many propose it and how often; a schedule's first tick adds none."""

    def ended(self, queues: Sequence[str], job_id: str) -> AbstractAsyncContextManager[ResultWaiter]:
        """Hears of the end of a job that lies in one of the queues; what is said from the block's begin on is heard.

        Raises:
            Unreachable: no server answers.
        """

    def progress(self, told: Mapping[str, Progress], ended: Collection[str]) -> None:
        """Write down how far jobs of this worker have come, by their ids, and forget others; from the lease thread."""

    def beat(self, report: dict[str, str | int | float]) -> None:
        """Tell that this worker lives, from the lease thread; the report is what operators see."""

    async def settle(self, items: Sequence[Ending]) -> list[Settled]:
        """End claims, each by its verdict, each atomically and only if the claim still holds; answers in order."""

    @property
    def refusals(self) -> Mapping[str, Refusal]:
        """Why the last `settle` was refused some endings, by queue."""

    async def own_pending(self, running: Collection[Claim]) -> list[Claim]:
        """Claims of ours on the server that are not in ``running``: a reply to a claim was lost on the way."""

    async def tick(self) -> float:
        """Move due jobs to their streams; returns the seconds until it should be called again."""

    async def listen(self, parked: Callable[[float], None], cancelled: Callable[[], None] = ...) -> None:
        """Report jobs that others park: ``parked(epoch seconds)`` whenever one becomes the first to be due.

        And ``cancelled()`` whenever a job is cancelled that may be held here. Never returns; cancel it. Hints only:
        what is missed here, `tick` and `cancelled` find.
        """

    async def depth(self) -> list[Depth]:
        """How much lies in each queue."""

    @property
    def reconnects(self) -> int:
        """How often the server answered again after it had not."""

    async def leave(self) -> bool:
        """Stop being a consumer; False if something of ours is still pending (nothing is deleted then)."""

    async def close(self) -> None:
        """Close the connections."""


class PendingEntry(msgspec.Struct, frozen=True):
    """One delivered and unsettled job, as operators see it (`pending --json` of the command line, in this order)."""

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
    """A delayed or dead job as operators see it. ``handle`` names it for the commands that act on it."""

    queue: str
    level: Level
    handle: str
    job_id: str | None
    kind: str | None
    at_ms: float
    body: bytes | None
    details: dict[str, str] = {}


class WorkerInfo(msgspec.Struct, frozen=True):
    """A worker as operators see it: its last heartbeat, and what the groups hold under its name."""

    worker_id: str
    alive: bool
    pending: int
    queues: list[str]
    report: dict[str, str]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at: ``error`` loses jobs, ``warning`` may, ``ok`` does not.

    Attributes:
        severity: one of the three words.
        subject: what was looked at, in two or three words.
        sentence: what is so, and what to do about it.
    """

    severity: Literal["error", "warning", "ok"]
    subject: str
    sentence: str


Place: TypeAlias = Literal["ready", "delayed", "dead"]
"""Where jobs lie that nobody holds."""


class Page(msgspec.Struct, Generic[T], frozen=True):
    """A part of a listing that costs the server little.

    Attributes:
        rows: what fits, of the entries that were looked at; may be none although there are more pages.
        after: where the next page begins; ``None`` for the last page.
        looked: entries that were looked at.
    """

    rows: list[T]
    after: str | None
    looked: int = 0


class Waiting(msgspec.Struct, frozen=True):
    """How many sampled jobs of a kind lie somewhere; ``kind`` is ``None`` where the document names none."""

    queue: str
    place: Place
    kind: str | None
    count: int


class Operator(Protocol):
    """What people do by hand. Every change is fenced by what was listed; the answer tells whether it still held.

    Listings are read page by page, each of bounded cost, and consume nothing. Every method raises `Unreachable` when no
    server answers, and `StreamworkerError` when the server cannot or will not do it.
    """

    lease: float
    """Seconds after which a claim that nobody renewed is taken over."""

    async def pending(
        self,
        queue: str,
        after: str = "",
        *,
        consumer: str | None = None,
        min_idle: float = 0.0,
        only: str | None = None,
    ) -> Page[PendingEntry]:
        """A page of delivered and unsettled jobs, oldest entry first within a level.

        Args:
            queue: whose.
            after: where the page before ended; empty for the first.
            consumer: held by this worker.
            min_idle: seconds they were not renewed, at least.
            only: one entry id, found without reading the others.
        """

    async def body(self, entry: PendingEntry) -> bytes | None:
        """The document of a pending entry; ``None`` if it has none or was deleted underneath."""

    async def release(self, entry: PendingEntry) -> bool:
        """Give a pending job back to its queue at once, uncharged.

        Raises:
            StreamworkerError: it has no document that could go back.
        """

    async def bury(self, entry: PendingEntry, reason: str) -> bool:
        """Move a pending job to the dead letters."""

    async def drop(self, entry: PendingEntry) -> bool:
        """Delete a pending job for good."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """See `Broker.cancel`."""

    async def progress(self, jobs: Sequence[tuple[str, str]]) -> list[Progress | None]:
        """How far jobs have come that run, each given as (worker id, job id)."""

    async def ticks(self, queue: str) -> dict[str, float]:
        """The last tick of each schedule of a queue, in epoch seconds."""

    async def uncancel(self, queue: str, job_id: str) -> bool:
        """Take `cancel` back for a job that shall run again; False if it was not cancelled, or has ended since."""

    async def delayed(self, queue: str, after: str = "") -> Page[StoredJob]:
        """A page of parked jobs, soonest first."""

    async def delayed_job(self, queue: str, handle: str) -> StoredJob | None:
        """One parked job, found without reading the others; ``None`` if it is not parked any more."""

    async def run_now(self, job: StoredJob) -> bool:
        """Make a parked job ready now."""

    async def forget(self, job: StoredJob) -> bool:
        """Delete a parked job for good."""

    async def dead(self, queue: str, after: str = "", *, only: str | None = None) -> Page[StoredJob]:
        """A page of dead letters, newest first.

        Args:
            queue: whose.
            after: where the page before ended; empty for the first.
            only: one handle, found without reading the others.
        """

    async def replay(self, job: StoredJob) -> bool:
        """Put a dead letter back on its queue with fresh attempts; bytes that cannot be read go back unchanged.

        Raises:
            StreamworkerError: it has no document that could go back.
        """

    async def erase(self, job: StoredJob) -> bool:
        """Delete a dead letter for good."""

    async def workers(self, queues: Sequence[str], *, everywhere: bool = True) -> list[WorkerInfo]:
        """Everyone with a name in a group, and, ``everywhere``, with a heartbeat too, which walks all keys."""

    async def prune(self, queues: Sequence[str], worker_id: str) -> bool:
        """Delete a dead worker's name from the groups; False if it holds pending jobs or still beats."""

    async def pause(self, queue: str, note: str) -> bool:
        """Let nobody claim from a queue any more, running jobs go on; False if an operator has paused it already.

        Args:
            queue: which.
            note: who paused it, and when, as people read it.
        """

    async def resume(self, queue: str) -> bool:
        """Undo `pause`; False if no operator had paused it."""

    async def paused(self, queue: str) -> str | None:
        """The note of whoever paused a queue; ``None`` if no operator has."""

    async def purge(self, queue: str, place: Place, limit: int) -> int:
        """Delete jobs for good, up to ``limit``; what workers hold is not touched. Returns how many were deleted."""

    async def depth(self, queues: Sequence[str]) -> list[Depth]:
        """How much lies in each of the queues."""

    async def departed(self, queues: Sequence[str]) -> list[int | None]:
        """How many entries ever left each queue, for rates; ``None`` where the server does not count."""

    async def waiting(self, queues: Sequence[str], limit: int) -> list[Waiting]:
        """What kinds lie in the queues, judged by a sample of about ``limit`` jobs."""

    async def findings(self, queues: Sequence[str]) -> list[Finding]:
        """What of the server can lose jobs."""

    async def queues(self) -> list[str]:
        """Names of all queues that exist on the server, sorted."""
