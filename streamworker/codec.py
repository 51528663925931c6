"""Bytes to jobs and back: the one JSON document of both modes (docs/design.md, "The wire").

The only importer of JSON on the hot path. Reading is strict about our own fields and blind to all others; rewriting
patches our own keys and keeps every other byte, so that what producers of other languages add survives retries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import sha1
from hmac import compare_digest
from time import time
from typing import Annotated, Any, Final, Literal, NamedTuple
from uuid import UUID, uuid5

import msgspec
import uuid_utils

from streamworker.errors import InvalidJob, JobTooLarge
from streamworker.job import HELD, UNTIL, Claim, Held, Job, Level, PackedJob
from streamworker.payload import AnyPayload, fit_of, infinity_in

MAX_ID_BYTES: Final = 200
MAX_DEPTH: Final = 500
"""Brackets inside each other; Python 3.11 reads 900, less what its stack holds already."""
_STRINGS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS: Final = re.compile(rb"[\[{}\]]")

FIRST_MOMENT: Final = datetime(1, 1, 2, tzinfo=UTC).timestamp()
LAST_MOMENT: Final = datetime(9999, 12, 30, tzinfo=UTC).timestamp()
"""Between these, in epoch seconds, every time is one in every time zone."""

_NAMESPACE: Final = UUID("6f0fd0a5-3c0b-5d3e-9a55-0b6a2f7c1e84")
PRIORITY_OF: Final[dict[Level, int]] = {"high": 50, "normal": 100, "low": 200}
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
MOST_HOPS: Final = 2**52
"""No job goes round that often: behind a larger hop, which is a producer's invention, documents count from 1."""


class Document(msgspec.Struct, omit_defaults=True):
    """The wire format as written; every field but ``payload`` may be missing or null."""

    id: str | None = None
    key: str | None = None
    unique: str | None = None
    queue_name: str | None = None
    kind: str | None = None
    priority: int | Literal["high", "normal", "low"] | None = None
    payload: msgspec.Raw = msgspec.Raw(b"null")
    created_at: datetime | None = None
    run_at: datetime | None = None
    expires_at: datetime | None = None
    attempt_count: Count | None = None
    max_attempts: Count | None = None
    hop: Count | None = None
    headers: dict[str, Any] | None = None
    order_key: str | None = None
    fair_key: str | None = None


MOST: Final = 10**6
"""More deliveries than this are no count of ours."""
GRACE: Final = 86_400.0
"""Seconds for which unsealed state of earlier versions is believed in a queue that they worked on."""
STATE_FIELD: Final = "streamworker_state"
MARK_FIELD: Final = "streamworker"
OLD_HEADERS: Final = frozenset({"streamworker-deliveries", "streamworker-unknown-since", "streamworker-turn"})
"""Names under which earlier versions kept state among the headers. Users never see them, and may not write them."""


class DocumentFields(msgspec.Struct, kw_only=True, gc=False):
    """What of a document decides its fate; unset fields are ``None``. In the order of `Document`, which reads fastest.

    ``created_at`` and ``priority`` are not looked into: the key's level holds, and a producer's odd clock must not kill
    its job.
    """

    id: str | None = None
    key: Any = None
    unique: Any = None
    queue_name: str | None = None
    kind: str | None = None
    payload: msgspec.Raw
    created_at: msgspec.Raw = msgspec.Raw()
    run_at: datetime | None = None
    expires_at: datetime | None = None
    attempt_count: Count | None = None
    max_attempts: Count | None = None
    hop: Count | None = None
    headers: dict[str, Any] | None = None
    order_key: str | None = None
    fair_key: str | None = None
    streamworker: Any = None
    """Perhaps the mark of list mode, see `marks`."""
    state: Any = msgspec.field(default=None, name=STATE_FIELD)
    """What the document tells of the job's state; `state_of` says what of it is believed."""


_encode = msgspec.json.encode
_read: Callable[[bytes], DocumentFields] = msgspec.json.Decoder(DocumentFields).decode


class _Dated(msgspec.Struct):
    created_at: msgspec.Raw = msgspec.Raw()


class _Named(msgspec.Struct):
    id: Any = None
    hop: Any = None
    key: Any = None
    unique: Any = None
    streamworker: Any = None


_moment: Callable[[msgspec.Raw], datetime | None] = msgspec.json.Decoder(datetime | None).decode
_dated: Callable[[bytes], _Dated] = msgspec.json.Decoder(_Dated).decode
_named: Callable[[bytes], _Named] = msgspec.json.Decoder(_Named).decode
_loose: Callable[[bytes], Any] = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read(body: bytes) -> DocumentFields:
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


def keyed(body: bytes | None, *, held: bool = False) -> tuple[str, str] | None:
    """(deduplication key, id) of a job that was enqueued with a key; ``None`` for one without, or for other bytes.

    It may be another job's: freeing it looks for which id it is remembered. ``held``: only one that ends with its job.
    """
    try:
        document = _named(body or b"")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    key, name = document.key, document.id
    fits = isinstance(key, str) and isinstance(name, str) and key and name
    return (key, name) if fits and (not held or document.unique in UNTIL) else None


def job_id(document: DocumentFields, claim: Claim) -> str:
    """The job's id; without one in the document, one derived from where the entry is, the same at every delivery."""
    return id_in(document) or derived_id(claim.place, claim.epoch, claim.entry)


def id_in(document: DocumentFields) -> str | None:
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


def pack(job: Job, *, max_bytes: int, key_ttl: float) -> PackedJob:
    """Encode a job for a broker.

    Args:
        job: what `App.job` made.
        max_bytes: the largest document allowed.
        key_ttl: seconds a deduplication key is remembered unless the job says otherwise.

    Raises:
        JobTooLarge: the document has more than ``max_bytes``.
        InvalidJob: the headers hold something JSON cannot.
    """
    document = Document(  # by position: names would cost as much as the rest of this function
        job.id,
        job.key,
        job.unique,
        job.queue,
        job.kind or None,
        PRIORITY_OF[job.level],
        job.payload,
        job.created_at,
        job.run_at,
        job.expires_at,
        job.attempts or None,
        job.max_attempts,
        # Behind hop 0 workers look whether a job with a fairness key has been in its tenant's line: here it goes there.
        job.hop or (None if job.fair_key is None else 1),
        job.headers,
        job.order_key,
        job.fair_key,
    )
    try:
        body = _encode(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidJob(f"the headers of the job {job.kind!r} cannot be written as JSON: {error}") from None
    if len(body) > MAX_DEPTH:
        check_depth(body)
    if len(body) > max_bytes:
        raise JobTooLarge(
            f"the job {job.kind!r} has {len(body)} bytes and {max_bytes} are allowed: "
            "store the data elsewhere and enqueue a reference, or raise STREAMWORKER_MAX_JOB_BYTES"
        )
    run_at = job.run_at.timestamp() if job.run_at is not None else None
    ttl = key_ttl if job.key_ttl is None else job.key_ttl
    lined = job.order_key is not None or job.fair_key is not None
    held = None
    if job.unique is not None:
        held = Held(HELD if job.key_ttl is None else ttl, job.replace, job.debounce or 0.0, job.debounce_max or 0.0)
    return PackedJob(job.id, job.queue, job.level, body, job.delay, run_at, job.key, ttl, lined, held)


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


def encode_payload(payload: AnyPayload) -> msgspec.Raw:
    """A payload's JSON text, which its own type can decode: what no worker could run is refused where it is written.

    Raises:
        InvalidJob: it holds something JSON cannot, or that a field's type does not take.
        ConfigurationError: its class cannot be decoded at all.
    """
    type_ = type(payload)
    decode, finite, compares, encode = type_.__fit__ or fit_of(type_)
    try:
        text = encode(payload)
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


def state_of(document: DocumentFields, secret: bytes) -> State:
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


def made_at(document: DocumentFields | bytes) -> float | None:
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


def when(document: DocumentFields) -> float | None:
    """``run_at`` as epoch seconds; a time without a zone is UTC."""
    return _seconds(document.run_at)


def expiry(document: DocumentFields) -> float | None:
    """``expires_at`` as epoch seconds; a time without a zone is UTC."""
    return _seconds(document.expires_at)


def _seconds(moment: datetime | None) -> float | None:
    if moment is None:
        return None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


_MARKED: Final = re.compile(
    rb'(\s*\{)"streamworker":\{"id":"([0-9A-Fa-f-]{36})","deliveries":(\d{1,6})(?:,"seal":"([0-9a-f]{1,64})")?\},'
)
_TURN: Final = re.compile(r"[0-9]{1,15}(\.[0-9]{1,3})? [0-9a-f]{8}")
_LARGEST: Final = 2**53


class State(msgspec.Struct, frozen=True, omit_defaults=True):
    """What workers remember of a job from one entry to the next.

    Attributes:
        deliveries: deaths of workers that held the job on earlier entries: a hand-back makes a new entry, whose count
            starts again.
        turn: of a job that waited for a limit: ``ARRIVAL MARK``, when it came there (ms by the server's clock), and the
            end of the member that it waited under.
        unknown_since: epoch seconds at which a worker first met this job without knowing its kind; 0 if none did.
        returns: how often in a row it ran and came back uncharged.
        rapid: how many of the last of those came within a second.
    """

    deliveries: int = 0
    turn: str = ""
    unknown_since: int = 0
    returns: int = 0
    rapid: int = 0


NOTHING: Final = State()


class Mark(NamedTuple):
    """The id a job was given when it was first taken, how often it was delivered, and what proves that."""

    id: str
    deliveries: int
    seal: str = ""


class OldState(NamedTuple):
    """State that stood among the headers, and what stood in its own field beside that."""

    state: State
    beside: Any


def seal(secret: bytes, job_id: str, text: str) -> str:
    """The proof that a worker of the queue wrote ``text`` about the job. Lua computes the same.

    Args:
        secret: as stored in the queue's meta hash.
        job_id: whose state it is.
        text: what is proven; without line breaks.
    """
    key = secret.partition(b" ")[0]
    proven = b"%b %b\n%b\n%b" % (key, text.encode(), job_id.encode(errors="surrogatepass"), key)
    return sha1(proven).hexdigest()  # noqa: S324 - Lua has no other digest, and a collision proves nothing here


def sealed(state: State, job_id: str, secret: bytes) -> dict[str, Any]:
    """The state as it is written into a document."""
    return {**msgspec.to_builtins(state), "seal": seal(secret, job_id, _text(state))}


def believed(raw: Any, job_id: str | None, secret: bytes, *, hop: int) -> State:
    """The state that a document tells of, as far as it is ours.

    Args:
        raw: the document's field, or what `old_state` made of it.
        job_id: the job's, as the document tells it; earlier versions, too, wrote it wherever they wrote state.
        secret: the queue's; without one nothing is believed.
        hop: how often the job was put on a stream again: state is only written then.
    """
    if isinstance(raw, OldState):
        state = believed(raw.beside, job_id, secret, hop=hop)
        if not job_id or not hop or not upgrading(secret):
            return state
        old = raw.state
        deaths = min(MOST, state.deliveries + old.deliveries)  # of a fleet in which both versions put jobs back
        turn, since = state.turn or old.turn, state.unknown_since or old.unknown_since
        return State(deaths, turn, since, state.returns, state.rapid)
    if not isinstance(raw, dict) or not job_id or not secret:
        return NOTHING
    deliveries, turn = _count(raw.get("deliveries"), MOST), _turn(raw.get("turn"))
    returns, rapid = _count(raw.get("returns")), _count(raw.get("rapid"))
    state = State(deliveries, turn, _count(raw.get("unknown_since")), returns, rapid)
    proof = raw.get("seal")
    right = isinstance(proof, str) and proof.isascii() and compare_digest(proof, seal(secret, job_id, _text(state)))
    return state if right else NOTHING


def old_state(headers: dict[str, Any], beside: Any) -> OldState:
    """The state that earlier versions wrote among ``headers``, which loses it here."""
    told = [headers.pop(f"streamworker-{name}", None) for name in ("deliveries", "turn", "unknown-since")]
    return OldState(State(_digits(told[0], MOST), _turn(told[1]), _digits(told[2], _LARGEST)), beside)


def mark_of(value: Any) -> Mark | None:
    """The mark in a document's field ``streamworker``; ``None`` for whatever else may stand there."""
    if not isinstance(value, dict):
        return None
    name, deliveries, proof = value.get("id"), value.get("deliveries"), value.get("seal", "")
    if not isinstance(name, str) or not 0 < len(name) <= 36 or type(deliveries) is not int:
        return None
    return Mark(name, deliveries, proof) if 0 <= deliveries <= MOST and isinstance(proof, str) else None


def proven(mark: Mark, secret: bytes) -> bool:
    """Whether a worker of the queue wrote the mark, as far as can be told: see `GRACE`."""
    if not mark.seal:
        return upgrading(secret)
    return bool(secret) and mark.seal.isascii() and compare_digest(
        mark.seal, seal(secret, mark.id, f"deliveries {mark.deliveries}")
    )  # fmt: skip


def unmarked(element: bytes, secret: bytes) -> tuple[bytes, Mark | None]:
    """The bytes as the producer wrote them, and the mark in front of them if there is one of ours."""
    match = _MARKED.match(element)
    if match is None:
        return element, None
    mark = Mark(match[2].decode(), int(match[3]), (match[4] or b"").decode())
    return (match[1] + element[match.end() :], mark) if proven(mark, secret) else (element, None)


def upgrading(secret: bytes) -> bool:
    """Whether unsealed state of earlier versions is still believed: only where they were before, and not for long."""
    _, _, born = secret.partition(b" ")
    return born.isdigit() and 0 < int(born) <= 1000 * time() < int(born) + 1000 * GRACE


def reserved_in(headers: Mapping[Any, Any]) -> str | None:
    """A name among a user's headers that is ours."""
    return next((name for name in headers if isinstance(name, str) and name.startswith("streamworker-")), None)


def _text(state: State) -> str:
    return f"state {state.deliveries} {state.unknown_since} {state.returns} {state.rapid} {state.turn}"


def _turn(value: Any) -> str:
    return value if isinstance(value, str) and _TURN.fullmatch(value) else ""


def _count(value: Any, most: int = _LARGEST) -> int:
    return value if type(value) is int and 0 <= value <= most else 0


def _digits(value: Any, most: int) -> int:
    """A header's number; those of earlier versions are text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        value = int(value)
    return _count(value, most)


HEADER: Final = "traceparent"
_FORM: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


def trace_id(headers: Mapping[str, Any] | None) -> str | None:
    """The trace's id; ``None`` without a ``traceparent`` that holds one."""
    value = headers.get(HEADER) if headers else None
    found = _FORM.fullmatch(value) if isinstance(value, str) else None
    return found.group(1) if found else None


def deliveries_of(claim: Claim, reading: DocumentFields | None) -> int:
    """Deliveries so far, those on earlier entries of the same job and one that is only reserved included."""
    count = claim.count + claim.suspect
    if reading is None or (reading.state is None and reading.streamworker is None):
        return count
    return count + state_of(reading, claim.secret).deliveries
