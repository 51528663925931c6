"""A raw message as what we store of it. Built for mail that strangers wrote, some of it to do harm."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.header import decode_header, make_header
from email.message import Message
from email.utils import getaddresses, parsedate_to_datetime
from typing import Any, BinaryIO, Final

from mailer.spool import PIECE, Skeleton

MAX_HEADER: Final = 10_000
MAX_ID: Final = 998
MAX_TEXT: Final = 1024 * 1024
MAX_ADDRESSES: Final = 1_000
MAX_ATTACHMENTS: Final = 1_000

# Codecs that are no charsets of mail and take quadratic time.
_NO_CHARSETS: Final = frozenset({"punycode", "idna"})
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}/[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")


@dataclass(frozen=True)
class Attachment:
    """Decoded bytes in `Incoming.file`, and what they are said to be."""

    media_type: str
    filename: str | None
    sha256: bytes
    size: int
    start: int


@dataclass(frozen=True)
class Incoming:
    """What a message is made of.

    Attributes:
        skeleton: the parsed message, for whoever wants more of it.
        file: holds the attachments' bytes; see `pieces`.
        body_text: the first plain text, at most `MAX_TEXT` bytes of it.
        body_html: the first HTML, likewise. It is a stranger's: sanitise it before a browser sees it.
    """

    skeleton: Skeleton
    file: BinaryIO
    message_id: str | None
    in_reply_to: str | None
    subject: str
    sender: str
    recipients: list[str]
    sent_at: datetime | None
    spam: bool
    body_text: str | None = None
    body_html: str | None = None
    attachments: list[Attachment] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)

    def pieces(self, attachment: Attachment) -> Iterator[bytes]:
        """An attachment's bytes."""
        return pieces(self.file, attachment.start, attachment.size)


def read(raw: BinaryIO, scratch: BinaryIO) -> Incoming:
    """Read a message. Never raises for what is in it: what cannot be understood is a defect, and the raw bytes remain.

    Works in bounded memory and takes its time for large messages: call it in a thread.

    Args:
        raw: the message, seekable.
        scratch: an empty file that takes the decoded attachments. Both stay open while the result is used.
    """
    skeleton = Skeleton(raw)
    message = skeleton.message
    bodies: dict[str, str] = {}
    attachments: list[Attachment] = []
    defects = [*skeleton.defects, *(type(defect).__name__ for defect in message.defects)]
    for part, is_own in _leaves(message, own=True):
        media_type = _media_type(part)
        named = _filename(part)
        if is_own and named is None and media_type in ("text/plain", "text/html") and media_type not in bodies:
            bodies[media_type] = _text(part, skeleton)
        elif len(attachments) < MAX_ATTACHMENTS:
            attachments.append(_attachment(part, skeleton, scratch, media_type, named))
        else:
            defects.append(f"more than {MAX_ATTACHMENTS} attachments: the others are only in the raw message")
            break
    return Incoming(
        skeleton=skeleton,
        file=scratch,
        message_id=_identifier(message, "Message-ID"),
        in_reply_to=_identifier(message, "In-Reply-To"),
        subject=header(message, "Subject"),
        sender=(addresses(message, "From", "Sender") or [""])[0],
        recipients=addresses(message, "To", "Cc", "Delivered-To", "X-Original-To"),
        sent_at=_date(message),
        spam=header(message, "X-Spam-Flag").strip().lower() == "yes",
        body_text=bodies.get("text/plain"),
        body_html=bodies.get("text/html"),
        attachments=attachments,
        defects=defects[:100],
    )


def header(message: Message[str, str], name: str) -> str:
    """A header as clean text, encoded words decoded; empty if it is not there."""
    try:
        value = str(message.get(name, ""))[:MAX_HEADER]
    except Exception:  # noqa: BLE001 - the library's own reading of a broken header
        return ""
    with suppress(Exception):  # what cannot be decoded is shown as it came
        words = decode_header(value)
        if all(charset is None or _is_charset(charset) for _, charset in words):
            value = str(make_header(words))
    return clean(" ".join(value.split()))


def addresses(message: Message[str, str], *names: str) -> list[str]:
    """The addresses in some headers, in order, each once; without the names people give them."""
    values = [str(value)[:MAX_HEADER] for name in names for value in message.get_all(name, [])[:100]]
    try:
        found = [clean(address)[:MAX_ID] for _, address in getaddresses(values) if "@" in address]
    except Exception:  # noqa: BLE001 - no header may stop a message
        found = []
    return list(dict.fromkeys(found))[:MAX_ADDRESSES]


def clean(text: str) -> str:
    """Text that PostgreSQL takes: no NUL, no lone surrogates."""
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


def pieces(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    """A range of a file, a piece at a time."""
    end = start + size
    while start < end:
        file.seek(start)
        piece = file.read(min(PIECE, end - start))
        start += len(piece)
        yield piece


def children(part: Message[str, str]) -> list[Message[str, str]]:
    """The parts of a part, or the message it holds."""
    # Of a part without parts the library would decode the text, with a charset that may be anything.
    payload: Any = part.get_payload() if part.is_multipart() else ()
    return [child for child in payload if isinstance(child, Message)]


def _leaves(part: Message[str, str], *, own: bool) -> Iterator[tuple[Message[str, str], bool]]:
    """All parts that hold no parts, and whether they are the message's own or those of a message attached to it."""
    inner = children(part)
    if not inner or part.get_content_type() == "message/delivery-status":  # whose "parts" are blocks of fields
        yield part, own
        return
    for child in inner:
        yield from _leaves(child, own=own and part.get_content_maintype() == "multipart")


def _media_type(part: Message[str, str]) -> str:
    said = clean(part.get_content_type())
    if said.startswith("multipart/"):
        return "text/plain"  # it has no parts, or it would not be asked: its boundary is missing
    return said if _TOKEN.fullmatch(said) else "application/octet-stream"


def _filename(part: Message[str, str]) -> str | None:
    """The name an attachment is given; no path leads anywhere from it. Empty for an attachment without one."""
    try:
        name, disposition = part.get_filename(), part.get_content_disposition()
    except Exception:  # noqa: BLE001 - RFC 2231 in the hands of strangers
        return ""
    if name is None:
        return "" if disposition == "attachment" else None
    with suppress(Exception):
        words = decode_header(name[:1000])
        if all(charset is None or _is_charset(charset) for _, charset in words):
            name = str(make_header(words))
    last = re.split(r"[/\\]", clean(name))[-1]
    return "".join(letter for letter in last if letter.isprintable()).strip(". ")[:255]


def _attachment(
    part: Message[str, str], skeleton: Skeleton, file: BinaryIO, media_type: str, filename: str | None
) -> Attachment:
    start, digest = file.seek(0, 2), hashlib.sha256()
    fields = children(part)  # of a delivery report
    source = (block.as_bytes() for block in fields) if fields else skeleton.body_bytes(part)
    for piece in source:
        digest.update(piece)
        file.write(piece)
    return Attachment(media_type, filename or None, digest.digest(), file.tell() - start, start)


def _text(part: Message[str, str], skeleton: Skeleton) -> str:
    found, size = [], 0
    for piece in skeleton.body_bytes(part):
        found.append(piece[: MAX_TEXT - size])
        size += len(found[-1])
        if size >= MAX_TEXT:
            break
    data = b"".join(found)
    try:
        charset = str(part.get_content_charset() or "ascii")
    except Exception:  # noqa: BLE001 - RFC 2231 again
        charset = "ascii"
    for attempt in (charset, "utf-8"):
        if _is_charset(attempt):
            with suppress(ValueError, LookupError):
                return clean(data.decode(attempt))
    return clean(data.decode("utf-8" if charset in ("ascii", "us-ascii") else "latin-1", "replace"))


def _is_charset(name: str) -> bool:
    try:
        return codecs.lookup(name).name not in _NO_CHARSETS
    except (LookupError, ValueError):
        return False


def _identifier(message: Message[str, str], name: str) -> str | None:
    found = re.search(r"<[^<>\s]{1,996}>", header(message, name))
    return found[0] if found else None


def _date(message: Message[str, str]) -> datetime | None:
    with suppress(Exception):
        moment = parsedate_to_datetime(header(message, "Date"))
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC)
    return None
