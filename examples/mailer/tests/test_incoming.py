"""Incoming messages: the standard library's corpus, and mail that means harm."""

import base64
import hashlib
import io
import os
import quopri
import random
import tracemalloc
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from mailer import incoming, reports
from mailer.incoming import MAX_ATTACHMENTS, MAX_TEXT, Incoming


def read(raw: bytes | Any) -> Incoming:
    return incoming.read(io.BytesIO(raw) if isinstance(raw, bytes) else raw, io.BytesIO())


def contents(found: Incoming) -> list[bytes]:
    return [b"".join(found.pieces(attachment)) for attachment in found.attachments]


def test_an_ordinary_message():
    message = EmailMessage()
    message["From"] = "Zoë <zoe@example.com>"
    message["To"] = "a@example.org, B <b@example.org>"
    message["Cc"] = "a@example.org"
    message["Subject"] = "Grüße"
    message["Message-ID"] = "<1@example.com>"
    message["In-Reply-To"] = "<0@example.org>"
    message["Date"] = "Mon, 23 Nov 2026 17:00:00 +0100"
    message.set_content("Hallo €\n")
    message.add_alternative("<p>Hallo</p>", subtype="html")
    message.add_attachment(b"\x00\x01", maintype="application", subtype="pdf", filename="Rechnung é.pdf")
    found = read(message.as_bytes())
    assert (found.sender, found.recipients) == ("zoe@example.com", ["a@example.org", "b@example.org"])
    assert (found.subject, found.message_id, found.in_reply_to) == ("Grüße", "<1@example.com>", "<0@example.org>")
    assert found.sent_at is not None and found.sent_at.isoformat() == "2026-11-23T16:00:00+00:00"
    assert (found.body_text, found.body_html) == ("Hallo €\n", "<p>Hallo</p>\n")
    (attachment,) = found.attachments
    assert (attachment.media_type, attachment.filename, attachment.size) == ("application/pdf", "Rechnung é.pdf", 2)
    assert attachment.sha256 == hashlib.sha256(b"\x00\x01").digest() and contents(found) == [b"\x00\x01"]
    assert found.defects == []


def test_the_standard_librarys_corpus(corpus: list[Path]):
    found = {path.name: read(path.read_bytes()) for path in corpus}
    assert len(found) >= 47
    for each in found.values():
        for text in (each.subject, each.sender, each.body_text or "", each.body_html or "", *each.recipients):
            text.encode()
            assert "\x00" not in text
    assert [a.filename for a in found["msg_22.txt"].attachments][:2] == ["wibble.JPG", "wibble2.JPG"]
    # The library's own decoding agrees with ours.
    (picture,) = found["msg_07.txt"].attachments
    part = found["msg_07.txt"].skeleton.message.get_payload(1)
    assert contents(found["msg_07.txt"]) == [part.get_payload(decode=True)] and picture.media_type == "image/gif"


def multipart(*parts: bytes) -> bytes:
    return b'From: a@b.example\r\nContent-Type: multipart/mixed; boundary="q"\r\n\r\n' + b"".join(
        b"--q\r\n" + part + b"\r\n" for part in parts
    ) + b"--q--\r\n"  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "end"),
    [
        *((encoding, b"\r\n") for encoding in ("base64", "quoted-printable", "8bit", "one-line")),
        ("base64", b"\n"),  # the only encoding whose encoder is told it
    ],
)
def test_a_large_body_comes_out_as_it_went_in(encoding: str, end: bytes):
    data = os.urandom(3_000_001).replace(b"\r\n", b"  ")  # quoted-printable is for text
    if encoding == "8bit":
        data = b"\r\n".join([b"-\xff x" * 20, b"--- no boundary", b"=41"] * 40_000)
    encoded = {
        "base64": lambda: base64.encodebytes(data).rstrip().replace(b"\n", end),
        "one-line": lambda: base64.b64encode(data),
        "quoted-printable": lambda: quopri.encodestring(data),
        "8bit": lambda: data,
    }[encoding]()
    name = b"base64" if encoding == "one-line" else encoding.encode()
    found = read(
        multipart(
            b"\r\nhello",
            b"Content-Type: application/x-y\r\nContent-Transfer-Encoding: " + name + b"\r\n\r\n" + encoded,
            b"Content-Disposition: attachment\r\n\r\nlast",
        )
    )
    assert found.body_text == "hello"
    assert [hashlib.sha256(each).digest() for each in contents(found)] == [
        hashlib.sha256(each).digest() for each in (data, b"last")
    ]


def test_many_megabytes_in_little_memory(tmp_path: Path):
    """As much for 6 MB as for 1.5 MB: tracing memory takes six times as long as reading."""
    few, many = (_peak(tmp_path, blocks) for blocks in (25, 100))
    assert many < 2_500_000 and many - few < 100_000


def _peak(folder: Path, blocks: int) -> int:
    """The most memory that reading an attachment of so many blocks took."""
    block = os.urandom(57 * 1024)
    with (folder / "message").open("w+b") as file, (folder / "scratch").open("w+b") as scratch:
        file.write(b"From: a@b.example\r\nContent-Type: application/zip\r\nContent-Transfer-Encoding: base64\r\n\r\n")
        encoded = base64.encodebytes(block)
        for _ in range(blocks):
            file.write(encoded)
        tracemalloc.start()
        try:
            found = incoming.read(file, scratch)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        (attachment,) = found.attachments
        assert attachment.size == blocks * len(block)
        assert attachment.sha256 == hashlib.sha256(block * blocks).digest()
        return peak


def test_a_message_cannot_name_bytes_that_are_not_its_own():
    """The marks for what was left out cannot be guessed, nor be learned from an earlier reading."""
    large = multipart(b"Content-Type: a/b\r\n\r\n" + b"x" * 600_000)
    skeleton = read(large).skeleton
    mark = skeleton._mark.search(str(skeleton.message.get_payload(0).get_payload()).encode())
    assert mark is not None
    again = read(multipart(b"Content-Type: a/b\r\n\r\n" + mark[0]))
    assert contents(again) == [mark[0]]


NESTED = b"".join(b'Content-Type: multipart/mixed; boundary="b%d"\n\n--b%d\n' % (n, n) for n in range(3000))


@pytest.mark.timeout(300)
def test_multiparts_inside_multiparts():
    found = read(b"From: a@b.example\nSubject: deep\n" + NESTED + b"\nhello\n")
    assert found.subject == "deep" and "too many parts inside each other: only the headers were read" in found.defects
    found = read(b"From: a@b.example\n" + NESTED[: len(NESTED) // 100] + b"\nhello\n")
    assert "hello" in (found.body_text or "") or found.attachments


def test_sections_without_end():
    found = read(b"Subject: many\n" + NESTED[:2000] + b"\n" + b"--b1\n" * 300_000)
    assert found.subject == "many" and "too many sections: what follows is part of the last body" in found.defects
    found = read(multipart(*[b"Content-Type: a/b\r\n\r\nx"] * (MAX_ATTACHMENTS + 5)))
    assert len(found.attachments) == MAX_ATTACHMENTS and "more than 1000 attachments" in found.defects[-1]


@pytest.mark.parametrize(
    ("charset", "data", "text"),
    [
        (b"utf-8", "é".encode(), "é"),
        (b"iso-8859-15", b"\xa4", "€"),
        (b"no-such-charset", "é".encode(), "é"),
        (b"no-such-charset", b"\xe9", "é"),
        (b"us-ascii", b"\xe9", "\ufffd"),
        (b"utf-8", b"\xe9", "é"),
        (b"zip", b"x", "x"),
        (b"rot13", b"x", "x"),
        (b"punycode", b"x-" * 50_000, "x-" * 50_000),
        (b"utf-16", b"\xff\xfeA\x00\x00\xd8", None),
        (b"utf-8", b"nul \x00 byte", "nul \ufffd byte"),
        (b"utf-8''%E9", b"x", "x"),
        (b'"', b"x", "x"),
        (b"*0*=x; charset*1=y", b"x", "x"),
    ],
)
def test_broken_charsets(charset: bytes, data: bytes, text: str | None):
    found = read(b"Content-Type: text/plain; charset=" + charset + b"\n\n" + data)
    assert found.body_text is not None and "\x00" not in found.body_text
    found.body_text.encode()
    assert text is None or found.body_text == text


@pytest.mark.parametrize(
    "line",
    [
        b"Subject: =?utf-8?b?=FF=FE?=",
        b"Subject: =?punycode?q?" + b"x-" * 4000 + b"?=",
        b"Subject: =?utf-8?q?" + b"=00" * 100 + b"?=",
        b"Subject: \xff\xfe\x00",
        b"Subject: " + b"x" * 2_000_000,
        b"From: " + b"(" * 5_000,
        b"From: " + b"<" * 5_000 + b"@",
        b"To: " + b"a@b.example," * 50_000,
        b"Date: Mon, 99 Foo 99999 99:99:99 +9999",
        b"Date: Fri, 31 Dec 9999 23:59:59 -2359",
        b"Message-ID: <" + b"x" * 5000 + b">",
        b"Content-Type: multipart/mixed",
        b"Content-Type: text/plain; name*0*=utf-8''%ff; name*1=x; name*x=y",
        b"Content-Type: /; /=/",
        b"Content-Type: message/rfc822",
        b"Content-Type: message/delivery-status",
        b"Content-Type: message/external-body; access-type=local-file; name=/etc/passwd",
        b"Content-Disposition: attachment; filename*=no-such''x",
        b"Content-Transfer-Encoding: \xff",
        b"X" * 100_000,
        b": :",
    ],
)
def test_hostile_headers(line: bytes):
    found = read(b"From: a@b.example\n" + line + b"\n\nbody\n")
    for text in (found.subject, found.sender, found.message_id or "", *found.recipients, *found.defects):
        assert "\x00" not in text and "\n" not in text
        text.encode()
    assert len(found.subject) <= 10_000 and len(found.recipients) <= 1000 and len(found.message_id or "") <= 998


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (b'"../../etc/passwd"', "passwd"),
        (b'"C:\\\\Windows\\\\x.exe"', "x.exe"),
        (b'"a\\r\\nb.txt"', "nb.txt"),
        (b'"=?utf-8?q?x=0d=0a=00y.txt?="', "x\ufffdy.txt"),
        (b'"\xe2\x80\xaetxt.exe"', None),
        (b'"' + b"x" * 2000 + b'"', "x" * 255),
        (b'".."', None),
    ],
)
def test_names_of_attachments_are_names(given: bytes, stored: str | None):
    found = read(multipart(b"Content-Type: a/b\r\nContent-Disposition: attachment; filename=" + given + b"\r\n\r\nx"))
    (attachment,) = found.attachments
    name = attachment.filename
    assert name is None or (name.isprintable() and not set(name) & set("/\\") and len(name) <= 255)
    assert stored is None or name == stored


def test_bodies_are_bounded_and_nothing_is_lost():
    data = b"x" * (MAX_TEXT + 1000)
    found = read(b"From: a@b.example\n\n" + data)
    assert found.body_text == "x" * MAX_TEXT  # the rest is in the raw message


@pytest.mark.parametrize("broken", [b"=", b"====", b"QQ", b"QQ=", b"Q", b"QUJD\xff!QUJD", b"QQ==QQ=="])
def test_broken_base64_never_raises(broken: bytes):
    read(b"Content-Type: a/b\nContent-Transfer-Encoding: base64\n\n" + broken)


def test_mutilated_messages_never_raise(corpus: list[Path]):
    chance = random.Random(7)
    junk = [
        b"\x00",
        b"\xff\xfe",
        b"\r\n",
        b"\n\n",
        b"--",
        b"=",
        b";",
        b'"',
        b"=?utf-8?q?=ff?=",
        b"boundary=",
        b"\r",
        b"<",
        b"%",
    ]
    originals = [path.read_bytes() for path in corpus if path.stat().st_size < 20_000]
    for _ in range(300):
        raw = bytearray(chance.choice(originals))
        for _ in range(chance.randrange(1, 12)):
            at = chance.randrange(len(raw) + 1)
            raw[at : at + chance.randrange(4)] = chance.choice(junk)
        found = read(bytes(raw))
        reports.read(found)
        reports.original_message_id(found)
        "".join([found.subject, found.sender, *found.recipients, *found.defects]).encode()


def test_an_empty_message():
    found = read(b"")
    assert (found.subject, found.sender, found.recipients, found.attachments) == ("", "", [], [])
