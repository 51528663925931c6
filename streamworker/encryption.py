"""Keys: what jobs leave in Redis and PostgreSQL, sealed with AES-256-GCM so that only holders of a key read it.

Sealed are payloads, results, outputs, steps and the texts of errors. A value is sealed with a key of its own, which is
HMAC-SHA256 of the named key and a random salt: a named key may seal any number of values, where AES-GCM alone allows
2**32 (NIST SP 800-38D, 8.3). What a value belongs to is authenticated with it: its purpose, its job's id, and of a
payload the kind. In another job's place it does not open. docs/encryption.md describes the bytes for other languages.
"""

from __future__ import annotations

import binascii
import hmac
import os
import re
from base64 import b64decode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias

import msgspec

from streamworker.errors import ConfigurationError, NoKey
from streamworker.job import Job

Purpose: TypeAlias = Literal["payload", "result", "output", "step", "error", "log"]

FIELD: Final = "streamworker_sealed"
"""The one field of a payload or a result that is sealed."""
_FIELD: Final = FIELD.encode()
_HEAD: Final = len(FIELD) + 16
KEY_BYTES: Final = 32
SALT: Final = 16
NONCE: Final = 12
MOST_TEXT: Final = 1200
"""Bytes of an error's text that are sealed: with what stands around them, all is read where errors are grouped."""
MOST_REASON: Final = 400
"""The same for the reason why a result is not kept, which is cut to less."""
_LABEL: Final = b"streamworker 1"
_MAGIC: Final = b"sealed:"
_KEY_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,40}")
_TEXT: Final = re.compile(r"\[sealed ([A-Za-z0-9._-]{1,40}) ([A-Za-z0-9_-]{20,})\]")
USES: Final = re.compile(
    rb'"key\\*"\s*:\s*\\*"([A-Za-z0-9._-]{1,40})\\*"\s*,\s*\\*"data\\*"|\[sealed ([A-Za-z0-9._-]{1,40}) '
    rb"|sealed:([A-Za-z0-9._-]{1,40}):"
)
"""Finds the ids of keys in whatever is stored."""


class _Sealed(msgspec.Struct, omit_defaults=True):
    """A sealed payload or result.

    Attributes:
        key: id of the key.
        data: salt, nonce, ciphertext and tag, in base64url without padding.
        of: in place of the job's id the deduplication key of a job that may replace another one, whose id it then has;
            or the schedule, of a tick.
    """

    key: str
    data: str
    of: str | None = None


class _Envelope(msgspec.Struct):
    streamworker_sealed: _Sealed


_envelope: Final = msgspec.json.Decoder(_Envelope).decode


class Sealer(Protocol):
    """Seals what a job leaves; `Keys`, or `PLAIN`, which leaves everything as it is."""

    def sealed_bytes(self, purpose: Purpose, job_id: str, data: bytes) -> bytes:
        """Seal bytes."""

    def opened_bytes(self, purpose: Purpose, job_id: str, data: bytes) -> bytes:
        """Open what `sealed_bytes` made.

        Raises:
            NoKey: there is no such key, or it is another one.
        """

    def sealed_job(self, job: Job) -> Job:
        """A job that is about to be sent, its payload sealed; one that is sealed is returned as it is."""

    def scheduled_payload(self, payload: msgspec.Raw, name: str, kind: str) -> msgspec.Raw:
        """The payload of a schedule that is kept as data, sealed; its ticks have it as it is."""

    def sealed_json(self, purpose: Purpose, job_id: str, text: str) -> str:
        """Seal JSON text: JSON again."""

    def opened_json(self, purpose: Purpose, job_id: str, text: str) -> str:
        """Open what `sealed_json` made; other JSON is returned as it is.

        Raises:
            NoKey: there is no such key, or it is another one.
        """

    def opened_payload(self, payload: msgspec.Raw, job_id: str, kinds: Sequence[str]) -> msgspec.Raw:
        """The payload's JSON text.

        Args:
            payload: of a document.
            job_id: of the job.
            kinds: the document's, or all that its handler answers to.

        Raises:
            NoKey: there is no such key, or it is another one.
        """

    def shown_payload(self, payload: msgspec.Raw, job_id: str, kind: str) -> msgspec.Raw:
        """The payload's JSON text, or the payload as it is if it does not open."""


class Plain:
    """The `Sealer` of apps without encryption."""

    def sealed_bytes(self, purpose: Purpose, job_id: str, data: bytes) -> bytes:  # noqa: ARG002
        return data

    def opened_bytes(self, purpose: Purpose, job_id: str, data: bytes) -> bytes:  # noqa: ARG002
        return data

    def opened_payload(self, payload: msgspec.Raw, job_id: str, kinds: Sequence[str]) -> msgspec.Raw:  # noqa: ARG002
        return payload

    def sealed_job(self, job: Job) -> Job:
        return job

    def scheduled_payload(self, payload: msgspec.Raw, name: str, kind: str) -> msgspec.Raw:  # noqa: ARG002
        return payload

    def sealed_json(self, purpose: Purpose, job_id: str, text: str) -> str:  # noqa: ARG002
        return text

    def opened_json(self, purpose: Purpose, job_id: str, text: str) -> str:  # noqa: ARG002
        return text

    def shown_payload(self, payload: msgspec.Raw, job_id: str, kind: str) -> msgspec.Raw:  # noqa: ARG002
        return payload


PLAIN: Final = Plain()


class Keys:
    """The keys of an app: ``App(encryption=Keys(current="2026-11", keys={"2026-11": ...}))``.

    To rotate, first give every process the new key beside the old ones, then make it the current one. An old key may go
    when `streamworker keys check` finds nothing that is sealed with it.

    Args:
        current: id of the key that seals.
        keys: id to key: 32 bytes, or their base64 text (``streamworker keys new`` prints one).
        required: a job whose payload is not sealed is a dead letter. ``False`` lets it run: for the time in which
            producers without the keys, or jobs from before, are still there.

    Raises:
        ConfigurationError: a key or an id cannot be one, or cryptography is not installed.
    """

    def __init__(self, current: str, keys: Mapping[str, bytes | str], *, required: bool = True) -> None:
        try:
            from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415
        except ImportError:
            raise ConfigurationError(
                "encryption needs the package cryptography: pip install 'streamworker[encryption]'"
            ) from None
        self._aes: Callable[[bytes], Any] = AESGCM
        self._wrong: type[Exception] = InvalidTag
        self._keys = {_checked_id(name): _checked_key(name, key) for name, key in keys.items()}
        if current not in self._keys:
            raise ConfigurationError(f"the current key {current!r} is not among the keys {', '.join(keys) or '(none)'}")
        self.current: Final = current
        self.required: Final = required

    def __repr__(self) -> str:
        """Without the keys."""
        return f"Keys(current={self.current!r}, keys={sorted(self._keys)}, required={self.required})"

    @property
    def ids(self) -> frozenset[str]:
        """Ids of all keys."""
        return frozenset(self._keys)

    # -- bytes: outputs, steps, lines of logs

    def sealed_bytes(self, purpose: Purpose, job_id: str, data: bytes) -> bytes:
        """Seal bytes."""
        return b"%b%b:%b" % (_MAGIC, self.current.encode(), self._seal(_bound(purpose, job_id), data))

    def opened_bytes(self, purpose: Purpose, job_id: str, data: bytes) -> bytes:
        """Open what `sealed_bytes` made; other bytes, which were never sealed, are returned as they are.

        Raises:
            NoKey: there is no such key, or it is another one.
        """
        if not data.startswith(_MAGIC):
            return data
        name, _, sealed = data[len(_MAGIC) :].partition(b":")
        return self._open(name.decode(errors="replace"), _bound(purpose, job_id), sealed)

    # -- JSON: payloads and results

    def sealed_job(self, job: Job) -> Job:
        """A job that is about to be sent, its payload sealed; one that is sealed is returned as it is."""
        if sealed_in(job.payload) is not None:
            return job
        bound, of = _bound("payload", job.id, job.kind), None
        if job.replace and job.key is not None:  # the earlier job's id stays, in Redis and in PostgreSQL
            bound, of = _bound("payload", job.key, job.kind, of="key"), job.key
        return msgspec.structs.replace(job, payload=msgspec.Raw(self._envelope(bound, bytes(job.payload), of)))

    def scheduled_payload(self, payload: msgspec.Raw, name: str, kind: str) -> msgspec.Raw:
        """The payload of a schedule that is kept as data, sealed; its ticks have it as it is."""
        if sealed_in(payload) is not None:
            return payload
        of = f"schedule {name}"
        return msgspec.Raw(self._envelope(_bound("payload", of, kind, of="key"), bytes(payload), of))

    def opened_payload(self, payload: msgspec.Raw, job_id: str, kinds: Sequence[str]) -> msgspec.Raw:
        """The payload's JSON text; one that is not sealed is returned as it is.

        Raises:
            NoKey: there is no such key, or it is another one.
        """
        sealed = sealed_in(payload)
        if sealed is None:
            return payload
        subject, of = (job_id, "id") if sealed.of is None else (sealed.of, "key")
        data = _decoded(sealed.data)
        for kind in dict.fromkeys(kinds):
            try:
                return msgspec.Raw(self._open(sealed.key, _bound("payload", subject, kind, of=of), data))
            except NoKey:
                if sealed.key not in self._keys:
                    raise
        raise self._no_key(sealed.key)

    def shown_payload(self, payload: msgspec.Raw, job_id: str, kind: str) -> msgspec.Raw:
        """The payload's JSON text, or the payload as it is if it does not open."""
        try:
            return self.opened_payload(payload, job_id, (kind, ""))
        except NoKey:
            return payload

    def sealed_json(self, purpose: Purpose, job_id: str, text: str) -> str:
        """Seal JSON text: JSON again."""
        return self._envelope(_bound(purpose, job_id), text.encode(), None).decode()

    def opened_json(self, purpose: Purpose, job_id: str, text: str) -> str:
        """Open what `sealed_json` made; other JSON is returned as it is.

        Raises:
            NoKey: there is no such key, or it is another one.
        """
        sealed = sealed_in(text.encode())
        return (
            text if sealed is None else self._open(sealed.key, _bound(purpose, job_id), _decoded(sealed.data)).decode()
        )

    def sealed_result(self, job_id: str, result: bytes) -> dict[str, Any]:
        """What is kept of a result, given as JSON text."""
        envelope = self._envelope(_bound("result", job_id), result, None)
        found: dict[str, Any] = msgspec.json.decode(envelope)
        return found

    def opened_result(self, job_id: str, result: bytes) -> bytes:
        """The JSON text of a result; one that is not sealed is returned as it is.

        Raises:
            NoKey: there is no such key, or it is another one.
        """
        sealed = sealed_in(result)
        return result if sealed is None else self._open(sealed.key, _bound("result", job_id), _decoded(sealed.data))

    # -- texts: of errors

    def sealed_text(self, job_id: str, text: str, most: int = MOST_TEXT) -> str:
        """The text as ``[sealed KEY ...]``, which may stand inside another text."""
        data = text.encode(errors="backslashreplace")[:most].decode(errors="ignore").encode()
        return f"[sealed {self.current} {_encoded(self._seal(_bound('error', job_id), data))}]"

    def opened_text(self, job_id: str, text: str) -> str:
        """The text with what is sealed in it opened; ``[sealed KEY]`` stands for what cannot be."""

        def opened(match: re.Match[str]) -> str:
            try:
                return self._open(match[1], _bound("error", job_id), _decoded(match[2])).decode(errors="replace")
            except NoKey:
                return f"[sealed {match[1]}]"

        return _TEXT.sub(opened, text) if "[sealed " in text else text

    # -- AES

    def _envelope(self, bound: bytes, data: bytes, of: str | None) -> bytes:
        sealed = _Sealed(self.current, _encoded(self._seal(bound, data)), of)
        return msgspec.json.encode(_Envelope(sealed))

    def _seal(self, bound: bytes, data: bytes) -> bytes:
        salt = os.urandom(SALT + NONCE)
        aes = self._aes(_derived(self._keys[self.current], salt[:SALT]))
        sealed: bytes = aes.encrypt(salt[SALT:], data, bound)
        return salt + sealed

    def _open(self, name: str, bound: bytes, data: bytes) -> bytes:
        key = self._keys.get(name)
        if key is None or len(data) < SALT + NONCE:
            raise self._no_key(name)
        try:
            aes = self._aes(_derived(key, data[:SALT]))
            opened: bytes = aes.decrypt(data[SALT : SALT + NONCE], data[SALT + NONCE :], bound)
        except self._wrong:
            raise self._no_key(name) from None
        return opened

    def _no_key(self, name: str) -> NoKey:
        if name in self._keys:
            return NoKey(
                f"it does not open with the key {name!r}: this process has another key of that name, or it was sealed "
                "for another job"
            )
        return NoKey(f"it is sealed with the key {name!r}, which this process does not have: add it to Keys(keys=...)")


def sealed_in(payload: msgspec.Raw | bytes) -> _Sealed | None:
    """What is sealed in a payload or a result; ``None`` for one that is not."""
    if _FIELD not in bytes(memoryview(payload)[:_HEAD]):
        return None
    try:
        return _envelope(payload).streamworker_sealed
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def hidden(text: str) -> str:
    """A text for people, in which ``[sealed KEY]`` stands for what is sealed."""
    return _TEXT.sub(r"[sealed \1]", text) if "[sealed " in text else text


def is_sealed(data: bytes) -> bool:
    """Whether `Keys.sealed_bytes` made these bytes."""
    return data.startswith(_MAGIC)


def new_key() -> str:
    """A fresh key, as base64 text."""
    return urlsafe_b64encode(os.urandom(KEY_BYTES)).decode()


def _bound(purpose: str, subject: str, kind: str = "", *, of: str = "id") -> bytes:
    """What is authenticated with a sealed value. The length comes first: no two subjects and kinds give the same."""
    name = subject.encode(errors="surrogatepass")
    return b"%b %b\n%d\n%b\n%b" % (purpose.encode(), of.encode(), len(name), name, kind.encode(errors="surrogatepass"))


def _derived(key: bytes, salt: bytes) -> bytes:
    return hmac.digest(key, _LABEL + salt, "sha256")


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return b""  # opens with no key


def _checked_id(name: Any) -> str:
    if not isinstance(name, str) or not _KEY_ID.fullmatch(name):
        raise ConfigurationError(f"{name!r} is no id of a key: use 1 to 40 of A-Z a-z 0-9 . _ -")
    return name


def _checked_key(name: str, key: Any) -> bytes:
    """The 32 bytes of a key. No message shows any of them."""
    try:
        if isinstance(key, str):
            key = b64decode(key.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ConfigurationError(
            f"the key {name!r} is not 32 bytes, or their base64 text: `streamworker keys new` prints one"
        )
    return key
