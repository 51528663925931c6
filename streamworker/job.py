"""The values that stages pass on: a Job, the Claim on it, the Outcome of its run, the Verdict on the outcome.

Frozen, without behaviour. ``app.enqueue`` makes a `PackedJob`, the broker delivers a `Claim`, the executor turns it
into an `Outcome`, ``policy.judge`` turns that into a `Verdict`, and the broker settles (claim, verdict).
Times are seconds since the epoch; only the brokers know milliseconds.
"""
# ceiling: values without behaviour, read one by one; one split off would be looked for here

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias, TypeVar

import msgspec

Level: TypeAlias = Literal["high", "normal", "low"]
Until: TypeAlias = Literal["done", "started"]
"""Until when a deduplication key is held: its job has ended, or has started."""
UNTIL: tuple[Until, Until] = ("done", "started")
HELD = 7 * 86_400.0
"""Seconds after which such a key is free whatever became of its job, counted from when that is due or goes on."""
LEVELS: tuple[Level, Level, Level] = ("high", "normal", "low")
"""The levels of a queue, in the order of claims."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One unit of work, as `App.job` makes it and as a handler sees it in ``ctx.job``.

    Attributes:
        id: the job's id; same id, same job.
        queue: the queue's name.
        kind: the stable name that picks the handler; empty if the producer named none.
        payload: the payload's JSON text, undecoded.
        level: high, normal or low.
        attempts: failed attempts so far.
        max_attempts: attempts allowed; ``None`` leaves it to the handler.
        hop: how often the job was put on a stream again.
        created_at: when the producer made it, if the document says so.
        run_at: not before this moment.
        delay: seconds to wait from the moment of enqueueing; only on jobs to be enqueued.
        expires_at: it never starts at this moment or later.
        expires_in: seconds from the moment of enqueueing until it expires; only on jobs to be enqueued.
        key: deduplication key; only on jobs to be enqueued.
        key_ttl: seconds the key is remembered; ``None`` takes ``STREAMWORKER_KEY_TTL``.
        unique: until when ``key`` is held, instead of for a time; only on jobs to be enqueued, as are the next three.
        replace: it takes the place of the job that has ``key`` and has not started.
        debounce: seconds by which it is delayed anew with each job that replaces it.
        debounce_max: most seconds of that.
        headers: the user's, beside the payload.
        order_key: of the jobs of a queue with one order key at most one runs at a time, in order.
        fair_key: the tenant, whose jobs wait in a line of their own.
    """

    id: str
    queue: str
    kind: str
    payload: msgspec.Raw
    level: Level = "normal"
    attempts: int = 0
    max_attempts: int | None = None
    hop: int = 0
    created_at: datetime | None = None
    run_at: datetime | None = None
    delay: float | None = None
    expires_at: datetime | None = None
    expires_in: float | None = None
    key: str | None = None
    key_ttl: float | None = None
    unique: Until | None = None
    replace: bool = False
    debounce: float | None = None
    debounce_max: float | None = None
    headers: dict[str, Any] | None = None
    order_key: str | None = None
    fair_key: str | None = None


class Enqueued(msgspec.Struct, frozen=True):
    """The answer to an enqueue.

    Attributes:
        id: the job's id; with a remembered ``key``, the earlier job's.
        new: False when ``key`` was remembered and nothing was added.
        replaced: the id of the job that was replaced; the same as ``id`` if that one was rewritten.
    """

    id: str
    new: bool
    replaced: str | None = None


When: TypeAlias = Literal["ok", "failed", "always"]
"""The end of a node after which another one of its flow runs."""
WHENS: tuple[When, ...] = ("ok", "failed", "always")
IfFailed: TypeAlias = Literal["fail", "skip", "hold"]
"""What the failure of a node means to the nodes after it that wait for its success."""
IF_FAILED: tuple[IfFailed, ...] = ("fail", "skip", "hold")
NodeState: TypeAlias = Literal["blocked", "queued", "running", "retrying", "waiting", "ok", "failed", "held", "skipped"]


class FlowNode(msgspec.Struct, frozen=True):
    """A node of a `FlowGraph`.

    Attributes:
        name: within the flow.
        job: its job; ``None``: the gate of a flow, which ends when all of that has ended.
        gate: place of the gate of the flow that it is part of; ``None``: the gate of the whole.
        if_failed: what its failure means to those after it.
    """

    name: str
    job: Job | None
    gate: int | None
    if_failed: IfFailed = "fail"


N = TypeVar("N")


def topological_order(waits: dict[N, int], follow: Mapping[N, Iterable[N]]) -> list[N]:
    """The nodes of a graph, each behind those before it, without those that are on a cycle or behind one.

    Args:
        waits: how many are before each node; counted down, so that it stays above 0 on a cycle.
        follow: those behind each node.
    """
    ready = [node for node, count in waits.items() if not count]
    for node in ready:
        for each in follow.get(node, ()):
            waits[each] -= 1
            if not waits[each]:
                ready.append(each)
    return ready


class FlowGraph(msgspec.Struct, frozen=True):
    """A flow as it is stored: nodes, the gate of the whole first, and (place, place of one before it, condition).

    Attributes:
        id: of the flow.
        name: of the flow.
        key: of the flows of this name with this key, one runs or has run.
        nodes: the nodes.
        edges: the edges; the condition ``end`` leads to a gate.
    """

    id: str
    name: str
    key: str | None
    nodes: list[FlowNode]
    edges: list[tuple[int, int, str]]

    def jobs_before(self, most: int) -> list[list[int]]:
        """For each of its jobs the places, among the jobs, of those right before it; a gate stands for its last jobs.

        Args:
            most: of one job.
        """
        earlier: dict[int, list[int]] = {}
        for node, before, _ in self.edges:
            earlier.setdefault(node, []).append(before)
        jobs = [number for number, node in enumerate(self.nodes) if node.job is not None]
        place = {number: at for at, number in enumerate(jobs)}
        found: list[list[int]] = []
        for number in jobs:
            waiting, seen = [*reversed(earlier.get(number, ()))], list[int]()
            while waiting and len(seen) < most:
                each = waiting.pop()
                if each in place:
                    seen.append(place[each])
                else:
                    waiting += reversed(earlier.get(each, ()))
            found.append(seen)
        return found


class FlowStarted(msgspec.Struct, frozen=True):
    """The answer to the start of a flow.

    Attributes:
        id: the flow's id; with a key that was used before, the earlier flow's.
        new: False when it was used before and nothing was added.
    """

    id: str
    new: bool


class FlowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A flow as the ledger remembers it.

    Attributes:
        id: the flow's id.
        name: its name.
        key: its key, if it has one.
        status: running, completed, failed or cancelled.
        created_at: when it was started.
        finished_at: when its last node ended.
        nodes: how many jobs it has, by their `NodeState`.
    """

    id: str
    name: str
    key: str | None
    status: Literal["running", "completed", "failed", "cancelled"]
    created_at: datetime
    finished_at: datetime | None
    nodes: dict[str, int]


class FlowOfJob(msgspec.Struct, frozen=True):
    """The flow that a job is a node of.

    Attributes:
        id: of the flow.
        name: of the flow.
        node: name of the node.
    """

    id: str
    name: str
    node: str


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A node of a flow as the ledger remembers it.

    Attributes:
        number: in the ledger.
        name: within the flow.
        state: of the node.
        gate: number of the gate of the flow that it is part of; ``None``: it is the gate of the whole.
        after: the nodes before it, each with its condition.
        job_id: of its job; ``None``: a gate.
        queue: of its job.
        kind: of its job.
        attempts: failed ones.
        started_at: when its last run began.
        finished_at: when it ended.
        error: what went wrong last.
    """

    number: int
    name: str
    state: NodeState
    gate: int | None
    after: list[tuple[int, str]]
    job_id: str | None
    queue: str | None
    kind: str
    attempts: int
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None


class Held(msgspec.Struct, frozen=True):
    """A deduplication key that is held until its job has started or ended.

    Attributes:
        life: seconds after which it is free whatever became of the job, counted from when the job is due.
        replace: the job takes the place of one that has the key and has not started.
        debounce: seconds by which it is delayed anew with each job that replaces it; 0 for none.
        debounce_max: most seconds of that; 0 for any.
    """

    life: float
    replace: bool
    debounce: float
    debounce_max: float


class PackedJob(msgspec.Struct, frozen=True):
    """A job as the broker stores it: the document's bytes, and what the broker needs without decoding them."""

    id: str
    queue: str
    level: Level
    body: bytes
    delay: float | None = None
    run_at: float | None = None
    key: str | None = None
    key_ttl: float = 0.0
    lined: bool = False
    """It has an order key or a fairness key."""
    held: Held | None = None


_PARTITION: Final = re.compile(r"#[0-9]+")


class Claim(msgspec.Struct, frozen=True, gc=False):
    """A job delivered to this worker. (place, entry, consumer, count) is the fence that every settlement checks.

    Attributes:
        queue: the queue it came from.
        level: of the key it was claimed from; retries return there.
        place: the stream or list it was claimed from.
        entry: its id there.
        count: how often the server delivered this entry.
        body: the document's bytes; ``None`` if the entry holds no document.
        epoch: of the place; job ids are derived from it and the entry, because entry ids repeat across epochs. Empty in
            lists, where entries are UUIDs and never repeat.
        suspect: it was delivered so often that it must be confirmed and then run apart.
        cancelled: the job was cancelled: it must not start any more.
        secret: seals the state of the queue's jobs (`codec.State`); empty if it is not known.
    """

    queue: str
    level: Level
    place: str
    entry: bytes
    count: int
    body: bytes | None
    epoch: bytes
    suspect: bool = False
    cancelled: bool = False
    secret: bytes = b""

    @property
    def home(self) -> str:
        """The queue, or the partition of it that the job was claimed from: ``billing#3``."""
        mark = _PARTITION.search(self.place)
        return self.queue if mark is None else self.queue + mark[0]


# -- outcomes: what happened


class Ok(msgspec.Struct, frozen=True):
    """The handler returned."""

    value: Any = None


class Raised(msgspec.Struct, frozen=True):
    """The handler raised; a `HandlerSignal` is the handler's own wish."""

    error: BaseException


class TimedOut(msgspec.Struct, frozen=True):
    """The handler was still running at its deadline, ``after`` seconds; ``waiting`` says for what, if it is known."""

    after: float
    waiting: str = ""

    @property
    def sentence(self) -> str:
        """In words."""
        return f"timed out after {self.after:g} s" + (f": {self.waiting}" if self.waiting else "")


class Interrupted(msgspec.Struct, frozen=True):
    """The handler was stopped from outside: by shutdown, a lost claim, or other code that cancelled its task.

    Attributes:
        reason: in a few words.
        wait: seconds before the job may run again; 0 for at once.
    """

    reason: str
    wait: float = 0.0


class Cancelled(msgspec.Struct, frozen=True):
    """The job was cancelled, before it started or while it ran."""


class Expired(msgspec.Struct, frozen=True):
    """The job's ``expires_at`` had come before it could start."""


class Undecodable(msgspec.Struct, frozen=True):
    """The bytes are no job for this handler; ``error`` says where they break, ``reason`` what is wrong in a word."""

    error: str
    reason: str = "undecodable"


class UnknownKind(msgspec.Struct, frozen=True):
    """No handler here knows the kind; unknown to the fleet since ``since`` (epoch seconds), as far as is known."""

    kind: str
    since: float | None = None


class Unopened(msgspec.Struct, frozen=True):
    """No key of this worker opens the payload, or it has no store to read it from.

    So it is since ``since`` (epoch seconds), as far as is known; ``reason`` is that of the dead letter in the end.
    """

    error: str
    since: float | None = None
    reason: str = "sealed"


class Postponed(msgspec.Struct, frozen=True):
    """The document's ``run_at`` is in the future: ``until``, in epoch seconds."""

    until: float


class Deferred(msgspec.Struct, frozen=True):
    """A limit of its kind does not let it run before ``until`` (epoch seconds), unless a permit is free sooner.

    Attributes:
        until: when it is due again.
        turn: its place in the order of those that wait, see `codec.State`.
        member: its member in the due set while it waits.
    """

    until: float
    turn: str
    member: str


class Abandoned(msgspec.Struct, frozen=True):
    """``deaths`` workers died holding it; decided before user code ran."""

    deaths: int


class OutOfTurn(msgspec.Struct, frozen=True):
    """It waits in a line: another job holds its order key, or it has not been in its tenant's line yet."""


class Recorded(msgspec.Struct, frozen=True):
    """The ledger has a verdict for the job already; ``why`` in a word or two; ``ended``: none of its hops goes on."""

    verdict: Verdict
    why: str
    ended: bool = False


Outcome: TypeAlias = (
    Ok
    | Raised
    | TimedOut
    | Interrupted
    | Cancelled
    | Expired
    | Undecodable
    | UnknownKind
    | Unopened
    | Postponed
    | Deferred
    | OutOfTurn
    | Abandoned
    | Recorded
)


# -- verdicts: what to do


class Done(msgspec.Struct, frozen=True):
    """Finished for good: acknowledge and delete."""


class Drop(msgspec.Struct, frozen=True):
    """Cancelled: acknowledge and delete, and delete the mark of the cancellation."""


class Expire(msgspec.Struct, frozen=True):
    """It must not start any more: acknowledge and delete.

    Attributes:
        error: what went wrong in the run whose retry would be too late; empty if it expired unrun.
        charged: whether that run counts as a failed attempt.
    """

    error: str = ""
    charged: bool = False


class RetryAt(msgspec.Struct, frozen=True):
    """Run again at ``at`` (epoch seconds); an attempt is charged."""

    at: float
    error: str


class Dead(msgspec.Struct, frozen=True):
    """Move to the dead letters, bytes kept; ``charged``: whether this run counts as a failed attempt."""

    reason: str
    error: str = ""
    charged: bool = False


class ReleaseAt(msgspec.Struct, frozen=True):
    """Release uncharged: at once (``at=None``), or at ``at`` (epoch seconds).

    ``unknown_since`` (epoch seconds) is remembered with the job, so that unknown kinds can end by age. ``turns`` is how
    often in a row it ran and came back uncharged, if it comes back later for that than it was meant to. With ``line``
    it goes by way of its tenant's line, if it has one.
    """

    at: float | None = None
    reason: str = ""
    unknown_since: float | None = None
    turns: int = 0
    line: bool = False


class Park(msgspec.Struct, frozen=True):
    """It waits in the ledger: acknowledge and delete, and the job goes on later.

    Attributes:
        signal: the signal that it waits for; empty if it sleeps.
        until: epoch seconds at which it goes on without one; ``None`` for never.
    """

    signal: str
    until: float | None


Verdict: TypeAlias = Done | Drop | Expire | RetryAt | Dead | ReleaseAt | Park


class Settled(enum.Enum):
    """The result of one settlement."""

    SETTLED = "settled"
    LOST = "lost"  # another worker has the job by now; that is normal, silent and counted
    REFUSED = "refused"  # the server could not store it (out of memory): keep it and try again


SOON: Final = 60.0
"""Seconds within which a delayed job is due soon: a worker that starts now is ready for it."""


class Depth(msgspec.Struct, frozen=True):
    """How many jobs are in one queue.

    Attributes:
        ready: jobs waiting to be claimed, those in the lines of tenants included.
        running: jobs claimed and not settled.
        delayed: jobs parked until later.
        dead: dead letters.
        oldest_age: seconds the oldest ready job has waited; ``None`` when none waits.
        paused: nothing is claimed from it, by an operator or by PostgreSQL.
        inactive: PostgreSQL pauses it (``is_active`` is false).
        waiting: jobs behind others with their order key.
        halted: order keys that halt at dead jobs.
        soon: delayed jobs that are due within `SOON` seconds.
    """

    queue: str
    ready: int
    running: int
    delayed: int
    dead: int
    oldest_age: float | None
    paused: bool
    inactive: bool = False
    waiting: int = 0
    halted: int = 0
    soon: int = 0

    @property
    def load(self) -> int:
        """Jobs for which there should be workers: running ones, and ready ones unless the queue is paused."""
        return self.running + (0 if self.paused or self.inactive else self.ready)


class StoredDocument(msgspec.Struct, frozen=True):
    """A document in Redis, wherever it is.

    Attributes:
        queue: its queue.
        place: its state; ``fair`` and ``order``: it waits in the line of a tenant, or of an order key.
        key: the key that holds it.
        handle: what names it there.
        body: the document.
        job_id: of the job, if the document tells.
    """

    queue: str
    place: Literal["ready", "fair", "order", "delayed", "dead", "running"]
    key: str
    handle: bytes
    body: bytes
    job_id: str | None


class KeyUse(msgspec.Struct, frozen=True):
    """How many values in one place are sealed with a key (`streamworker.encryption`).

    Attributes:
        place: keys of Redis of one kind, or a column of PostgreSQL.
        key: the key's id.
        count: how many values.
    """

    place: str
    key: str
    count: int


class Moved(msgspec.Struct, frozen=True):
    """The result of one batch of a bridge for one level of a queue.

    Attributes:
        queue: the queue's name.
        level: high, normal or low.
        jobs: how many were moved.
        bytes: how many bytes they have.
        left: how many wait to be moved.
        trouble: why the next one cannot be moved; empty if it can.
        lasting: only an operator can end that trouble.
    """

    queue: str
    level: Level
    jobs: int
    bytes: int
    left: int
    trouble: str = ""
    lasting: bool = False


class Progress(msgspec.Struct, frozen=True):
    """The progress that a handler reports.

    Attributes:
        done: how much is done.
        total: of how much; ``None`` if it is not known.
        note: what it is doing.
        at: when it was reported, in epoch seconds.
    """

    done: float
    total: float | None
    note: str
    at: float

    @property
    def text(self) -> str:
        """For people: ``37 of 100 (37 %) reading``."""
        parts = [f"{self.done:g}"]
        if self.total is not None:
            parts.append(f"of {self.total:g}")
            if self.total > 0:
                parts.append(f"({100 * self.done / self.total:.0f} %)")
        return " ".join([*parts, *([self.note] if self.note else [])])


_decoder = msgspec.json.Decoder(Progress)


def read(told: bytes | None) -> Progress | None:
    """Decode a `Progress`; ``None`` for anything else."""
    try:
        return None if told is None else _decoder.decode(told)
    except msgspec.MsgspecError:
        return None


class ScheduleEntry(msgspec.Struct, frozen=True):
    """A schedule that is kept as data.

    Attributes:
        queue: where its jobs go.
        name: unique among the schedules of an app.
        definition: see `streamworker.cron.StoredSchedule`.
        next: epoch seconds of its next tick; ``None`` while it is paused.
        last: epoch seconds of its last tick; ``None`` if there was none.
    """

    queue: str
    name: str
    definition: bytes
    next: float | None
    last: float | None = None


class ScheduleTick(msgspec.Struct, frozen=True):
    """A tick of a `ScheduleEntry`.

    Attributes:
        entry: the schedule as it was read.
        level: of the job.
        body: the job's document; empty if the tick passes without one.
        next: epoch seconds of the next tick; ``None`` leaves it as it is.
        at: epoch seconds of the tick; ``None`` if it is not to be noted as the last one.
    """

    entry: ScheduleEntry
    level: Level
    body: bytes
    next: float | None
    at: float | None


class DueSchedules(msgspec.Struct, frozen=True):
    """Answer to a look at a queue's schedules.

    Attributes:
        now: the server's time, in epoch seconds.
        wait: seconds until the next look; ``None`` if the queue has no schedule.
        due: those whose tick has come, for this process alone.
    """

    now: float
    wait: float | None
    due: list[ScheduleEntry]


class CronTick(msgspec.Struct, frozen=True):
    """One tick of a schedule.

    Attributes:
        queue: queue of the tick's job.
        level: level of the tick's job.
        schedule: identity of the schedule, unique in the queue; its last tick is stored under it.
        at: epoch seconds.
        body: the job's document; empty if the tick passes without a job.
        name: name of the schedule, stable when its expression changes; empty if it has none. Of two schedules with one
            name, the one whose worker started last is in force.
        before: the tick that this worker offered before; ``None`` if this is its first.
        now: the server's time as the worker estimates it, in epoch seconds; ``None`` if it has no estimate.
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
    """Answer to an offered tick.

    Attributes:
        early: seconds after which the tick must be offered again: by the server's clock it is not due yet, or the
            worker's estimate of that clock is wrong by more than five seconds. 0 if the tick is settled.
        added: this call added the tick's job.
        now: the server's time, in epoch seconds.
    """

    early: float
    added: bool
    now: float


ERROR_BYTES: Final = 2000
"""Bytes of an error, its last ones, that tell which errors are alike."""


class DeadError(msgspec.Struct, frozen=True):
    """Why a job is a dead letter.

    Attributes:
        handle: entry id of the dead letter.
        kind: of the job; empty if it has none.
        reason: in a word or two.
        error: the last lines of its traceback; empty if there is none.
    """

    handle: str
    kind: str = ""
    reason: str = ""
    error: str = ""
