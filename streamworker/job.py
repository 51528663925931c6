"""What moves through the house: a Job, the Claim on it, the Outcome of running it, the Verdict on the outcome.

Frozen values without behaviour. A job is data all the way: ``app.enqueue`` makes an `Outgoing`, the broker hands out
`Claim`, ``execute`` turns a claim into an `Outcome`, ``policy.judge`` turns that into a `Verdict`, and the broker
settles (claim, verdict). Times are seconds since the epoch; only the brokers know milliseconds.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any, Literal, TypeAlias

import msgspec

Level: TypeAlias = Literal["high", "normal", "low"]
LEVELS: tuple[Level, Level, Level] = ("high", "normal", "low")
"""The levels of a queue, in the order they are taken."""


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
        created_at: when the producer made it, if it said so.
        run_at: not before this moment.
        delay: seconds to wait from the moment of enqueueing; only on jobs to be enqueued.
        key: deduplication key; only on jobs to be enqueued.
        key_ttl: seconds the key is remembered; ``None`` takes ``STREAMWORKER_KEY_TTL``.
        headers: what travels with the job besides its payload.
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
    key: str | None = None
    key_ttl: float | None = None
    headers: dict[str, Any] | None = None


class Enqueued(msgspec.Struct, frozen=True):
    """The answer to an enqueue.

    Attributes:
        id: the job's id; with a remembered ``key``, the earlier job's.
        new: False when ``key`` was remembered and nothing was added.
    """

    id: str
    new: bool


class Outgoing(msgspec.Struct, frozen=True):
    """A job on its way to a broker: the bytes, and what the broker must know without reading them."""

    id: str
    queue: str
    level: Level
    body: bytes
    delay: float | None = None
    run_at: float | None = None
    key: str | None = None
    key_ttl: float = 0.0


class Claim(msgspec.Struct, frozen=True, gc=False):
    """A job delivered to this worker. (place, entry, consumer, count) is the fence every ending is checked against.

    Attributes:
        queue: the queue it came from.
        level: the level of the key it lay in; retries return there.
        place: the stream or list it is claimed in.
        entry: its id there.
        count: how often the server delivered this entry.
        body: the document's bytes; ``None`` if the entry holds no document.
        epoch: what ids of the place's entries are derived from; entry ids repeat across epochs. Empty in lists, where
            entries are UUIDs and never repeat.
        suspect: it was delivered so often that it must be confirmed and then run alone.
        cancelled: somebody cancelled the job: it must not start any more.
        secret: what the queue's state of jobs is sealed with (`marks`); empty where it is not known.
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


# -- outcomes: what happened


class Ok(msgspec.Struct, frozen=True):
    """The handler returned."""

    value: Any = None


class Raised(msgspec.Struct, frozen=True):
    """The handler raised; a `HandlerSignal` is the handler's own wish."""

    error: BaseException


class TimedOut(msgspec.Struct, frozen=True):
    """The handler was still running at its deadline, ``after`` seconds; ``waiting`` says for what, if that is known."""

    after: float
    waiting: str = ""

    @property
    def sentence(self) -> str:
        """In words."""
        return f"timed out after {self.after:g} s" + (f": {self.waiting}" if self.waiting else "")


class Interrupted(msgspec.Struct, frozen=True):
    """The handler was stopped for reasons not its own: shutdown, a lost claim, or other code cancelled its task.

    Attributes:
        reason: in a few words.
        wait: seconds before the job may run again; 0 for at once.
    """

    reason: str
    wait: float = 0.0


class Cancelled(msgspec.Struct, frozen=True):
    """Somebody cancelled the job, before it started or while it ran."""


class Undecodable(msgspec.Struct, frozen=True):
    """The bytes are no job for this handler; ``error`` says where they break."""

    error: str


class UnknownKind(msgspec.Struct, frozen=True):
    """No handler here knows the kind; unknown to the fleet since ``since`` (epoch seconds), as far as is known."""

    kind: str
    since: float | None = None


class Postponed(msgspec.Struct, frozen=True):
    """The document says not before ``until`` (epoch seconds), and that is still to come."""

    until: float


class Deferred(msgspec.Struct, frozen=True):
    """A limit of its kind does not let it run before ``until`` (epoch seconds), unless it is called sooner.

    Attributes:
        until: when it comes again by itself.
        turn: what it brings along then, see `marks.State`.
        member: what it is called by while it waits: its member in the due set.
    """

    until: float
    turn: str
    member: str


class Abandoned(msgspec.Struct, frozen=True):
    """``deaths`` workers died holding it; decided before user code ran."""

    deaths: int


class Recorded(msgspec.Struct, frozen=True):
    """The ledger knows what is to be done with the job, whatever happened here; ``why`` in a word or two."""

    verdict: Verdict
    why: str


Outcome: TypeAlias = (
    Ok
    | Raised
    | TimedOut
    | Interrupted
    | Cancelled
    | Undecodable
    | UnknownKind
    | Postponed
    | Deferred
    | Abandoned
    | Recorded
)


# -- verdicts: what to do


class Done(msgspec.Struct, frozen=True):
    """Finished for good: acknowledge and delete."""


class Drop(msgspec.Struct, frozen=True):
    """Ended for good without having been done: acknowledge and delete, and forget that it was cancelled."""


class RetryAt(msgspec.Struct, frozen=True):
    """Run again at ``at`` (epoch seconds); an attempt is charged."""

    at: float
    error: str


class Dead(msgspec.Struct, frozen=True):
    """Move to the dead letters, bytes kept; ``charged`` tells whether this run counts as a failed attempt."""

    reason: str
    error: str = ""
    charged: bool = False


class ReleaseAt(msgspec.Struct, frozen=True):
    """Give back uncharged: at once (``at=None``), or at ``at`` (epoch seconds).

    ``unknown_since`` (epoch seconds) is remembered with the job, so that unknown kinds can end by age. ``turns`` is how
    often in a row it ran and came back uncharged, if it comes back later for that than it was meant to.
    """

    at: float | None = None
    reason: str = ""
    unknown_since: float | None = None
    turns: int = 0


Verdict: TypeAlias = Done | Drop | RetryAt | Dead | ReleaseAt


class Settled(enum.Enum):
    """What became of one settled item."""

    SETTLED = "settled"
    LOST = "lost"  # somebody else's by now; losing is normal, silent and counted
    REFUSED = "refused"  # the server could not store it (out of memory): keep it and try again


class Depth(msgspec.Struct, frozen=True):
    """How much lies in one queue.

    Attributes:
        ready: jobs waiting to be claimed.
        running: jobs claimed and not settled.
        delayed: jobs parked until later.
        dead: dead letters.
        oldest_age: seconds the oldest ready job has waited; ``None`` when none waits.
        paused: nothing is claimed from it, whoever says so.
        inactive: it is PostgreSQL that says so (``is_active`` is false), not an operator.
    """

    queue: str
    ready: int
    running: int
    delayed: int
    dead: int
    oldest_age: float | None
    paused: bool
    inactive: bool = False


class Moved(msgspec.Struct, frozen=True):
    """What one batch of a bridge did to one level of a queue.

    Attributes:
        queue: the queue's name.
        level: high, normal or low.
        jobs: how many were moved.
        bytes: how many bytes they have.
        left: how many wait to be moved.
        trouble: why the next one cannot be moved; empty if it can.
        lasting: people have to end that trouble.
    """

    queue: str
    level: Level
    jobs: int
    bytes: int
    left: int
    trouble: str = ""
    lasting: bool = False


class Progress(msgspec.Struct, frozen=True):
    """A handler's word.

    Attributes:
        done: how much of it is done.
        total: of how much; ``None`` if nobody knows.
        note: what it is doing.
        at: when it said so, in epoch seconds.
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
    """What was written of it; ``None`` for anything else."""
    try:
        return None if told is None else _decoder.decode(told)
    except msgspec.MsgspecError:
        return None
