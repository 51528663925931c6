"""Reads a message of any size for the standard library's parser without holding it in memory.

The parser keeps what it is fed. So it is fed the *skeleton*: all headers and boundaries, and of each body no more
than its beginning. What was left out is named in the skeleton by a line that says where in the file it lies;
`body_bytes` puts it back, decoded, in pieces.

A boundary starts with ``--``, so whatever follows the last such line for more than `SECTION` bytes is the inside of a
body. The other limits are for messages that are built to be expensive: the parser's work grows with lines times
nesting. Long patches are full of dashes too; from `ANY_DASHES` lines on, only boundaries that some header named count
as such.
"""

from __future__ import annotations

import binascii
import re
import secrets
from collections.abc import Iterator
from email.message import Message
from email.parser import BytesFeedParser, BytesHeaderParser
from typing import Any, BinaryIO, Final

SECTION: Final = 256 * 1024
SECTION_LINES: Final = 5_000
SKELETON: Final = 8 * 1024 * 1024
SKELETON_LINES: Final = 30_000
ANY_DASHES: Final = 10_000
PIECE: Final = 256 * 1024

_BOUNDARY: Final = re.compile(rb"boundary\s*=\s*(?:\"([^\"]{1,200})\"|([^\s;\"]{1,200}))", re.IGNORECASE)
_LONGEST_LINE: Final = 64 * 1024
_NOT_BASE64: Final = bytes(set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="))


class Skeleton:
    """A parsed message whose large bodies stayed in the file.

    Args:
        file: the raw message, seekable; it must stay open as long as bodies are read.

    Attributes:
        message: the standard library's view of it.
        defects: what was wrong with the message, or too much.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # Unguessable, or a message could name bytes that are not its own.
        self._token = secrets.token_hex(16).encode()
        self._mark = re.compile(rb"%s:(\d+):(\d+)" % self._token)
        self.defects: list[str] = []
        self.message = self._parse()

    def _parse(self) -> Message[str, str]:
        feeder: BytesFeedParser[Message[str, str]] = BytesFeedParser()
        try:
            for line in self._lines():
                feeder.feed(line)
            return feeder.close()
        except RecursionError:
            self.defects.append("too many parts inside each other: only the headers were read")
        self._file.seek(0)
        return BytesHeaderParser().parsebytes(self._file.read(SECTION))

    def _lines(self) -> Iterator[bytes]:
        """The lines of the skeleton."""
        self._file.seek(0)
        position = total = lines = section = section_lines = 0
        skipped_from: int | None = None
        last, at_start = b"", True
        named: set[bytes] = set()
        while line := self._file.readline(_LONGEST_LINE):
            full = total > SKELETON or lines > SKELETON_LINES
            dashes = at_start and line.startswith(b"--") and not full
            if dashes and (lines < ANY_DASHES or line.strip() in named):
                if skipped_from is not None:
                    yield self._skipped(skipped_from, position, last)
                    skipped_from = None
                section = section_lines = 0
            if skipped_from is None and (section > SECTION or section_lines > SECTION_LINES):
                skipped_from = position
                if full:
                    self.defects.append("too many sections: what follows is part of the last body")
            if skipped_from is None:
                section, section_lines = section + len(line), section_lines + 1
                total, lines = total + len(line), lines + 1
                for found in _BOUNDARY.finditer(line):
                    boundary = b"--" + (found[1] or found[2])
                    named |= {boundary, boundary + b"--"}
                yield line
            position += len(line)
            at_start, last = line.endswith((b"\n", b"\r")), line
        if skipped_from is not None:
            yield self._skipped(skipped_from, position, last)

    def _skipped(self, start: int, end: int, last: bytes) -> bytes:
        """The line that stands for a range of the file, with the line end of its last line: that is the boundary's."""
        line_end = last[len(last.rstrip(b"\r\n")) :]
        return b"%s:%d:%d%s" % (self._token, start, end - len(line_end), line_end)

    def body_bytes(self, part: Message[str, str]) -> Iterator[bytes]:
        """The decoded body of a part that has no parts, in pieces."""
        encoding = part["Content-Transfer-Encoding"]
        # The library gives bytes as they came only to parts that name no encoding.
        del part["Content-Transfer-Encoding"]
        payload: Any = part.get_payload(decode=True)
        if encoding is not None:
            part["Content-Transfer-Encoding"] = encoding
        pieces = self._filled(payload or b"")
        match str(encoding).strip().lower():
            case "base64":
                return _from_base64(pieces)
            case "quoted-printable":
                return _from_quoted_printable(pieces)
            case _:
                return pieces

    def _filled(self, raw: bytes) -> Iterator[bytes]:
        at = 0
        for mark in self._mark.finditer(raw):
            yield raw[at : mark.start()]
            at, position, end = mark.end(), int(mark[1]), int(mark[2])
            while position < end:
                self._file.seek(position)
                piece = self._file.read(min(PIECE, end - position))
                position += len(piece)
                yield piece
        yield raw[at:]


def _from_base64(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Tolerant as mail has to be: what is no base64 is passed over, missing padding is added."""
    rest = b""
    for piece in pieces:
        letters, padded, _ = (rest + piece.translate(None, _NOT_BASE64)).partition(b"=")
        whole = len(letters) // 4 * 4
        rest = letters[whole:]
        yield binascii.a2b_base64(letters[:whole])
        if padded:
            break
    if len(rest) > 1:
        yield binascii.a2b_base64(rest + b"=" * (-len(rest) % 4))


def _from_quoted_printable(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines at a time: an escape never crosses a line end."""
    rest = b""
    for piece in pieces:
        lines, end, rest = (rest + piece).rpartition(b"\n")
        yield binascii.a2b_qp(lines + end)
        while len(rest) > PIECE:  # one endless line: cut where no escape is cut
            cut = len(rest) - (3 if b"=" in rest[-2:] else 0)
            yield binascii.a2b_qp(rest[:cut])
            rest = rest[cut:]
    yield binascii.a2b_qp(rest)
