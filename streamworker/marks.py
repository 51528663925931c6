"""What documents carry of ours between entries: the state of a job, and the mark of list mode. Both are sealed.

**The state** is a field of its own beside the user's headers, written whenever a worker puts a job back::

    {"payload":…,"streamworker_state":{"deliveries":2,"turn":"…","unknown_since":17,"seal":"5f1c…"}}

**The mark** says what a list's element remembers of having been taken and given back. It is put in front of an object's
own fields, textually, so that all other bytes stay what the producer wrote::

    {"streamworker":{"id":"0198…","deliveries":2,"seal":"5f1c…"},"payload":…}

Lua writes and takes off the same text (broker/lua/list_return.lua, list_take.lua); readers of a document find the mark
as a field, also where a bridge moved the element into a stream.

**The seal** is what keeps both from being written by others: a digest of the text, the job's id and a secret that is in
the queue's meta hash. A producer may write any document, but without reading that hash it cannot write a seal, and
state without a right seal is not believed. Ids need no seal: a producer may choose its job's id anyway.

Versions before the seal kept the state among the headers and left marks unsealed. A queue that they worked on believes
those for `GRACE` after the first worker with seals met it, and never again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha1
from hmac import compare_digest
from time import time
from typing import Any, Final, NamedTuple

import msgspec

MOST: Final = 10**6
"""More deliveries than this are no count of ours."""
GRACE: Final = 86_400.0
"""Seconds for which unsealed state of earlier versions is believed in a queue that they worked on."""
STATE_FIELD: Final = "streamworker_state"
MARK_FIELD: Final = "streamworker"
OLD_HEADERS: Final = frozenset({"streamworker-deliveries", "streamworker-unknown-since", "streamworker-turn"})
"""Names under which earlier versions kept state among the headers. Users never see them, and may not write them."""

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
        secret: as it lies in the queue's meta hash.
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
