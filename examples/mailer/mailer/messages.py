"""A filled template as the bytes of a message. Nobody's data gets to write a header."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.errors import HeaderParseError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import Final
from uuid import UUID

# ASCII lines of 76 characters: no server has to offer 8BITMIME, and no relay rewrites (and so breaks) anything.
_POLICY: Final = SMTP.clone(cte_type="7bit")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_LOCAL_PART: Final = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}")
_DOMAIN: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)+"
)


class BadAddress(ValueError):
    """Not an address that can be mailed; trying again will not help."""


@dataclass(frozen=True)
class Mail:
    """What one message is made of."""

    message_id: str
    sender: str
    recipient: str
    subject: str
    text: str
    html: str | None = None
    in_reply_to: str | None = None


def address(text: str) -> str:
    """An address in the one form we store and compare: the domain in lower case and ASCII.

    Stricter than RFC 5321 on purpose: no quoted local parts, no address literals, no SMTPUTF8, and nothing that could
    be taken for a second address or a command.

    Raises:
        BadAddress: it is none of these.
    """
    local, at, domain = text.strip().rpartition("@")
    try:
        domain = domain.encode("idna").decode("ascii").lower()
    except UnicodeError:
        domain = ""
    if not at or not _LOCAL_PART.fullmatch(local) or ".." in f".{local}." or not _DOMAIN.fullmatch(domain):
        raise BadAddress(f"{text[:100]!r} is no address that can be mailed")
    return f"{local}@{domain}"


def domain_of(recipient: str) -> str:
    """The part of an address that is rate-limited."""
    return recipient.rpartition("@")[2]


def message_id_for(delivery_id: UUID, domain: str) -> str:
    """The Message-ID of a delivery: the same at each attempt, so that receivers can tell a repeat."""
    return f"<{delivery_id}@{domain}>"


def bounce_address(delivery_id: UUID, domain: str) -> str:
    """Where a delivery's bounces go: an address of its own says whose they are, whatever their text says."""
    return f"bounce+{delivery_id.hex}@{domain}"


def delivery_of(recipient: str) -> UUID | None:
    """The delivery whose `bounce_address` this is."""
    found = re.fullmatch(r"bounce\+([0-9a-f]{32})@.*", recipient.strip(), re.IGNORECASE | re.DOTALL)
    return UUID(found[1]) if found else None


def build(mail: Mail) -> bytes:
    """The message as it goes over the wire (RFC 5322, CRLF, ASCII).

    Raises:
        BadAddress: sender or recipient is no address.
    """
    message = EmailMessage(policy=_POLICY)
    try:
        message["From"] = Address(addr_spec=address(mail.sender))
        message["To"] = Address(addr_spec=address(mail.recipient))
    except HeaderParseError as error:
        raise BadAddress(str(error)) from error
    # A line break in a customer's name must not end the header; EmailMessage would refuse it, and with it the mail.
    message["Subject"] = _CONTROL.sub(" ", mail.subject).strip()
    message["Message-ID"] = mail.message_id
    message["Date"] = format_datetime(datetime.now(UTC))
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: vacation programs keep quiet
    if mail.in_reply_to is not None:
        message["In-Reply-To"] = mail.in_reply_to
        message["References"] = mail.in_reply_to
    message.set_content(_clean(mail.text))
    if mail.html is not None:
        message.add_alternative(_clean(mail.html), subtype="html")
    return message.as_bytes()


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates out of somebody's import cannot be encoded."""
    return text.encode("utf-8", "replace").decode("utf-8")
