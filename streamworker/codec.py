"""Bytes to jobs and back: the one JSON document of both modes (docs/design.md, "The wire").

The only importer of JSON on the hot path. Reading is strict about our own fields and blind to all others; rewriting
patches our own keys and keeps every other byte, so that what producers of other languages add survives retries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID, uuid5

import msgspec
import uuid_utils

from streamworker.errors import InvalidJob, JobTooLarge
from streamworker.job import Claim, Job, Level, Outgoing
from streamworker.limits import TURN_HEADER
from streamworker.marks import mark_of

MAX_ID_BYTES: Final = 200
DELIVERIES_HEADER: Final = "streamworker-deliveries"
"""Deaths of workers that held the job on earlier entries: a hand-back makes a new entry, whose count starts again."""
UNKNOWN_HEADER: Final = "streamworker-unknown-since"
"""Epoch seconds at which a worker first met this job without knowing its kind."""

_NAMESPACE: Final = UUID("6f0fd0a5-3c0b-5d3e-9a55-0b6a2f7c1e84")
_PRIORITY_OF: Final[dict[Level, int]] = {"high": 50, "normal": 100, "low": 200}

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Document(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The wire format as written; every field but ``payload`` may be missing or null."""

    id: str | None = None
    queue_name: str | None = None
    kind: str | None = None
    priority: int | Literal["high", "normal", "low"] | None = None
    payload: msgspec.Raw
    created_at: datetime | None = None
    run_at: datetime | None = None
    attempt_count: Count | None = None
    max_attempts: Count | None = None
    hop: Count | None = None
    headers: dict[str, Any] | None = None


class Reading(msgspec.Struct, kw_only=True, gc=False):
    """What of a document decides its fate; unset fields are ``None``.

    ``created_at`` and ``priority`` are not looked into: the key's level holds, and a producer's odd clock must not kill
    its job.
    """

    payload: msgspec.Raw
    id: str | None = None
    queue_name: str | None = None
    kind: str | None = None
    run_at: datetime | None = None
    attempt_count: Count | None = None
    max_attempts: Count | None = None
    hop: Count | None = None
    headers: dict[str, Any] | None = None
    created_at: msgspec.Raw = msgspec.Raw()
    streamworker: Any = None
    """Perhaps the mark of list mode, see `marks`."""


_encode = msgspec.json.encode
_read: Callable[[bytes], Reading] = msgspec.json.Decoder(Reading).decode


class _Dated(msgspec.Struct):
    created_at: msgspec.Raw = msgspec.Raw()


_moment: Callable[[msgspec.Raw], datetime | None] = msgspec.json.Decoder(datetime | None).decode
_dated: Callable[[bytes], _Dated] = msgspec.json.Decoder(_Dated).decode
_loose: Callable[[bytes], Any] = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read(body: bytes) -> Reading:
    """Decode a document.

    Raises:
        InvalidJob: not JSON, not an object, no payload, or one of our fields has a wrong type or size.
    """
    try:
        document = _read(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJob(f"the document is no job: {error}") from None
    name = document.id
    if name is not None and len(name) * 4 > MAX_ID_BYTES and len(name.encode()) > MAX_ID_BYTES:
        raise InvalidJob(f"the document is no job: its id has more than {MAX_ID_BYTES} bytes")
    return document


def glance(body: bytes | None) -> tuple[str | None, str | None]:
    """(id, kind) of a document for listings; ``None`` for what cannot be read."""
    try:
        document = read(body or b"")
    except InvalidJob:
        return None, None
    return id_in(document), document.kind or None


def job_id(document: Reading, claim: Claim) -> str:
    """The job's id; without one in the document, one derived from where the entry lies, the same at every delivery."""
    return id_in(document) or derived_id(claim.place, claim.epoch, claim.entry)


def id_in(document: Reading) -> str | None:
    """The id that a document holds: its own, or the one that list mode gave it."""
    if document.id:
        return document.id
    mark = mark_of(document.streamworker)
    return mark.id if mark is not None else None


def derived_id(place: str, epoch: bytes, entry: bytes) -> str:
    """UUIDv5 (RFC 9562) of (namespace, stream key, the stream's epoch, entry id); without an epoch the entry itself."""
    if not epoch:
        return entry.decode()
    return str(uuid5(_NAMESPACE, f"{place}|{epoch.decode()}|{entry.decode()}"))


def new_id() -> str:
    """A fresh UUIDv7 (RFC 9562)."""
    return str(uuid_utils.uuid7())


def level_of(priority: int | str | None) -> Level:
    """The level a ``priority`` stands for: up to 50 high, up to 150 normal, else low; or one of the three words.

    Raises:
        ValueError: neither a number nor one of the words.
    """
    match priority:
        case None:
            return "normal"
        case "high" | "normal" | "low":
            return priority
        case int() if not isinstance(priority, bool):
            return "high" if priority <= 50 else "normal" if priority <= 150 else "low"
    raise ValueError(f"priority={priority!r} must be 'high', 'normal', 'low' or a number")


def pack(job: Job, *, max_bytes: int, key_ttl: float) -> Outgoing:
    """Encode a job for a broker.

    Args:
        job: what `App.job` made.
        max_bytes: the largest document allowed.
        key_ttl: seconds a deduplication key is remembered unless the job says otherwise.

    Raises:
        JobTooLarge: the document has more than ``max_bytes``.
        InvalidJob: the headers hold something JSON cannot.
    """
    document = Document(
        id=job.id,
        queue_name=job.queue,
        kind=job.kind or None,
        priority=_PRIORITY_OF[job.level],
        payload=job.payload,
        created_at=job.created_at,
        run_at=job.run_at,
        attempt_count=job.attempts or None,
        max_attempts=job.max_attempts,
        hop=job.hop or None,
        headers=job.headers,
    )
    try:
        body = _encode(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidJob(f"the headers of the job {job.kind!r} cannot be written as JSON: {error}") from None
    if len(body) > max_bytes:
        raise JobTooLarge(
            f"the job {job.kind!r} has {len(body)} bytes and {max_bytes} are allowed: "
            "store the data elsewhere and enqueue a reference, or raise STREAMWORKER_MAX_JOB_BYTES"
        )
    run_at = job.run_at.timestamp() if job.run_at is not None else None
    ttl = key_ttl if job.key_ttl is None else job.key_ttl
    return Outgoing(job.id, job.queue, job.level, body, job.delay, run_at, job.key, ttl)


def encode_payload(payload: Any) -> msgspec.Raw:
    """A payload's JSON text.

    Raises:
        InvalidJob: it holds something JSON cannot.
    """
    try:
        return msgspec.Raw(_encode(payload))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidJob(f"the payload {type(payload).__name__} cannot be written as JSON: {error}") from None


def payload_decoder(type_: Any) -> Callable[[msgspec.Raw], Any]:
    """A decoder of payloads of one type; it raises `msgspec.ValidationError` with the path of what is wrong."""
    return msgspec.json.Decoder(type_).decode


def rewrite(body: bytes, patch: Mapping[str, Any], headers: Mapping[str, str | None] | None = None) -> bytes:
    """The document with our own keys patched and every other key kept byte for byte.

    Args:
        body: a readable document.
        patch: wire names to new values; ``None`` removes the key.
        headers: header names to new values; ``None`` removes one.

    Raises:
        InvalidJob: ``body`` is no document.
    """
    try:
        fields = _loose(body)
        mark = mark_of(msgspec.json.decode(fields["streamworker"])) if "streamworker" in fields else None
        if mark is not None:  # what it says has its place in every document that we write
            del fields["streamworker"]
            patch = {**({} if _filled(fields.get("id")) else {"id": mark.id}), **patch}
            if DELIVERIES_HEADER not in (headers or {}):
                headers = {**(headers or {}), DELIVERIES_HEADER: str(deaths_before(read(body)))}
        if headers:
            stored = bytes(fields.get("headers", b"null"))
            merged = dict(_loose(stored)) if stored != b"null" else {}
            _patch(merged, headers)
            patch = {**patch, "headers": merged or None}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJob(f"the document is no job: {error}") from None
    _patch(fields, patch)
    return _encode(fields)


def _patch(fields: dict[str, Any], patch: Mapping[str, Any]) -> None:
    for name, value in patch.items():
        if value is None:
            fields.pop(name, None)
        else:
            fields[name] = value


def deaths_before(document: Reading) -> int:
    """Deaths of workers that held this job on earlier entries; 0 if nothing sane is noted."""
    mark = mark_of(document.streamworker)
    return _number_header(document, DELIVERIES_HEADER, 0) + (mark.deliveries if mark is not None else 0)


def charges(document: Reading) -> dict[str, None]:
    """The patch of headers that takes back what a document is charged with: deaths, and the age of an unknown kind."""
    known = document.headers or {}
    marked = mark_of(document.streamworker) is not None
    return {
        name: None
        for name in (DELIVERIES_HEADER, UNKNOWN_HEADER, TURN_HEADER)
        if name in known or (marked and name == DELIVERIES_HEADER)
    }


def made_at(document: Reading | bytes) -> float | None:
    """Epoch seconds at which the producer made a job, if it said so; of a document that was read, or of its bytes."""
    try:
        told = (_dated(document) if isinstance(document, bytes) else document).created_at
        moment = _moment(told) if told else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return None if moment is None else (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _filled(raw: msgspec.Raw | None) -> bool:
    return raw is not None and bytes(raw) not in (b"null", b'""')


def unknown_since(document: Reading) -> float | None:
    """Epoch seconds since when nobody knew the kind; ``None`` if this is the first time."""
    return _number_header(document, UNKNOWN_HEADER, 0) or None


def _number_header(document: Reading, name: str, default: int) -> int:
    if document.headers is None:
        return default
    value = document.headers.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value <= 2**53 else default
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        return int(value)
    return default


def when(document: Reading) -> float | None:
    """``run_at`` as epoch seconds; a time without a zone is UTC."""
    moment = document.run_at
    if moment is None:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp()
