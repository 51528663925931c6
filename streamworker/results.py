"""Results: the note about the end of a job, published to waiters and stored for a while; and waiting for it."""

from __future__ import annotations

from time import monotonic
from typing import Any, Final, Literal, Protocol

import msgspec

from streamworker.errors import JobCancelled, JobDead, JobExpired, ResultNotKept, ResultTimeout
from streamworker.payload import infinity_in
from streamworker.postgres import Archive
from streamworker.redact import describe

MAX_RESULT: Final = 262_144
"""Bytes of the largest result that is kept."""


class JobEnd(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a job ended.

    Attributes:
        status: as the ledger calls it.
        result: what its handler returned, as JSON; empty where it is not kept here.
        error: why it is dead, what its last run failed with if it expired then, or why there is no result.
    """

    status: Literal["completed", "dead", "cancelled", "expired"]
    result: msgspec.Raw = msgspec.Raw()
    error: str | None = None


_decoder: Final = msgspec.json.Decoder(JobEnd)
COMPLETED: Final = b'{"status":"completed"}'
CANCELLED: Final = b'{"status":"cancelled"}'


def written(note: JobEnd) -> bytes:
    """A note as bytes; half a surrogate pair in its error is spelled out."""
    if note.error is not None and not note.error.isascii():
        note = msgspec.structs.replace(note, error=note.error.encode(errors="backslashreplace").decode())
    return msgspec.json.encode(note)


def read(told: bytes) -> JobEnd | None:
    """A note, or for a number the note of a result that was kept for so many ms; ``None`` for bytes that are none."""
    if told.isdigit():
        return JobEnd("completed", error=f"its result was kept for {int(told[:18]) / 1000:g} s and has expired")
    try:
        return _decoder.decode(told)
    except msgspec.MsgspecError:
        return None


def result_json(value: Any) -> bytes:
    """What a handler returned, as it is kept.

    Raises:
        ValueError: it cannot be kept; the message says why.
    """
    try:
        result = msgspec.json.encode(value)
    except BaseException as error:  # noqa: BLE001 - a user's objects run code here, and it must not end the worker
        what = describe(error)[:1000]
        raise ValueError(f"what the handler returned cannot be written as JSON: {what}") from None
    if b"null" in result and (place := infinity_in(value)) is not None:
        where = f"at {place.removeprefix('.')} " if place else ""
        raise ValueError(f"what the handler returned is {where}NaN or an infinity, which JSON lacks")
    if len(result) > MAX_RESULT:
        raise ValueError(f"what the handler returned has {len(result)} bytes and {MAX_RESULT} are kept")
    return result


def completed(value: Any) -> bytes:
    """The note of a job whose handler returned ``value``."""
    try:
        return written(JobEnd("completed", msgspec.Raw(result_json(value))))
    except ValueError as error:
        return written(JobEnd("completed", error=str(error)))


LOOK: Final = 10.0
"""Seconds between looks while nothing is heard: what was told while the connection was down is found then."""


class ResultWaiter(Protocol):
    """Subscription to the end of one job."""

    async def kept(self) -> bytes | None:
        """The result note that is stored, if there is one; ends of the job are published for the next 30 seconds."""

    async def heard(self, timeout: float) -> bytes | None:
        """The next published note; empty if one may have been missed, ``None`` after ``timeout`` seconds."""


async def wait_for(
    hearing: ResultWaiter, archive: Archive | None, job: tuple[str | None, str], end: float | None
) -> Any:
    """Look, then listen, and look again when there may be something new; ``job`` is its queue, if known, and its id."""
    _, job_id = job
    while True:
        note = await _noted(hearing, archive, *job)
        look_at = monotonic() + LOOK
        while note is None:
            left = min(look_at, end if end is not None else look_at) - monotonic()
            told = await hearing.heard(max(0.0, left))
            if told is None and end is not None and monotonic() >= end:
                raise ResultTimeout(
                    f"the job {job_id} has not ended yet, or longer ago than its result is kept (result_ttl): wait for "
                    "longer, or look at it",
                    job_id,
                )
            if not told:
                break
            note = read(told)
            if note is not None and note.status == "completed" and not bytes(note.result):
                # Told by a worker that keeps nothing in Redis: the ledger has it, if there is one.
                note = await _noted(hearing, archive, *job) or note
        if note is not None:
            return _value(note, job_id)


async def _noted(hearing: ResultWaiter, archive: Archive | None, queue: str | None, job_id: str) -> JobEnd | None:
    """What is kept of a job's end, in Redis or in the ledger."""
    kept = await hearing.kept()
    note = read(kept) if kept is not None else None
    if note is not None and (archive is None or note.status != "completed" or bytes(note.result)):
        return note
    record = None if archive is None else await archive.find(job_id, queue)
    if record is None or record.status not in ("completed", "dead", "cancelled", "expired"):
        return note
    lost = record.result is None and record.error is not None
    kept_none = record.status != "completed" or lost
    result = msgspec.Raw() if kept_none else msgspec.Raw(msgspec.json.encode(record.result))
    return JobEnd(record.status, result, record.error)


def _value(note: JobEnd, job_id: str) -> Any:
    if note.status == "dead":
        why = note.error or "nobody said why"
        raise JobDead(f"the job {job_id} is a dead letter ({why}): look at it, and retry or drop it", job_id, why)
    if note.status == "cancelled":
        raise JobCancelled(f"the job {job_id} was cancelled", job_id)
    if note.status == "expired":
        why = f" ({note.error})" if note.error else ""
        raise JobExpired(f"the job {job_id} expired before it could start{why}: enqueue its data anew", job_id)
    if not bytes(note.result):
        why = note.error or "set result_ttl on its handler, or use the ledger"
        raise ResultNotKept(f"the job {job_id} is completed, but has no result: {why}", job_id)
    return msgspec.json.decode(note.result)
