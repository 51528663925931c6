"""Is this message a bounce, and of what? RFC 3464 where it is kept, and the plain text that older servers send."""

from __future__ import annotations

import re
from email.message import Message
from typing import Final, Literal, TypeAlias
from uuid import UUID

from mailer.incoming import Incoming, addresses, children, clean, header
from mailer.jobs import Report
from mailer.messages import delivery_of

Severity: TypeAlias = Literal["hard", "soft", "none"]

MAX_REPORTS: Final = 20
"""A mail of ours has one recipient, so more reports than these are somebody's idea of fun; and a job has 256 KiB."""
_STATUS: Final = re.compile(r"(?<![\d.])([245]\.\d{1,3}\.\d{1,3})(?![\d.])")
_REPLY: Final = re.compile(r"(?<![\d.])([45])\d\d(?:[ -]|$)", re.MULTILINE)
_ADDRESS: Final = r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}"
_MAILED: Final = re.compile(rf"<({_ADDRESS})>|^\s*({_ADDRESS})\s*:?\s*$", re.MULTILINE)
_ROBOTS: Final = ("mailer-daemon@", "postmaster@")


def severity(report: Report) -> Severity:
    """What a report means for the recipient: ``hard`` never mail again, ``soft`` count it.

    Hard is what the recipient's own server calls permanent about the *address* (5.1.x, 5.2.1) or without saying why
    (5.0.0). A full mailbox, a policy, a size or a broken route is permanent for this mail and not for the recipient.
    """
    if report.action in ("delivered", "relayed", "expanded"):
        return "none"
    if report.action != "failed" or not report.status.startswith("5."):
        return "soft"
    _, subject, detail = report.status.split(".")
    return "hard" if subject in ("0", "1") or (subject, detail) == ("2", "1") else "soft"


def read(incoming: Incoming) -> list[Report]:
    """One report per recipient that the message speaks of; empty if it is no bounce."""
    message = incoming.skeleton.message
    fields = _find(message, "message/delivery-status")
    found = _standard(children(fields)) if fields is not None else _plain(message, incoming)
    return sorted(found, key=lambda report: ("hard", "soft", "none").index(severity(report)))[:MAX_REPORTS]


def original_message_id(incoming: Incoming) -> str | None:
    """The Message-ID of the mail that came back, from the headers that the bounce quotes."""
    for part in _walk(incoming.skeleton.message, 0):
        if part.get_content_type() == "message/rfc822":
            quoted: list[str] = [header(child, "Message-ID") for child in children(part)]
        elif part.get_content_type() == "text/rfc822-headers":
            head = next((piece for piece in incoming.skeleton.body_bytes(part) if piece), b"")
            quoted = [head[:50_000].decode("ascii", "replace")]
        else:
            continue
        for text in quoted:
            found = re.search(r"(?:^|\bMessage-ID:\s*)(<[^<>\s]{1,996}>)", text, re.IGNORECASE)
            if found:
                return clean(found[1])
    found = re.search(r"^\s*Message-ID:\s*(<[^<>\s]{1,996}>)", incoming.body_text or "", re.IGNORECASE | re.MULTILINE)
    return found[1] if found else None


def own_delivery(incoming: Incoming) -> UUID | None:
    """The delivery whose bounce address the message came to."""
    return next((found for each in incoming.recipients if (found := delivery_of(each)) is not None), None)


def _standard(blocks: list[Message[str, str]]) -> list[Report]:
    """RFC 3464: a block about the message, then one for each recipient."""
    reports = []
    for block in blocks:
        recipient = _typed(header(block, "Final-Recipient")) or _typed(header(block, "Original-Recipient"))
        if not recipient:
            continue
        diagnostic = header(block, "Diagnostic-Code")
        status = _STATUS.search(header(block, "Status")) or _STATUS.search(diagnostic)
        reports.append(
            Report(
                recipient=recipient,
                status=status[1] if status else "",
                action=header(block, "Action").strip().lower()[:20] or "failed",
                diagnostic=diagnostic[:500],
            )
        )
    return reports


def _plain(message: Message[str, str], incoming: Incoming) -> list[Report]:
    """Exim and Gmail name the failed recipients in a header; qmail and others only in the text."""
    named = addresses(message, "X-Failed-Recipients")
    text = (incoming.body_text or "")[:50_000]
    if not named:
        from_robot = incoming.sender.lower().startswith(_ROBOTS) or header(message, "Return-Path") == "<>"
        answers = header(message, "Auto-Submitted").startswith("auto-replied")  # vacation programs
        if not from_robot or answers:
            return []
        # The first address is the one that failed; behind it the quoted mail begins, with addresses of its own.
        found = _MAILED.search(text)
        named = [found[1] or found[2]] if found else []
    return [Report(each[:320], _status_in(text, each), "failed", _near(text, each)) for each in named[:MAX_REPORTS]]


def _status_in(text: str, recipient: str) -> str:
    around = _near(text, recipient, 1000)
    if found := _STATUS.search(around):
        return found[1]
    if found := _REPLY.search(around):
        return f"{found[1]}.0.0"
    return ""  # it says nothing we know: soft


def _near(text: str, recipient: str, size: int = 500) -> str:
    at = max(text.find(recipient), 0)
    return text[at : at + size]


def _typed(value: str) -> str:
    """``rfc822; someone@example.com``."""
    kind, mark, address = value.partition(";")
    return (address if mark else kind).strip().strip("<>")[:320]


def _find(message: Message[str, str], media_type: str) -> Message[str, str] | None:
    return next((part for part in _walk(message, 0) if part.get_content_type() == media_type), None)


def _walk(part: Message[str, str], depth: int) -> list[Message[str, str]]:
    """The message's own parts: what lies in a returned message is not this message's business."""
    found = [part]
    if depth < 5 and part.get_content_maintype() == "multipart":
        for child in children(part):
            found += _walk(child, depth + 1)
    return found
