"""Everything streamworker raises, as one tree.

::

    StreamworkerError                 exit 1
    ├── UsageError                    exit 2    the call or the command line makes no sense
    ├── ConfigurationError            exit 78   a setting, an app or a server setting is wrong
    ├── Unreachable                   exit 69   Redis or PostgreSQL does not answer
    ├── StuckThread                   exit 70   a handler or other code of users would not end
    ├── HandBackFailed                exit 75   running jobs could not be handed back at shutdown
    ├── JobTooLarge                             the document exceeds STREAMWORKER_MAX_JOB_BYTES
    ├── InvalidJob                              a document or payload that cannot be a job
    ├── PublishUncertain                        the reply to an enqueue was lost
    ├── ProcessDied                             the process of a handler with process=True ended by itself
    ├── ClaimLost                               ctx.emit(): the claim of the job was lost, or the job has ended
    ├── StepsChanged                            the handler's steps are not those that the job has recorded
    ├── NoKey                                   something is sealed, and this process has no key that opens it
    ├── SignalTimeout                           ctx.wait_for(): no signal came in time (a TimeoutError, too)
    ├── NoConnection                            all connections of ctx.database, transaction() or redis are taken
    └── NoResult                                App.result() has none to give
        ├── JobDead                             the job is a dead letter
        ├── JobCancelled                        it was cancelled
        ├── JobExpired                          it had expired before it could start
        ├── ResultNotKept                       it is completed, and its result was not kept
        └── ResultTimeout                       it has not ended in time (a TimeoutError, too)

    HandlerSignal                     raised by handlers to say what should happen, not that something broke
    ├── Retry(after)                  try again, charge an attempt
    ├── Snooze(after)                 try again, charge nothing
    └── Discard(reason)               dead letter at once

    Parked                            raised into handlers by ctx.wait_for() and ctx.sleep(): the job waits
    RunEnded                          raised into handlers by ctx.transaction(): nothing more may be done for this job

Every message is one sentence that tells the reader what to do next; none holds a payload or a password.
"""

from __future__ import annotations

from typing import Any, Final

LONGEST_WAIT: Final = 100 * 366 * 86_400.0
"""Most seconds of any delay: servers count milliseconds in integers of a fixed size."""


class StreamworkerError(Exception):
    """The root of the tree; ``exit_code`` is what the command line exits with."""

    exit_code = 1


class UsageError(StreamworkerError):
    """The call or the command line makes no sense as written."""

    exit_code = 2


class ConfigurationError(StreamworkerError):
    """A setting, the app or a server's setting is wrong; nothing was started."""

    exit_code = 78


class Unreachable(StreamworkerError):
    """A server does not answer where the settings say it is."""

    exit_code = 69


class StuckThread(StreamworkerError):
    """A handler, a thread or a lifespan did not end when asked to; it runs until this process ends."""

    exit_code = 70


class ProcessDied(StreamworkerError):
    """The process of a handler with ``process=True`` ended without an answer: killed, or crashed."""


class HandBackFailed(StreamworkerError):
    """Jobs that still ran at shutdown could not be handed back; their leases must run out instead."""

    exit_code = 75


class JobTooLarge(StreamworkerError):
    """The job's document exceeds ``STREAMWORKER_MAX_JOB_BYTES``."""


class InvalidJob(StreamworkerError):
    """A document or a payload that cannot be a job; ``str(error)`` says where it breaks."""


class PublishUncertain(StreamworkerError):
    """The connection broke before the reply: the job may or may not be queued. Use ``key=`` to enqueue again safely."""


class ClaimLost(StreamworkerError):
    """The claim of a running job was lost, or the job has ended: what this run emits is refused."""


class StepsChanged(StreamworkerError):
    """The steps of a handler were renamed or reordered, or return another type, while a job of it was under way."""


class NoKey(StreamworkerError):
    """Something of a job is sealed (docs/encryption.md), and no key of this process opens it."""


class SignalTimeout(StreamworkerError, TimeoutError):
    """No signal came within the timeout of ``ctx.wait_for()``; one that comes later is refused."""


class NoConnection(StreamworkerError, TimeoutError):
    """All connections of a pool were taken for too long: ``ctx.database``, ``ctx.transaction()`` or ``ctx.redis``."""


class NoResult(StreamworkerError):
    """`App.result` has no result to give.

    Args:
        sentence: why, and what to do.
        job_id: of the job.
    """

    def __init__(self, sentence: str, job_id: str = "") -> None:
        super().__init__(sentence)
        self.job_id = job_id


class JobDead(NoResult):
    """The job failed for good and is a dead letter; ``reason`` is what is written on it."""

    def __init__(self, sentence: str, job_id: str = "", reason: str = "") -> None:
        super().__init__(sentence, job_id)
        self.reason = reason


class JobCancelled(NoResult):
    """The job was cancelled."""


class JobExpired(NoResult):
    """The job had expired before it could start, or before its next attempt."""


class ResultNotKept(NoResult):
    """The job is completed, but its result was not kept."""


class ResultTimeout(NoResult, TimeoutError):
    """The job has not ended within the time that was given; it goes on."""


class HandlerSignal(Exception):
    """Raised by a handler to choose its own verdict."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Its arguments are not those of `__init__`, and it has to come out of a handler's process as it went in.
        return _remade, (type(self), self.args, self.__dict__)


def _remade(cls: type[HandlerSignal], args: tuple[Any, ...], state: dict[str, Any]) -> HandlerSignal:
    signal = cls.__new__(cls, *args)
    signal.__dict__.update(state)
    return signal


def _check_seconds(wish: str, after: object) -> None:
    if callable(seconds := getattr(after, "total_seconds", None)):  # a timedelta
        raise TypeError(f"{wish} needs seconds as a number: write {seconds():g}, or .total_seconds()")
    if isinstance(after, bool) or not isinstance(after, (int, float)):
        raise TypeError(f"{wish} needs seconds as a number, such as 60, and was given {type(after).__name__}")


class Retry(HandlerSignal):
    """Try again and charge an attempt.

    Args:
        after: seconds until the next attempt; ``None`` takes the handler's backoff.
        reason: kept as the attempt's error.
    """

    def __init__(self, after: float | None = None, reason: str = "") -> None:
        super().__init__(reason or "the handler asked for a retry")
        if after is not None:
            _check_seconds(f"Retry(after={after!r})", after)
        if after is not None and not 0 <= after <= LONGEST_WAIT:
            raise ValueError(f"Retry(after={after!r}) needs seconds from 0 up to 100 years")
        self.after = after


class Snooze(HandlerSignal):
    """Try again later; this run was not a failure and charges no attempt.

    Args:
        after: seconds until the next run.
    """

    def __init__(self, after: float) -> None:
        _check_seconds(f"Snooze({after!r})", after)
        super().__init__(f"snoozed for {after:g} s")
        if not 0 <= after <= LONGEST_WAIT:
            raise ValueError(f"Snooze({after!r}) needs seconds from 0 up to 100 years")
        self.after = after


class Discard(HandlerSignal):
    """Move the job to the dead letters at once.

    Args:
        reason: shown to operators in the dead letter.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = str(reason)  # many pass the exception they caught


class RunEnded(BaseException):
    """This run may do nothing more: its job was completed before, has a later delivery, or another run holds its row.

    Not an `Exception`, so that a handler that catches those does not take it for a failure of its own.

    Args:
        why: for the log.
        busy: another run holds the row, and this one may be tried again.
        superseded: the ledger knows a later hop or delivery of the job.
    """

    def __init__(self, why: str, *, busy: bool = False, superseded: bool = False) -> None:
        super().__init__(why)
        self.busy = busy
        self.superseded = superseded


class Parked(BaseException):
    """The job waits, outside of its worker: this run ends here, and a later one starts anew.

    Not an `Exception`, so that a handler that catches those does not take it for a failure of its own.

    Args:
        signal: the name of the signal that the job waits for; empty if it sleeps.
        until: epoch seconds at which it goes on without one; ``None`` for never.
    """

    def __init__(self, signal: str, until: float | None) -> None:
        super().__init__(f"waits for the signal {signal!r}" if signal else "sleeps")
        self.signal = signal
        self.until = until
