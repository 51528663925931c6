"""What is told of a job that has ended: to those who wait for it, and for a while to those who come later."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from streamworker.codec import infinity_in
from streamworker.redact import describe

MAX_RESULT: Final = 262_144
"""Bytes of the largest result that is kept."""


class JobEnd(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a job ended.

    Attributes:
        status: as the ledger calls it.
        result: what its handler returned, as JSON; empty where it is not kept here.
        error: why it is dead, or why there is no result.
    """

    status: Literal["completed", "dead", "cancelled"]
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
