"""Outgoing messages: whatever the data is, there is one recipient and our headers."""

from email import message_from_bytes
from email.policy import default
from uuid import uuid4

import pytest

from mailer.messages import BadAddress, Mail, address, bounce_address, build, delivery_of, message_id_for

MAIL = {"message_id": "<1@example.com>", "sender": "shop@example.com", "recipient": "ann@example.org", "text": "Hello"}


def test_a_message_is_plain_ascii_on_the_wire_and_reads_as_written():
    raw = build(Mail(**MAIL, subject="Größe €", html="<p>Grüße \ud800</p>"))
    assert raw.isascii() and all(len(line) <= 998 for line in raw.split(b"\r\n"))
    message = message_from_bytes(raw, policy=default)
    assert message["subject"] == "Größe €" and message["message-id"] == "<1@example.com>"
    assert message.get_body(("html",)).get_content().strip() == "<p>Grüße ?</p>"


@pytest.mark.parametrize(
    "evil", ["Hi\r\nBcc: all@example.org", "Hi\nBcc: x@y.z\n\nbody", "Hi\rX: y", "Hi\u2028X: y", "Hi\x00\x85Y: z"]
)
def test_no_data_gets_to_write_a_header(evil: str):
    message = message_from_bytes(build(Mail(**MAIL, subject=evil)))
    assert set(message.keys()) == {
        "From", "To", "Subject", "Message-ID", "Date", "Auto-Submitted", "Content-Type", "Content-Transfer-Encoding", "MIME-Version",
    }  # fmt: skip
    assert len(message.keys()) == 9


@pytest.mark.parametrize(
    "evil",
    [
        "a@example.org, b@example.org",
        "a@example.org\r\nRCPT TO:<b@example.org>",
        "a@example.org> SIZE=1",
        "<a@example.org>",
        "Ann <a@example.org>",
        '"a b"@example.org',
        "a@[127.0.0.1]",
        "a@localhost",
        "a..b@example.org",
        ".a@example.org",
        "é@example.org",
        "a@" + "x" * 64 + ".org",
        "a@exa mple.org",
        "@example.org",
        "a@",
        "",
    ],
)
def test_what_is_no_address_is_refused(evil: str):
    with pytest.raises(BadAddress):
        address(evil)
    with pytest.raises(BadAddress):
        build(Mail(**{**MAIL, "recipient": evil}, subject=""))


def test_addresses_have_one_form():
    assert address(" Ann.B+c@Example.ORG ") == "Ann.B+c@example.org"
    assert address("ann@bücher.example") == "ann@xn--bcher-kva.example"


def test_a_bounce_address_leads_back_to_its_delivery():
    delivery = uuid4()
    assert delivery_of(bounce_address(delivery, "example.com")) == delivery
    assert delivery_of(bounce_address(delivery, "example.com").upper()) == delivery
    assert delivery_of("bounce+x@example.com") is None and delivery_of(f"x{delivery.hex}@example.com") is None
    assert message_id_for(delivery, "example.com") == f"<{delivery}@example.com>"


def test_a_reply_names_what_it_answers():
    message = message_from_bytes(build(Mail(**MAIL, subject="Re", in_reply_to="<0@example.org>")))
    assert message["In-Reply-To"] == message["References"] == "<0@example.org>"
