"""From a payload and options to a `Job`: what producers may say, checked where they say it."""

from __future__ import annotations

from datetime import UTC, datetime
from types import NoneType
from typing import Any, Final, TypedDict

from typing_extensions import Unpack

from streamworker import codec
from streamworker.errors import LONGEST_WAIT, InvalidJob, UsageError
from streamworker.finite import infinity_in
from streamworker.handlers import Payload, check_queue
from streamworker.job import Job
from streamworker.marks import reserved_in

# What checkers know and callers without one do not: said here, before it breaks somewhere else.
_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "queue": (str, NoneType),
    "delay": (float, int, NoneType),
    "run_at": (datetime, NoneType),
    "key": (str, NoneType),
    "key_ttl": (float, int, NoneType),
    "headers": (dict, NoneType),
}


_WANTED: Final = "enqueue an instance of a class like `class Send(Payload, kind='mail.send', queue='mail')`"


class JobOptions(TypedDict, total=False):
    """The options of `App.job`, `App.enqueue` and `App.enqueue_blocking`.

    Attributes:
        queue: another queue than the payload's class names.
        priority: ``high``, ``normal`` (the default), ``low``, or a number: up to 50 high, up to 150 normal, else low.
        delay: seconds to wait from the moment of enqueueing.
        run_at: not before this moment; without a time zone it is UTC.
        key: deduplication key: while it is remembered, enqueueing again gives the earlier job's id.
        key_ttl: seconds the key is remembered; ``STREAMWORKER_KEY_TTL`` unless given.
        headers: travel with the job; anything JSON can hold.
    """

    queue: str | None
    priority: str | int
    delay: float | None
    run_at: datetime | None
    key: str | None
    key_ttl: float | None
    headers: dict[str, Any] | None


def make_job(payload: Payload, **options: Unpack[JobOptions]) -> Job:
    """A job with a fresh id.

    Args:
        payload: its class names kind and queue.
        options: see `JobOptions`.

    Raises:
        UsageError: it is no payload, an option makes no sense, or two contradict each other.
        InvalidJob: the payload does not fit its own type, or cannot be written as JSON.
    """
    type_: Any = type(payload)
    if not issubclass(type_, Payload) or type_ is Payload:
        raise UsageError(_no_payload(payload))
    if not options:  # bulk: there is nothing more to check
        return Job(
            id=codec.new_id(),
            queue=type_.__queue__,
            kind=type_.__kind__,
            payload=codec.encode_payload(payload),
            created_at=datetime.now(UTC),
        )
    _check_types(options)
    delay, run_at = options.get("delay"), options.get("run_at")
    key, ttl = options.get("key"), options.get("key_ttl")
    if delay is not None and run_at is not None:
        raise UsageError("delay and run_at say the same thing twice: give one of them")
    _check_seconds("delay", delay)
    _check_seconds("key_ttl", ttl)
    if key is not None and (not key or not _is_text(key)):
        raise UsageError(f"key={key!r} cannot be a key: leave it out, or give it some text")
    _check_headers(options.get("headers"))
    try:
        level = codec.level_of(options.get("priority"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    queue = options.get("queue")
    return Job(
        id=codec.new_id(),
        queue=type_.__queue__ if queue is None else check_queue(queue),
        kind=type_.__kind__,
        payload=codec.encode_payload(payload),
        level=level,
        created_at=datetime.now(UTC),
        run_at=run_at.replace(tzinfo=UTC) if run_at is not None and run_at.tzinfo is None else run_at,
        delay=delay,
        key=key,
        key_ttl=ttl,
        headers=options.get("headers"),
    )


def job_of(given: Payload | Job, **options: Unpack[JobOptions]) -> Job:
    """A job out of a payload and options; or a job that was made before, which brings its own.

    Raises:
        UsageError: a job, and options; else what `make_job` raises.
    """
    if not isinstance(given, Job):
        return make_job(given, **options)
    for name, value in options.items():
        if value is not None and (name, value) != ("priority", "normal"):
            raise UsageError(f"{name}={value!r} comes too late for a job that was made before: give it to app.job()")
    return given


def _check_types(options: JobOptions) -> None:
    for name, kinds in _KINDS.items():
        if not isinstance(options.get(name), kinds):
            raise UsageError(f"{name}={options.get(name)!r} must be {kinds[0].__name__} or None")


def _no_payload(given: Any) -> str:
    if isinstance(given, Job):
        return "this is a job already: give it to enqueue() or enqueue_many() as it is"
    if isinstance(given, type):
        if issubclass(given, Payload) and given is not Payload:
            return f"{given.__name__} is a class: enqueue an instance of it, {given.__name__}(...)"
        return f"the class {given.__name__} is no payload: {_WANTED}"
    what = type(given).__name__
    article = "an" if what[:1].lower() in "aeiou" else "a"
    return f"{article} {what} is no payload: {_WANTED}"


def _check_headers(headers: dict[str, Any] | None) -> None:
    if not headers:
        return
    if (name := reserved_in(headers)) is not None:
        raise UsageError(f"the header {name!r} has a name that streamworker keeps for itself: rename it")
    if (place := infinity_in(headers)) is not None:
        raise InvalidJob(f"the header {place.removeprefix('.')} is NaN or an infinity, which JSON lacks")


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: lone surrogates cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= LONGEST_WAIT:
        raise UsageError(f"{name}={value!r} must be seconds from 0 up to 100 years")
