"""Bytes to jobs and back: the one JSON document of both modes (docs/design.md, "The wire").

The only importer of JSON on the hot path. Reading is strict about our own fields and blind to all others; rewriting
patches our own keys and keeps every other byte, so that what producers of other languages add survives retries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID, uuid5

import msgspec
import uuid_utils

from streamworker.errors import InvalidJob, JobTooLarge
from streamworker.finite import infinity_in
from streamworker.job import Claim, Job, Level, Outgoing
from streamworker.marks import (
    MARK_FIELD,
    MOST,
    NOTHING,
    OLD_HEADERS,
    STATE_FIELD,
    State,
    believed,
    mark_of,
    old_state,
    proven,
    sealed,
)
from streamworker.payload import Payload, fit_of

MAX_ID_BYTES: Final = 200
MAX_DEPTH: Final = 500
"""Brackets inside each other; Python 3.11 reads 900, less what its stack holds already."""
_STRINGS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS: Final = re.compile(rb"[\[{}\]]")

FIRST_MOMENT: Final = datetime(1, 1, 2, tzinfo=UTC).timestamp()
LAST_MOMENT: Final = datetime(9999, 12, 30, tzinfo=UTC).timestamp()
"""Between these, in epoch seconds, every time is one in every time zone."""

_NAMESPACE: Final = UUID("6f0fd0a5-3c0b-5d3e-9a55-0b6a2f7c1e84")
_PRIORITY_OF: Final[dict[Level, int]] = {"high": 50, "normal": 100, "low": 200}

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


MOST_HOPS: Final = 2**52
"""No job goes round that often: behind a larger hop, which is a producer's invention, documents count from 1."""


class Document(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The wire format as written; every field but ``payload`` may be missing or null."""

    id: str | None = None
    key: str | None = None
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
    state: Any = msgspec.field(default=None, name=STATE_FIELD)
    """What the document tells of the job's state; `state_of` says what of it is believed."""


_encode = msgspec.json.encode
_read: Callable[[bytes], Reading] = msgspec.json.Decoder(Reading).decode


class _Dated(msgspec.Struct):
    created_at: msgspec.Raw = msgspec.Raw()


class _Named(msgspec.Struct):
    id: Any = None
    hop: Any = None
    streamworker: Any = None


class _Keyed(msgspec.Struct):
    id: Any = None
    key: Any = None


_moment: Callable[[msgspec.Raw], datetime | None] = msgspec.json.Decoder(datetime | None).decode
_dated: Callable[[bytes], _Dated] = msgspec.json.Decoder(_Dated).decode
_keyed: Callable[[bytes], _Keyed] = msgspec.json.Decoder(_Keyed).decode
_named: Callable[[bytes], _Named] = msgspec.json.Decoder(_Named).decode
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
    if document.headers and not OLD_HEADERS.isdisjoint(document.headers):
        document.state = old_state(document.headers, document.state)
        document.headers = document.headers or None
    return document


def told_of(body: bytes | None) -> tuple[str | None, int]:
    """(id, hop) of a document that is no job for a worker, being too large or odd in some field, as far as it tells."""
    try:
        told = _named(body or b"")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None, 0
    mark = mark_of(told.streamworker)
    names = (told.id, None if mark is None else mark.id)
    fit = (name for name in names if isinstance(name, str) and name and len(name.encode()) <= MAX_ID_BYTES)
    hop = told.hop if type(told.hop) is int and 0 <= told.hop <= 2**53 else 0
    return next(fit, None), hop


def glance(body: bytes | None) -> tuple[str | None, str | None]:
    """(id, kind) of a document for listings; ``None`` for what cannot be read."""
    try:
        document = read(body or b"")
    except InvalidJob:
        return None, None
    return id_in(document), document.kind or None


def keyed(body: bytes | None) -> tuple[str, str] | None:
    """(deduplication key, id) of a job that was enqueued with a key; ``None`` for one without, or for other bytes.

    Producers may write a key that is another job's: whoever frees it looks whether it is remembered for this id.
    """
    try:
        document = _keyed(body or b"")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    key, name = document.key, document.id
    return (key, name) if isinstance(key, str) and isinstance(name, str) and key and name else None


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


def written_hop(hop: int) -> int:
    """A hop as documents hold it; the ledger counts on, and a hop that it knows to be above is looked for first."""
    return hop if hop <= MOST_HOPS else 1


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
        key=job.key,
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
    check_depth(body)
    if len(body) > max_bytes:
        raise JobTooLarge(
            f"the job {job.kind!r} has {len(body)} bytes and {max_bytes} are allowed: "
            "store the data elsewhere and enqueue a reference, or raise STREAMWORKER_MAX_JOB_BYTES"
        )
    run_at = job.run_at.timestamp() if job.run_at is not None else None
    ttl = key_ttl if job.key_ttl is None else job.key_ttl
    return Outgoing(job.id, job.queue, job.level, body, job.delay, run_at, job.key, ttl)


def check_depth(body: bytes) -> None:
    """See that a document is no deeper than any worker can read, whatever its Python and its stack.

    Raises:
        InvalidJob: it has more than `MAX_DEPTH` brackets inside each other.
    """
    if len(body) <= MAX_DEPTH or body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return  # most documents: too short to be deep
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise InvalidJob(f"the document is more than {MAX_DEPTH} brackets deep: store the data elsewhere")


def encode_payload(payload: Payload) -> msgspec.Raw:
    """A payload's JSON text, which its own type can decode: what no worker could run is refused where it is written.

    Raises:
        InvalidJob: it holds something JSON cannot, or that a field's type does not take.
        ConfigurationError: its class cannot be decoded at all.
    """
    type_ = type(payload)
    decode, finite, compares = type_.__fit__ or fit_of(type_)
    try:
        text = _encode(payload)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidJob(f"the payload {type_.__name__} cannot be written as JSON: {error}") from None
    try:
        decoded = decode(text)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - hooks of a user's types run here
        if (place := infinity_in(payload)) is not None:
            raise InvalidJob(_not_finite(type_, place)) from None
        raise InvalidJob(f"the payload {type_.__name__} does not fit its own type: {misfit(type_, error)}") from None
    if not finite and b"null" in text and not (compares and decoded == payload):
        place = infinity_in(payload)
        if place is not None:
            raise InvalidJob(_not_finite(type_, place))
    return msgspec.Raw(text)


def misfit(type_: type, error: Exception) -> str:
    """Why a decoder refused a payload, with class and field: ``Send.to[0]: Expected `str`, got `int```."""
    what, _, path = str(error).partition(" - at `$")
    where = f"{type_.__name__}{path.rstrip('`')}: " if path else ""
    return f"{where}{what or type(error).__name__}"


def _not_finite(type_: type, place: str) -> str:
    where = f"{type_.__name__}{place}"
    return f"the payload {type_.__name__} cannot be written as JSON: {where} is NaN or an infinity, which JSON lacks"


def rewrite(body: bytes, patch: Mapping[str, Any], *, state: State | None = None, secret: bytes = b"") -> bytes:
    """The document with our own keys patched and every other key kept byte for byte.

    Args:
        body: a readable document.
        patch: wire names to new values; ``None`` removes the key.
        state: what is remembered of the job from now on; ``None`` leaves what the document says of it.
        secret: what the queue's state is sealed with; without one none is written.

    Raises:
        InvalidJob: ``body`` is no document.
    """
    try:
        fields = _loose(body)
        if state is not None:
            _forget_state(fields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJob(f"the document is no job: {error}") from None
    for name, value in patch.items():
        if value is None:
            fields.pop(name, None)
        else:
            fields[name] = value
    if state is not None and state != NOTHING and secret:
        fields[STATE_FIELD] = sealed(state, _name_in(fields), secret)
    return _encode(fields)


def _forget_state(fields: dict[str, Any]) -> None:
    """Take all state of ours out of a document; the id that a mark gives stays with it."""
    fields.pop(STATE_FIELD, None)
    mark = mark_of(msgspec.json.decode(fields[MARK_FIELD])) if MARK_FIELD in fields else None
    if mark is not None:
        del fields[MARK_FIELD]
        if not _filled(fields.get("id")):
            fields["id"] = mark.id
    if b'"streamworker-' in bytes(fields.get("headers", b"")):
        known = _loose(fields["headers"])
        headers = {name: value for name, value in known.items() if name not in OLD_HEADERS}
        if len(headers) == len(known):
            pass  # a name like ours is not ours: the bytes stay
        elif headers:
            fields["headers"] = headers
        else:
            del fields["headers"]


def _name_in(fields: Mapping[str, Any]) -> str:
    name = fields.get("id") or ""
    return name if isinstance(name, str) else msgspec.json.decode(name, type=str | None) or ""


def state_of(document: Reading, secret: bytes) -> State:
    """What workers remember of the job; what they did not write themselves is not believed.

    Args:
        document: as it was read.
        secret: the queue's, see `Claim.secret`.
    """
    if document.state is None and document.streamworker is None:
        return NOTHING
    state = believed(document.state, id_in(document), secret, hop=document.hop or 0)
    mark = mark_of(document.streamworker)
    if mark is None or not proven(mark, secret):
        return state
    return msgspec.structs.replace(state, deliveries=min(MOST, state.deliveries + mark.deliveries))


def made_at(document: Reading | bytes) -> float | None:
    """Epoch seconds at which the producer made a job, if it said so; of a document that was read, or of its bytes."""
    try:
        told = (_dated(document) if isinstance(document, bytes) else document).created_at
        moment = _moment(told) if told else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if moment is None:
        return None
    # A clock that stands before year 1 or after 9999 somewhere on Earth tells nothing that others could read.
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return seconds if FIRST_MOMENT <= seconds <= LAST_MOMENT else None


def _filled(raw: msgspec.Raw | None) -> bool:
    return raw is not None and bytes(raw) not in (b"null", b'""')


def when(document: Reading) -> float | None:
    """``run_at`` as epoch seconds; a time without a zone is UTC."""
    moment = document.run_at
    if moment is None:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp()
