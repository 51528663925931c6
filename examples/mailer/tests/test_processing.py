"""Incoming mail, in a worker: stored whole, once, and understood if it is a bounce."""

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import anyio
import pytest

from mailer import content
from mailer.jobs import HandleBounce, Report
from mailer.messages import bounce_address

pytestmark = pytest.mark.anyio

WITH_ATTACHMENTS = (
    b"From: ann@example.org\r\nTo: me@example.com\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\nMessage-ID: <1@example.org>\r\n"
    b'Content-Type: multipart/mixed; boundary="q"\r\n\r\n--q\r\n\r\nHello\r\n'
    b"--q\r\nContent-Type: text/html\r\n\r\n<p>Hello</p>\r\n"
    b"--q\r\nContent-Disposition: attachment; filename=a.bin\r\nContent-Transfer-Encoding: base64\r\n\r\nAAEC\r\n"
    b"--q\r\nContent-Disposition: attachment; filename=b.bin\r\nContent-Transfer-Encoding: base64\r\n\r\nAAEC\r\n--q--\r\n"
)


async def stored(world: Any, content_id: Any) -> bytes:
    async with content.spooled(world.pg, content_id) as file:
        file.seek(0)
        return bytes(file.read())


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_message_is_stored_whole(world: Any):
    await world.receive(WITH_ATTACHMENTS)
    await world.run()
    (row,) = await world.pg.fetch("select * from mailer.email_messages")
    assert (row["subject"], row["sender"], row["recipients"]) == ("Grüße", "ann@example.org", ["me@example.com"])
    assert (row["body_text"], row["body_html"], row["message_id"]) == ("Hello", "<p>Hello</p>", "<1@example.org>")
    assert await stored(world, row["raw_content_id"]) == WITH_ATTACHMENTS
    attachments = await world.pg.fetch("select * from mailer.email_attachments order by n")
    assert [each["filename"] for each in attachments] == ["a.bin", "b.bin"]
    assert len({each["content_id"] for each in attachments}) == 1  # the same bytes
    assert await stored(world, attachments[0]["content_id"]) == b"\x00\x01\x02"
    assert await world.jobs("email.bounce") == []


async def test_a_message_that_comes_twice_is_stored_once(world: Any):
    for _ in range(3):
        await world.receive(WITH_ATTACHMENTS)
    await world.receive(WITH_ATTACHMENTS, "other@example.com")
    await world.run()
    await world.receive(WITH_ATTACHMENTS)
    await world.run()
    rows = await world.pg.fetch("select mailbox from mailer.email_messages order by mailbox")
    assert [row["mailbox"] for row in rows] == ["me@example.com", "other@example.com"]
    assert await world.pg.fetchval("select count(*) from mailer.email_content") == 2
    assert {job["status"] for job in await world.jobs("email.process")} == {"completed"}


async def test_a_message_id_is_no_proof_of_having_been_here(world: Any):
    await world.receive(b"Message-ID: <1@example.org>\r\nSubject: first\r\n\r\n")
    await world.receive(b"Message-ID: <1@example.org>\r\nSubject: second\r\n\r\n")
    await world.run()
    rows = await world.pg.fetch("select subject from mailer.email_messages order by subject")
    assert [row["subject"] for row in rows] == ["first", "second"]


async def test_nothing_is_stored_by_halves(world: Any, monkeypatch: pytest.MonkeyPatch):
    """A worker that fails between two writes leaves none of them; the next attempt stores all."""
    real, calls = content.store, 0

    async def breaks(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        found = await real(*arguments)
        if calls == 1:
            counts = [await world.pg.fetchval(f"select count(*) from mailer.{table}") for table in TABLES]
            assert counts == [0, 0, 1]  # written, and invisible until all of it is
            raise ConnectionResetError("in the middle")
        return found

    await world.receive(WITH_ATTACHMENTS)
    monkeypatch.setattr(content, "store", breaks)
    await world.run()
    assert calls > 1
    counts = [await world.pg.fetchval(f"select count(*) from mailer.{table}") for table in TABLES]
    assert counts == [1, 2, 2]
    (job,) = await world.jobs("email.process")
    assert (job["status"], job["attempt_count"]) == ("completed", 1)


TABLES = ("email_messages", "email_attachments", "email_content")


async def test_the_standard_librarys_corpus(world: Any, corpus: list[Path]):
    for path in corpus:
        await world.receive(path.read_bytes())
    await world.run()
    assert await world.pg.fetchval("select count(*) from mailer.email_messages") == len(corpus)
    for path in corpus:
        found = await world.pg.fetchval(
            "select id from mailer.email_content where sha256 = $1", hashlib.sha256(path.read_bytes()).digest()
        )
        assert await stored(world, found) == path.read_bytes()
    assert len(await world.jobs("email.bounce")) >= 2
    assert {job["status"] for job in await world.jobs("email.bounce")} == {"completed"}


@pytest.mark.timeout(300)
async def test_an_attachment_of_many_megabytes(world: Any):
    blocks, block = 200, os.urandom(57 * 1024)
    raw = (
        b'Subject: large\r\nContent-Type: multipart/mixed; boundary="q"\r\n\r\n--q\r\n\r\nHello\r\n'
        b"--q\r\nContent-Type: application/zip\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    ) + base64.encodebytes(block) * blocks + b"--q--\r\n"  # fmt: skip
    await world.receive(raw)
    await world.run()
    row = await world.pg.fetchrow(
        "select content.* from mailer.email_attachments attachment"
        " join mailer.email_content content on content.id = attachment.content_id"
    )
    assert row["size"] == blocks * len(block) and row["sha256"] == hashlib.sha256(block * blocks).digest()
    largest = "select max(length(data)) from mailer.email_content_chunks"
    assert await world.pg.fetchval(largest) == content.CHUNK


HOSTILE = {
    "nul": b"Subject: a\x00b\r\nFrom: \x00@x\r\nMessage-ID: <\x00@x>\r\n\r\n\x00",
    "charset": b"Content-Type: text/plain; charset=\x00\r\nSubject: =?x?q?=00?=\r\n\r\n\xff\xfe\xed\xa0\x80",
    "filename": b"Content-Disposition: attachment; filename*=utf-8''%00%0d%0a..%2f..%2fx\r\n\r\nx",
    "type": b"Content-Type: \x00/\x01; name=x\r\nContent-Disposition: attachment\r\n\r\nx",
    "date": b"Date: Mon, 01 Jan 0001 00:00:00 +2359\r\n\r\nx",
    "address": b"From: " + b"x" * 100_000 + b"@x\r\nTo: " + b"y@z, " * 20_000 + b"\r\n\r\nx",
    "nested": b"".join(b'Content-Type: multipart/mixed; boundary="%d"\n\n--%d\n' % (n, n) for n in range(2000)),
    "empty": b"",
}


async def test_no_message_is_too_hostile_to_be_stored(world: Any):
    for raw in HOSTILE.values():
        await world.receive(raw)
    await world.run()
    assert await world.pg.fetchval("select count(*) from mailer.email_messages") == len(HOSTILE)
    jobs = zip(HOSTILE, await world.jobs("email.process"), strict=True)
    assert {name: job["attempt_count"] for name, job in jobs} == dict.fromkeys(HOSTILE, 0)


async def test_bytes_that_are_gone(world: Any):
    await world.receive(b"x")
    await world.pg.execute("delete from mailer.email_content")
    await world.run()
    assert (await world.jobs("email.process"))[0]["last_error"] == "discarded: the raw message was deleted"


# -- what came back


def report_on(delivery: Any, status: str, number: int = 0) -> bytes:
    return (
        f"From: MAILER-DAEMON@mx.example.org\r\nTo: {bounce_address(delivery, 'example.com')}\r\nX-Number: {number}\r\n"
        'Content-Type: multipart/report; report-type=delivery-status; boundary="r"\r\n\r\n--r\r\n\r\nSorry.\r\n'
        "--r\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.example.org\r\n\r\n"
        f"Final-Recipient: rfc822; elsewhere@example.net\r\nAction: failed\r\nStatus: {status}\r\n\r\n--r--\r\n"
    ).encode()


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_hard_bounce_suppresses_the_recipient(world: Any):
    (delivery,) = await world.campaign("Ann@example.org")
    await world.run()
    for _ in range(2):
        await world.receive(report_on(delivery, "5.1.1"))
    await world.run()
    row = await world.delivery(delivery)
    assert (row["status"], row["reply"]) == ("bounced", "5.1.1")
    # The address we mailed, not the one it was forwarded to.
    assert await world.pg.fetchval("select array_agg(address) from mailer.suppressions") == ["ann@example.org"]
    assert await world.events() == ["sent", "hard_bounce"]
    await world.campaign("ann@example.org", called="winter")
    await world.run()
    assert len(world.sink.mails) == 1  # of autumn


async def test_the_same_bounce_again_counts_once_and_another_one_twice(world: Any):
    (delivery,) = await world.campaign("ann@example.org")
    await world.run()
    soft = [Report("ann@example.org", "4.2.2", "failed", "full")]
    for source in ("one", "one", "two"):
        job = HandleBounce(source=source, delivery_id=None, message_id=f"<{delivery}@example.com>", reports=soft)
        await world.enqueue(job)
    await world.run()
    row = await world.delivery(delivery)
    assert (row["status"], row["soft_bounces"]) == ("sent", 2)
    assert await world.pg.fetchval("select count(*) from mailer.suppressions") == 0
    assert await world.events() == ["sent", "soft_bounce", "soft_bounce"]


async def test_a_forged_bounce_suppresses_nobody(world: Any):
    await world.campaign("ann@example.org")
    await world.run()
    hard = [Report("ann@example.org", "5.1.1", "failed", "")]
    await world.enqueue(HandleBounce(source="x", delivery_id=None, message_id="<guessed@example.com>", reports=hard))
    await world.enqueue(HandleBounce(source="x", delivery_id=None, message_id=None, reports=hard))
    await world.run()
    assert await world.pg.fetchval("select count(*) from mailer.suppressions") == 0
    assert await world.events() == ["sent"]


async def test_good_news_is_no_bounce(world: Any):
    (delivery,) = await world.campaign("ann@example.org")
    await world.run()
    good = [Report("ann@example.org", "2.0.0", "delivered", "")]
    await world.enqueue(HandleBounce(source="x", delivery_id=delivery, message_id=None, reports=good))
    await world.run()
    assert (await world.delivery(delivery))["status"] == "sent"


async def test_a_bounce_that_is_faster_than_our_own_record(world: Any):
    """It comes back before the worker has written that it went out."""
    (delivery,) = await world.campaign("ann@example.org")
    world.sink.gate.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(world.run_patiently)
        await world.sink.waiting.wait()
        hard = [Report("ann@example.org", "5.1.1", "failed", "")]
        await world.enqueue(HandleBounce(source="x", delivery_id=delivery, message_id=None, reports=hard))

        async def bounced() -> bool:
            return (await world.delivery(delivery))["status"] == "bounced"

        await world.until(bounced)
        world.sink.gate.set()
    assert (await world.delivery(delivery))["status"] == "bounced"
    assert sorted(await world.events()) == ["hard_bounce", "sent"]
