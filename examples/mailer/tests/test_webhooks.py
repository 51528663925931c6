"""Webhooks against a real receiver: signatures, answers, and URLs that want to go where they must not."""

import base64
import hashlib
import hmac
import ssl
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

import pytest

from mailer.app import app
from mailer.handlers.webhook import call_webhook
from mailer.jobs import CallWebhook
from mailer.testing.receiver import listen
from mailer.webhooks import Forbidden, NoAnswer, Resolver, WebhookClient, is_public, signature
from streamworker import Discard, testing

pytestmark = pytest.mark.anyio

KEY = b"0123456789abcdef01234567"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
HERE = ip_network("127.0.0.1/32")


def client(**options: object) -> WebhookClient:
    return WebhookClient(**{"allowed": [HERE], "timeout": 5, **options})


async def test_a_receiver_can_check_who_speaks_and_when():
    async with listen() as receiver:
        answer = await client().post(f"http://127.0.0.1:{receiver.port}/hook?x=1", SECRET, "msg_1", b'{"a":1}')
        assert (answer.status, answer.verdict) == (204, "delivered")
        (request,) = receiver.requests
        assert request.line == "POST /hook?x=1 HTTP/1.1" and request.body == b'{"a":1}'
        headers = request.headers
        assert headers["content-type"] == "application/json" and headers["webhook-id"] == "msg_1"
        assert headers["host"] == f"127.0.0.1:{receiver.port}"
        assert abs(int(headers["webhook-timestamp"]) - time()) < 60
        signed = b"msg_1." + headers["webhook-timestamp"].encode() + b"." + request.body
        expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"


def test_the_signature_of_the_specification():
    """The example of the Standard Webhooks libraries."""
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    assert signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )
    for wrong in ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_", "whsec_?"):
        with pytest.raises(ValueError):
            signature(wrong, "x", 1, b"")


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (200, "delivered"), (204, "delivered"), (301, "never"), (302, "never"), (307, "never"), (400, "never"),
        (401, "never"), (404, "never"), (408, "again"), (410, "gone"), (425, "again"), (429, "again"), (500, "again"),
        (502, "again"), (503, "again"), (599, "again"),
    ],
)  # fmt: skip
async def test_the_class_of_the_status_decides(status: int, verdict: str):
    async with listen() as receiver:
        receiver.answer(status)
        answer = await client().post(f"http://127.0.0.1:{receiver.port}/", SECRET, "m", b"{}")
        assert answer.verdict == verdict


async def test_a_receiver_may_say_when():
    async with listen() as receiver:
        receiver.answer(503, "Retry-After: 120")
        receiver.answer(429, "retry-after: 99999999")
        receiver.answer(503, "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT")
        url = f"http://127.0.0.1:{receiver.port}/"
        assert [(await client().post(url, SECRET, "m", b"{}")).retry_after for _ in range(3)] == [120, 3600, None]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 2",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 20\xb2 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        None,
    ],
)
async def test_no_answer(answer: bytes | None):
    async with listen() as receiver:
        receiver.answers.append(answer)
        with pytest.raises(NoAnswer):
            await client(timeout=0.3).post(f"http://127.0.0.1:{receiver.port}/", SECRET, "m", b"{}")


async def test_informational_answers_are_no_answers():
    async with listen() as receiver:
        receiver.answers.append(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 202 Accepted\r\n\r\n")
        assert (await client().post(f"http://127.0.0.1:{receiver.port}/", SECRET, "m", b"{}")).status == 202


async def test_nobody_listens():
    async with listen() as receiver:
        pass
    with pytest.raises(NoAnswer):
        await client().post(f"http://127.0.0.1:{receiver.port}/", SECRET, "m", b"{}")


async def test_redirects_are_not_followed():
    async with listen() as outside, listen(host="127.0.0.2") as inside:
        outside.answer(307, f"Location: http://127.0.0.2:{inside.port}/admin")
        answer = await client().post(f"http://127.0.0.1:{outside.port}/", SECRET, "m", b"{}")
        assert answer.verdict == "never" and inside.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://2130706433/",  # 127.0.0.1 as getaddrinfo reads it
        "http://0x7f.1/",
        "http://0/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1%25lo]/",
        "http://[fc00::1]/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "http://user:password@example.com/",
        "http://example.com:99999/",
        "http://example.com/\r\nX: y",
        "http://example.com/ HTTP/1.1",
        "http://exämple.com/",
        "http:///x",
        "",
    ],
)
async def test_private_places_are_out_of_reach(url: str):
    with pytest.raises(Forbidden):
        await WebhookClient(timeout=5).post(url, SECRET, "m", b"{}")


def answers(*turns: Sequence[str]) -> tuple[Resolver, list[str]]:
    """A resolver that says something else each time, and what it was asked."""
    asked: list[str] = []

    async def resolve(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return turns[min(len(asked), len(turns)) - 1]

    return resolve, asked


async def test_a_name_that_changes_its_mind():
    """DNS rebinding: the address that was checked is the one that is connected to, whatever a second lookup would say."""
    async with listen() as outside, listen(host="127.0.0.2", port=outside.port) as inside:
        resolve, asked = answers(["127.0.0.1"], ["127.0.0.2"])
        await client(resolve=resolve).post(f"http://rebind.example.com:{outside.port}/", SECRET, "m", b"{}")
        assert asked == ["rebind.example.com"]
        assert (outside.connections, inside.connections) == (1, 0)
        with pytest.raises(Forbidden):
            await client(resolve=resolve).post(f"http://rebind.example.com:{outside.port}/", SECRET, "m", b"{}")
        assert inside.connections == 0


async def test_one_private_address_among_public_ones():
    resolve, _ = answers(["93.184.215.14", "10.0.0.1"])
    with pytest.raises(Forbidden):
        await client(resolve=resolve).post("http://mixed.example.com/", SECRET, "m", b"{}")
    nothing, _ = answers([])
    with pytest.raises(NoAnswer):
        await client(resolve=nothing).post("http://mixed.example.com/", SECRET, "m", b"{}")


async def test_the_certificate_is_checked_against_the_name(server_tls: ssl.SSLContext, certificates: Path):
    trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
    resolve, _ = answers(["127.0.0.1"])
    async with listen(context=server_tls) as receiver:
        post = client(resolve=resolve, context=trusting).post
        answer = await post(f"https://hooks.example.com:{receiver.port}/", SECRET, "m", b"{}")
        assert answer.verdict == "delivered"
        with pytest.raises(NoAnswer, match="Hostname mismatch"):
            await post(f"https://other.example.com:{receiver.port}/", SECRET, "m", b"{}")
        with pytest.raises(NoAnswer, match="certificate"):
            await client(resolve=resolve).post(f"https://hooks.example.com:{receiver.port}/", SECRET, "m", b"{}")
        assert len(receiver.requests) == 1


def test_what_is_public():
    assert is_public(ip_address("93.184.215.14")) and is_public(ip_address("2606:2800:21f:cb07:6820:80da:af6b:8b2c"))


async def test_a_delivery_whose_webhook_was_deleted_is_not_tried_again(pg: Any):
    """The handler as the function it is, and then through JSON, middleware and timeout (docs/testing.md)."""
    payload = CallWebhook(webhook_delivery_id=uuid4())
    with pytest.raises(Discard, match="the webhook was deleted"):
        await call_webhook(payload, testing.context(payload, database=pg))
    outcome = await testing.run(app, payload, services=object(), database=pg)
    assert isinstance(outcome, testing.Raised) and isinstance(outcome.error, Discard)
