"""One claim on its way through this worker."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any, Final, Protocol, TypeAlias

from streamworker import codec
from streamworker.broker import Ending
from streamworker.codec import Reading, deliveries_of
from streamworker.context import Context
from streamworker.handlers import Registration
from streamworker.job import Cancelled, Claim, Interrupted, Outcome, TimedOut
from streamworker.policy import Facts

CANCELLED: Final = Cancelled()
Cause: TypeAlias = TimedOut | Interrupted | Cancelled
"""Why a worker stops a handler."""


class Shared(Protocol):
    """A call for several jobs."""

    def shed(self) -> None:
        """One of its jobs was cancelled: the call ends when all of them are."""


class Execution:
    """One claim on its way through this worker, from its arrival until it is settled."""

    __slots__ = (
        "batch", "cause", "claim", "context", "deadline", "due", "ended", "ending", "facts", "finished", "in_thread",
        "new", "outcome", "passed", "payload", "reading", "registration", "seen", "settling", "special", "started",
        "stuck", "suspect", "task", "thread", "told",
    )  # fmt: skip

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.reading: Reading | None = None
        self.registration: Registration | None = None
        self.context: Context[Any] | None = None
        self.payload: Any = None
        self.facts: Facts | None = None
        self.outcome: Outcome | None = None
        self.started: float | None = None
        self.deadline: float | None = None
        self.in_thread = False
        self.settling = False
        self.stuck = False  # it will not end: only a new process makes room
        self.suspect = False  # two workers or more were lost with it: it must run alone
        self.due = False  # the server was asked whether its run_at has come
        self.special = self.passed = False  # it does not simply run: see `entrance`; its limit let it through
        self.batch: Shared | None = None  # where it runs together with others
        self.task: asyncio.Task[Any] | None = None
        self.seen: Any = None  # what observers are shown of it (`observe.JobRun`), once there is one to show it to
        self.ended: float | None = None  # like `started`; only where there are observers
        self.finished: float | None = None  # epoch seconds; this and the next two only where there is a ledger
        self.ending: Ending | None = None  # as recorded
        self.new = False  # the ledger was asked, and knew nothing of the job
        self.cause: Cause | None = None  # why the handler was cancelled, if it was
        self.told: float | None = None  # when it was, like `started`
        self.thread: int | None = None  # that runs a sync handler

    @property
    def job_id(self) -> str:
        """The job's id; of a document that cannot be read what it names, empty if that is nothing."""
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
        """Deliveries so far, those on earlier entries of the same job and one that is only reserved included."""
        return deliveries_of(self.claim, self.reading)

    def overdue(self, now: float) -> bool:
        """The handler is still running past its deadline (``now``: seconds of the monotonic clock)."""
        return self.deadline is not None and self.outcome is None and now > self.deadline

    def cancel(self, cause: Cause) -> None:
        """Cancel the running handler, once for good; a thread is only told through ``ctx.cancelled``."""
        if self.outcome is not None or self.started is None:
            return
        if self.context is not None:
            self.context.cancel(type(cause).__name__)
        if cause is CANCELLED:
            if self.cause is CANCELLED:
                return  # told once: it may take its time to clean up, until its deadline
            self.cause = self.cause or cause
        if self.batch is not None:
            self.cause = self.cause or cause
            self.batch.shed()
            return
        if self.in_thread:
            return
        self.cause = self.cause or cause
        self.told = self.told or monotonic()
        if self.task is not None:
            self.task.cancel()
