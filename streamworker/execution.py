"""Execution: one claim on its way through this worker, from its arrival until it is settled."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from streamworker import codec
from streamworker.broker import SettleRequest
from streamworker.codec import DocumentFields, deliveries_of
from streamworker.context import Context
from streamworker.handlers import Registration
from streamworker.job import Cancelled, Claim, Expired, Interrupted, Ok, Outcome, OutOfTurn, TimedOut
from streamworker.policy import Facts

OK: Final = Ok()
"""The outcome of nearly all runs: compared by identity where that saves time."""
CANCELLED: Final = Cancelled()
EXPIRED: Final = Expired()
OUT_OF_TURN: Final = OutOfTurn()
Cause: TypeAlias = TimedOut | Interrupted | Cancelled
"""Why a worker stops a handler."""


class SharedCall(Protocol):
    """One handler call for several jobs."""

    def shed(self) -> None:
        """One of its jobs was cancelled or lost: the call ends when all of them are."""


class Execution:
    """One claim on its way through this worker, from its arrival until it is settled."""

    __slots__ = (
        "batch", "cancelled_at", "cause", "claim", "context", "deadline", "ended", "ending", "facts", "finished",
        "in_thread", "loaded", "new", "outcome", "payload", "reading", "registration", "seen", "settling", "special",
        "started", "stuck", "suspect", "task", "thread",
    )  # fmt: skip

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.reading: DocumentFields | None = None
        self.registration: Registration | None = None
        self.context: Context[Any] | None = None
        self.payload: Any = None
        self.facts: Facts | None = None
        self.outcome: Outcome | None = None
        self.started: float | None = None
        self.deadline: float | None = None
        self.in_thread = False
        self.settling = False
        self.stuck = False  # it does not end: only a new process frees its place
        self.suspect = False  # several workers died while they held it: it runs apart
        self.special = False  # `Admission` decides when it starts: it has a run_at, a limit or a batch
        self.batch: SharedCall | None = None  # the call it shares with other jobs
        self.task: asyncio.Task[Any] | None = None
        self.seen: Any = None  # what observers get of it (`observe.JobRun`); made for the first of them
        self.ended: float | None = None  # like `started`; only with observers or a history
        self.finished: float | None = None  # epoch seconds; this and `new` only with a ledger
        self.new = False  # the ledger was asked, and has no record of the job
        self.ending: SettleRequest | None = None  # as recorded in the ledger
        self.cause: Cause | None = None  # why the handler was cancelled, if it was
        self.cancelled_at: float | None = None  # when it was, like `started`
        self.thread: int | None = None  # that runs a sync handler
        self.loaded: msgspec.Raw  # the payload's text, if it came from a store; unset otherwise

    @property
    def job_id(self) -> str:
        """The job's id. Of an unreadable document the id it seems to name, else empty."""
        if self.reading is None:
            return codec.told_of(self.claim.body)[0] or ""
        return codec.job_id(self.reading, self.claim)

    @property
    def kind(self) -> str:
        """The kind: the handler's, else what the document says."""
        if self.registration is not None:
            return self.registration.kind
        return (self.reading.kind or "") if self.reading is not None else ""

    @property
    def deliveries(self) -> int:
        """Deliveries so far, including earlier entries of the same job and a delivery that is only reserved."""
        return deliveries_of(self.claim, self.reading)

    def overdue(self, now: float) -> bool:
        """Whether the handler runs past its deadline (``now``: seconds of the monotonic clock)."""
        return self.deadline is not None and self.outcome is None and now > self.deadline

    def late(self) -> bool:
        """Whether the job has expired by the server's clock, as `DueCheck` read it."""
        return self.facts is not None and self.facts.expires is not None and monotonic() >= self.facts.expires

    def cancel(self, cause: Cause) -> None:
        """Cancel the running handler. A thread cannot be cancelled: it sees ``ctx.cancelled``."""
        if self.outcome is not None or self.started is None:
            return
        if self.context is not None:
            self.context.cancel(type(cause).__name__)
        if cause is CANCELLED:
            if self.cause is CANCELLED:
                return  # once: it may clean up until its deadline
            self.cause = self.cause or cause
        if self.batch is not None:
            self.cause = self.cause or cause
            self.batch.shed()
            return
        if self.in_thread:
            return
        self.cause = self.cause or cause
        self.cancelled_at = self.cancelled_at or monotonic()
        if self.task is not None:
            self.task.cancel()
