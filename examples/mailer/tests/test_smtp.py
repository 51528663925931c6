"""The email service against a real SMTP server that refuses, delays, drops connections and speaks TLS."""

import ssl
from pathlib import Path

import anyio
import pytest

from mailer.config import BadConfig, Config, Smtp
from mailer.smtp import EmailService, NotNow, Refused, SmtpError, Unknown
from mailer.testing.smtp import Sink, serve

pytestmark = pytest.mark.anyio

MESSAGE = b"From: shop@example.com\r\nMessage-ID: <1@example.com>\r\n\r\n.hello\r\n.\r\n"


def service(sink: Sink, **options: float) -> EmailService:
    return EmailService(Smtp(host="127.0.0.1", port=sink.port, tls="none"), **{"timeout": 5, **options})


async def send(email: EmailService, to: str = "ann@example.org") -> str:
    return await email.send("bounce@example.com", to, MESSAGE)


async def test_a_mail_arrives_as_it_was():
    async with serve() as sink:
        email = service(sink)
        assert await send(email) == "250 2.0.0 taken"
        (mail,) = sink.mails
        assert (mail.sender, mail.recipient) == ("bounce@example.com", "ann@example.org")
        assert mail.message.get_payload() == ".hello\r\n.\r\n"  # dots at line starts survive
        await email.close()


async def test_connections_are_reused_and_bounded():
    async with serve() as sink:
        email = service(sink, connections=3)
        async with anyio.create_task_group() as group:
            for number in range(30):
                group.start_soon(send, email, f"{number}@example.org")
        assert len(sink.mails) == 30
        assert sink.connections <= 3
        await email.close()


async def test_a_connection_is_replaced_after_so_many_mails():
    async with serve() as sink:
        email = service(sink, connections=1, mails_per_connection=2)
        for _ in range(5):
            await send(email)
        assert sink.connections == 3 and [mail.connection for mail in sink.mails] == [1, 1, 2, 2, 3]
        await email.close()


async def test_idle_connections_are_not_trusted():
    async with serve() as sink:
        email = service(sink, idle=0)
        await send(email)
        await send(email)
        assert sink.connections == 2
        await email.close()


async def test_a_reused_connection_that_died_is_replaced_unnoticed():
    async with serve() as sink:
        email = service(sink, connections=1)
        await send(email)
        for connection in sink.open:
            connection.abort()
        await send(email)
        assert sink.connections == 2 and len(sink.mails) == 2
        await email.close()


@pytest.mark.parametrize(
    ("moment", "reply", "error"),
    [
        ("rcpt", "550 5.1.1 no such user", Refused),
        ("rcpt", "553 5.1.3 bad address", Refused),
        ("rcpt", "451 4.7.1 greylisted", NotNow),
        ("rcpt", "452 4.2.2 mailbox full", NotNow),
        ("rcpt", "421 4.3.2 closing", NotNow),
        ("data", "554 5.7.1 spam", Refused),
        ("data", "452 4.3.1 disk full", NotNow),
        ("drop-before", "", Unknown),
        ("drop-after", "", Unknown),
    ],
)
async def test_what_the_server_says_decides_what_may_be_done_next(moment: str, reply: str, error: type[SmtpError]):
    async with serve() as sink:
        email = service(sink, connections=1)
        sink.misbehave("ann@example.org", moment, reply)
        with pytest.raises(error) as raised:
            await send(email)
        if reply:
            assert raised.value.reply == reply
        assert len(sink.mails) == (moment == "drop-after")
        # Whatever happened, the next mail goes through.
        assert await send(email) == "250 2.0.0 taken"
        await email.close()


async def test_a_server_that_takes_the_mail_and_never_answers():
    async with serve() as sink:
        email = service(sink, timeout=0.2)
        sink.misbehave("ann@example.org", "hang-after")
        with pytest.raises(Unknown):
            await send(email)
        assert len(sink.mails) == 1


async def test_nobody_listens():
    async with serve() as sink:
        email = service(sink)
    with pytest.raises(NotNow, match="cannot reach the mail server"):
        await send(email)


async def test_a_cancelled_job_leaves_no_half_dialogue_behind():
    async with serve() as sink:
        email = service(sink, connections=1)
        sink.gate.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(send, email)
            await sink.waiting.wait()
            group.cancel_scope.cancel()
        sink.gate.set()
        await send(email, "ben@example.org")
        assert sink.connections == 2 and len(sink.arrived("ben@example.org")) == 1
        await email.close()


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
async def test_tls_with_our_own_authority(tls: str, server_tls: ssl.SSLContext, certificates: Path):
    async with serve(context=server_tls, starttls=tls == "starttls") as sink:
        email = EmailService(
            Smtp(host="127.0.0.1", port=sink.port, tls=tls, ca=str(certificates / "ca.pem")), timeout=5
        )
        await send(email)
        await send(email)
        assert sink.connections == 1 and len(sink.mails) == 2
        await email.close()


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
@pytest.mark.parametrize("ca", ["other.pem", pytest.param(None, marks=pytest.mark.all)])
async def test_a_certificate_that_nobody_vouches_for(
    tls: str, ca: str | None, server_tls: ssl.SSLContext, certificates: Path
):
    async with serve(context=server_tls, starttls=tls == "starttls") as sink:
        trusted = str(certificates / ca) if ca else None
        email = EmailService(Smtp(host="127.0.0.1", port=sink.port, tls=tls, ca=trusted), timeout=5)
        with pytest.raises(NotNow, match="(?i)certificate|ssl"):
            await send(email)
        assert sink.mails == []


async def test_starttls_is_required_and_never_merely_tried():
    async with serve() as sink:  # does not offer it: an attacker in between would look the same
        email = EmailService(Smtp(host="127.0.0.1", port=sink.port, tls="starttls"), timeout=5)
        with pytest.raises(NotNow, match="STARTTLS"):
            await send(email)
        assert sink.mails == []


@pytest.mark.parametrize("password", ["right", "wrong"])
async def test_a_wrong_password_is_ours_and_kills_no_mail(
    password: str, server_tls: ssl.SSLContext, certificates: Path
):
    async with serve(context=server_tls, starttls=True, password="right") as sink:
        smtp = Smtp("127.0.0.1", sink.port, "starttls", "us", password, str(certificates / "ca.pem"))
        email = EmailService(smtp, timeout=5)
        if password == "right":
            await send(email)
        else:
            with pytest.raises(NotNow, match="535"):
                await send(email)
        await email.close()
        assert "right" not in repr(smtp)


def test_the_url_of_the_server():
    smtp = Smtp.parse("smtps://us%40x:p%2Fw@smtp.example.com?ca=/ca.pem")
    assert (smtp.host, smtp.port, smtp.tls, smtp.username, smtp.password, smtp.ca) == (
        "smtp.example.com", 465, "implicit", "us@x", "p/w", "/ca.pem",
    )  # fmt: skip
    assert Smtp.parse("smtp+starttls://smtp.example.com").port == 587
    assert Smtp.parse("smtp://localhost:2525").tls == "none"


@pytest.mark.parametrize("url", ["smtp://smtp.example.com", "http://x", "x", "smtps://", "smtps://x:y"])
def test_mail_never_crosses_a_network_in_the_clear(url: str):
    with pytest.raises(BadConfig):
        Smtp.parse(url)


def test_the_environment():
    config = Config.load({"MAILER_PER_DOMAIN": "2.5", "MAILER_WEBHOOK_NETWORKS": "10.0.0.0/8, fd00::/8"})
    assert config.per_domain == 2.5 and [str(each) for each in config.webhook_networks] == ["10.0.0.0/8", "fd00::/8"]
    for wrong in ({"MAILER_PER_DOMAIN": "x"}, {"MAILER_PER_DOMAIN": "0"}, {"MAILER_WEBHOOK_NETWORKS": "10"}):
        with pytest.raises(BadConfig):
            Config.load(wrong)
