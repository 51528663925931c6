"""Bounces: RFC 3464, what older servers write instead, and what only looks like one."""

import io
from email.message import EmailMessage, Message
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from mailer import incoming, reports
from mailer.incoming import Incoming
from mailer.jobs import HandleBounce, Report
from mailer.messages import bounce_address


def read(raw: bytes | Message) -> Incoming:
    return incoming.read(io.BytesIO(raw if isinstance(raw, bytes) else raw.as_bytes()), io.BytesIO())


def standard(*recipients: str, to: str = "bounce@example.com", original: str = "Message-ID: <1@example.com>") -> bytes:
    """A report as RFC 3464 wants it."""
    blocks = "\n\n".join(recipients)
    return (
        f"From: MAILER-DAEMON@mx.example.org\nTo: {to}\nSubject: Undelivered\n"
        'Content-Type: multipart/report; report-type=delivery-status; boundary="r"\n\n'
        "--r\n\nI am sorry.\n"
        "--r\nContent-Type: message/delivery-status\n\nReporting-MTA: dns; mx.example.org\n\n"
        f"{blocks}\n\n"
        f"--r\nContent-Type: message/rfc822\n\n{original}\nSubject: Hello\n\nHello\n--r--\n"
    ).encode()


FAILED = (
    "Final-Recipient: rfc822; ann@example.org\nAction: failed\nStatus: {}\nDiagnostic-Code: smtp; 550 {} no such user"
)


def test_a_standard_report():
    delivery = uuid4()
    found = read(standard(FAILED.format("5.1.1", "5.1.1"), to=bounce_address(delivery, "example.com")))
    assert reports.read(found) == [Report("ann@example.org", "5.1.1", "failed", "smtp; 550 5.1.1 no such user")]
    assert reports.own_delivery(found) == delivery
    assert reports.original_message_id(found) == "<1@example.com>"


def test_a_report_on_several_recipients():
    found = reports.read(
        read(
            standard(
                FAILED.format("5.1.1", "5.1.1"),
                "Original-Recipient: rfc822;ben@example.org\nAction: delayed\nStatus: 4.4.1",
                "Action: failed\nStatus: 5.1.1",  # of nobody
                "Final-Recipient: rfc822; <cat@example.org>\nAction: Delivered\nStatus: 2.0.0",
            )
        )
    )
    assert [(each.recipient, each.action) for each in found] == [
        ("ann@example.org", "failed"),
        ("ben@example.org", "delayed"),
        ("cat@example.org", "delivered"),
    ]
    assert [reports.severity(each) for each in found] == ["hard", "soft", "none"]


@pytest.mark.parametrize(
    ("action", "status", "severity"),
    [
        ("failed", "5.1.1", "hard"), ("failed", "5.1.10", "hard"), ("failed", "5.0.0", "hard"), ("failed", "5.2.1", "hard"),
        ("failed", "5.2.2", "soft"), ("failed", "5.7.1", "soft"), ("failed", "5.3.4", "soft"), ("failed", "5.4.4", "soft"),
        ("failed", "4.4.7", "soft"), ("failed", "", "soft"), ("delayed", "5.1.1", "soft"), ("relayed", "2.0.0", "none"),
        ("expanded", "2.0.0", "none"), ("delivered", "5.1.1", "none"), ("nonsense", "5.1.1", "soft"),
    ],
)  # fmt: skip
def test_severity(action: str, status: str, severity: str):
    assert reports.severity(Report("ann@example.org", status, action, "")) == severity


def test_the_standard_librarys_bounces(corpus: list[Path]):
    found = {path.name: read(path.read_bytes()) for path in corpus}
    (first,) = reports.read(found["msg_16.txt"])
    assert (first.recipient, first.status) == ("jangel1@cougar.noc.ucla.edu", "5.0.0")
    assert reports.original_message_id(found["msg_16.txt"]) == "<002001c144a6$8752e060$56104586@oxy.edu>"
    assert {each.status for each in reports.read(found["msg_43.txt"])} == {"5.7.1"}
    assert reports.original_message_id(found["msg_43.txt"]) == "<edab.7804f5cb8070@python.org>"
    others = [name for name, each in found.items() if reports.read(each)]
    assert others == ["msg_16.txt", "msg_43.txt"] or others == ["msg_16.txt", "msg_25.txt", "msg_43.txt"]


QMAIL = """From: MAILER-DAEMON@mx.example.org
To: bounce@example.com
Subject: failure notice

Hi. This is the qmail-send program at mx.example.org.
I'm afraid I wasn't able to deliver your message to the following addresses.

<ann@example.org>:
Sorry, no mailbox here by that name. (#5.1.1)

--- Below this line is a copy of the message.

Return-Path: <shop@example.com>
From: shop@example.com
To: ben@example.net
Message-ID: <1@example.com>
"""
EXIM = """From: Mail Delivery System <Mailer-Daemon@mx.example.org>
To: bounce@example.com
X-Failed-Recipients: ann@example.org
Auto-Submitted: auto-replied
Subject: Mail delivery failed

  ann@example.org
    host mx.example.org [192.0.2.1]
    SMTP error from remote mail server after RCPT TO:<ann@example.org>:
    550 User unknown
"""
SILENT = """Return-Path: <>
From: someone@mx.example.org
Subject: Undeliverable

Your message to
  ann@example.org
could not be delivered.
"""


@pytest.mark.parametrize(
    ("text", "status", "severity"), [(QMAIL, "5.1.1", "hard"), (EXIM, "5.0.0", "hard"), (SILENT, "", "soft")]
)
def test_plain_bounces(text: str, status: str, severity: str):
    (report,) = reports.read(read(text.encode()))
    assert (report.recipient, report.status, reports.severity(report)) == ("ann@example.org", status, severity)
    if text == QMAIL:
        assert reports.original_message_id(read(text.encode())) == "<1@example.com>"


def test_what_is_no_bounce():
    plain = EmailMessage()
    plain["From"], plain["Subject"] = "ann@example.org", "550 5.1.1 <ben@example.org>: what does that mean?"
    plain.set_content("ben@example.org:\n550 5.1.1 no such user\n")
    assert reports.read(read(plain)) == []
    vacation = (
        "From: ann@example.org\nReturn-Path: <>\nAuto-Submitted: auto-replied\n\n  ben@example.org\n is my deputy"
    )
    assert reports.read(read(vacation.encode())) == []
    # Somebody forwards a bounce that they got: it is theirs.
    forwarded = EmailMessage()
    forwarded["From"] = "ann@example.org"
    forwarded.set_content("look what I got")
    inner = EmailMessage()
    inner["Subject"] = "x"
    forwarded.add_attachment(inner)
    raw = forwarded.as_bytes().replace(
        b"Subject: x\n", standard(FAILED.format("5.1.1", "5.1.1")).split(b"\n\n")[0] + b"\n"
    )
    assert reports.read(read(raw)) == []


@pytest.mark.parametrize(
    "block", ["", "Final-Recipient:", "Final-Recipient: ;;;\nStatus: 5", "\x00: \xff", "X" * 100_000]
)
def test_broken_reports(block: str):
    for report in reports.read(read(standard(block))):
        assert reports.severity(report) in ("soft", "none")


def test_a_report_on_a_great_many():
    junk = "Final-Recipient: rfc822; " + "\x01" * 2000 + "\nAction: delayed\nDiagnostic-Code: " + "\x02" * 2000
    found = reports.read(read(standard(*[junk] * 30, FAILED.format("5.1.1", "5.1.1"))))
    assert len(found) == reports.MAX_REPORTS and found[0].status == "5.1.1"
    job = HandleBounce(source="x", delivery_id=uuid4(), message_id="x" * 998, reports=found)
    assert len(msgspec.json.encode(job)) < 256 * 1024
