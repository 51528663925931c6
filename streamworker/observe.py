"""The `Observer` interface: calls about every job, for error trackers, metrics and traces.

Observers report; middleware wraps. An observer is called on the worker's event loop and must not block it.
`on_start` and `on_outcome` are called in the task that runs the handler, so that a context variable set in the one is
seen by the handler (in its thread, too) and can be reset in the other. What an observer raises is logged and harms no
job.

Our own metrics and traces are observers, and use nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import monotonic, time
from typing import Any, Final

import msgspec

from streamworker import codec
from streamworker.codec import trace_id
from streamworker.execution import Execution
from streamworker.job import Job, Level, Outcome, Raised, Settled, TimedOut, Undecodable, Verdict
from streamworker.policy import word_of
from streamworker.redact import describe

LINKED: Final = 1_000
"""Jobs of a flow, at most, of which senders get the edges."""
MOST_LINKS: Final = 32
"""Edges to one job that they get."""
_DASH: Final = 13
"""Where the dash is in the id of a stream's entry, whose first part is milliseconds."""


def ready_at(run: Execution) -> float | None:
    """The moment at which a job became ready, in epoch seconds; ``None`` if it is not known (see `JobRun.waited`)."""
    claim, reading = run.claim, run.reading
    millis, _, _ = claim.entry.partition(b"-")  # every job of a stream pays for this
    if len(millis) == _DASH and millis.isdigit():
        return int(millis) / 1000
    if claim.body is None or reading is None or reading.hop:
        return None
    made, due = codec.made_at(reading), codec.when(reading)
    return None if made is None else max(made, due or 0.0)


class JobRun:
    """One claim of a job on its way through this worker. The same object in every call about it.

    Attributes:
        queue: the queue it was taken from.
        kind: the job's kind: the handler's, else what the document says, which may be anything.
        known: this worker has a handler of that kind.
        verdict: on the outcome; ``None`` until it is settled.
    """

    __slots__ = ("_run", "_trace_id", "kind", "known", "queue", "verdict", "worker_id")

    def __init__(self, run: Execution, worker_id: str) -> None:
        self._run: Final = run
        self._trace_id: str | None = None
        self.worker_id: Final = worker_id
        self.queue: Final = run.claim.queue
        registration = run.registration
        self.known: Final = registration is not None
        self.kind: Final = registration.kind if registration is not None else run.kind
        self.verdict: Verdict | None = None

    @property
    def job_id(self) -> str:
        """The job's id; empty if the document cannot be read."""
        return self._run.job_id

    @property
    def handler(self) -> str | None:
        """The handler's dotted name; ``None`` without one."""
        return self._run.registration.name if self._run.registration is not None else None

    @property
    def level(self) -> Level:
        """high, normal or low."""
        return self._run.claim.level

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return (self._run.facts.attempts if self._run.facts is not None else 0) + 1

    @property
    def last_attempt(self) -> bool:
        """A failure now makes the job dead."""
        facts = self._run.facts
        return facts is not None and facts.attempts + 1 >= facts.limits.max_attempts

    @property
    def deliveries(self) -> int:
        """How often this job was handed to a worker: above 1, a worker was lost with it."""
        return self._run.deliveries

    @property
    def headers(self) -> Mapping[str, Any]:
        """What travels with the job besides its payload."""
        return (self._run.reading.headers if self._run.reading is not None else None) or {}

    @property
    def payload(self) -> Any:
        """The decoded payload, which may be private; ``None`` if it was not decoded."""
        return self._run.payload

    @property
    def trace_id(self) -> str | None:
        """The trace it is seen in, in hexadecimal: that of its headers, unless a tracer said another.

        Log lines about the job hold it.
        """
        return self._trace_id or trace_id(self.headers)

    @trace_id.setter
    def trace_id(self, value: str) -> None:
        self._trace_id = value

    @property
    def started_at(self) -> float | None:
        """Epoch seconds at which its handler was called; ``None`` if it was not.

        Such are the undecodable, of unknown kind, delivered too often, or recorded as ended.
        """
        started = self._run.started
        return None if started is None else time() - monotonic() + started

    @property
    def seconds(self) -> float | None:
        """How long the handler ran; ``None`` before it ended, and if it never began."""
        started, ended = self._run.started, self._run.ended
        return None if started is None or ended is None else ended - started

    @property
    def waited(self) -> float | None:
        """Seconds from the moment the job was ready until its handler was called; ``None`` if that is not known.

        An entry of a stream tells its moment, that of a retry or a delayed job too; an element of a list only if its
        producer said ``created_at``, and only before its first retry.
        """
        started = self._run.started
        if started is None:
            return None
        since = ready_at(self._run)
        return None if since is None else max(0.0, time() - monotonic() + started - since)

    @property
    def outcome(self) -> Outcome | None:
        """What happened, as data (`streamworker.job`); ``None`` while it runs."""
        return self._run.outcome

    @property
    def word(self) -> str:
        """The outcome in a word: ``ok``, ``raised``, ``timed_out``, ``snoozed``, ``discarded``, ``interrupted``, …"""
        return word_of(self._run.outcome)

    @property
    def exception(self) -> BaseException | None:
        """What the handler raised, with its traceback; `Retry`, `Snooze` and `Discard` are raised, too."""
        outcome = self._run.outcome
        return outcome.error if isinstance(outcome, Raised) else None

    @property
    def error(self) -> str | None:
        """What went wrong, in one bounded line; ``None`` if nothing did."""
        match self._run.outcome:
            case Raised(error=error):
                return describe(error)
            case TimedOut(sentence=sentence):
                return sentence
            case Undecodable():
                return "the document does not fit"
        return None


class Settlement(msgspec.Struct, frozen=True):
    """One batch of claims that was settled in one call.

    Attributes:
        items: each run, and whether its ending was stored, its claim was lost, or the server refused it for now.
        began: epoch seconds.
        seconds: how long the server took.
    """

    items: Sequence[tuple[JobRun, Settled]]
    began: float
    seconds: float


class Observer:
    """Told of every job. Derive from it and override what you need; what is not overridden is not called."""

    def on_start(self, run: JobRun) -> None:
        """The handler is about to be called."""

    def on_outcome(self, run: JobRun) -> None:
        """The run has its outcome: ``run.outcome``, ``run.exception``. A failed job may be tried again.

        Called once for every claim, also for those that never came to run; then without `on_start`.
        """

    def on_settled(self, settlement: Settlement) -> None:
        """Endings were sent to the broker; ``run.verdict`` says which."""

    def on_dead(self, run: JobRun) -> None:
        """The job is a dead letter now: ``run.verdict`` has reason and error, ``run.exception`` the last exception."""


class Sender(Observer):
    """An observer that is also there when jobs are sent, such as a tracer."""

    def sending(self, jobs: Sequence[Job]) -> AbstractContextManager[Sequence[Job]]:
        """Around an enqueue; the jobs it yields are those that are sent. What it raises, the caller of enqueue gets.

        Args:
            jobs: those of one call, in order.
        """
        return nullcontext(jobs)

    def sending_flow(
        self,
        jobs: Sequence[Job],
        before: Sequence[Sequence[int]],  # noqa: ARG002 - for those who override it
    ) -> AbstractContextManager[Sequence[Job]]:
        """Around the start of a flow; as `sending`, unless it is overridden.

        Args:
            jobs: those of the flow, in order.
            before: for each of them the places of those right before it; empty for a flow of more than `LINKED` jobs.
        """
        return self.sending(jobs)
