"""The sending handler, in a worker, against a mail server that has bad days."""

import time
from dataclasses import replace
from typing import Any

import anyio
import pytest

from mailer.app import app
from mailer.handlers import sending
from mailer.jobs import SendEmail
from mailer.rate import wait_for_turn
from mailer.smtp import EmailService

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_campaign_arrives_once_and_personal(world: Any):
    people = [f"{number}@example.org" for number in range(50)]
    deliveries = await world.campaign(*people)
    await world.run()
    assert sorted(mail.recipient for mail in world.sink.mails) == sorted(people)
    (mail,) = world.sink.arrived("7@example.org")
    assert mail.message["Subject"] == "Hello 7" and mail.message["To"] == "7@example.org"
    assert mail.message["Message-ID"] == f"<{deliveries[7]}@example.com>"
    assert mail.sender == f"bounce+{deliveries[7].hex}@example.com"
    assert "<p>Dear 7</p>" in str(mail.message)
    assert world.sink.connections <= world.services.config.connections
    assert await world.events() == ["sent"] * 50
    row = await world.delivery(deliveries[0])
    assert (row["status"], row["attempts"], row["uncertain"]) == ("sent", 1, 0) and row["reply"].startswith("250")


async def test_a_delivery_is_sent_once_however_often_it_is_asked_for(world: Any):
    (delivery,) = await world.campaign("ann@example.org")
    await world.enqueue(SendEmail(delivery_id=delivery), SendEmail(delivery_id=delivery))
    await world.run()
    await world.enqueue(SendEmail(delivery_id=delivery))
    await world.run()
    assert len(world.sink.mails) == 1 and await world.events() == ["sent"]


@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.parametrize(
    ("moment", "reply"),
    [("rcpt", "550 5.1.1 no such user"), pytest.param("data", "554 5.7.1 spam", marks=pytest.mark.all)],
)
async def test_a_permanent_refusal_is_dead_at_once(world: Any, moment: str, reply: str):
    (delivery,) = await world.campaign("ann@example.org")
    world.sink.misbehave("ann@example.org", moment, reply, times=9)
    await world.run()
    assert world.sink.attempts["ann@example.org"] == 1 and world.sink.mails == []
    (job,) = await world.jobs("email.send")
    assert (job["status"], job["last_error"]) == ("dead", f"discarded: {reply}")
    row = await world.delivery(delivery)
    assert (row["status"], row["reply"], row["uncertain"]) == ("failed", reply, 0)
    assert await world.events() == ["failed"]


@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.parametrize(
    ("moment", "reply"),
    [("rcpt", "451 4.7.1 greylisted"), pytest.param("data", "452 4.3.1 disk full", marks=pytest.mark.all)],
)
async def test_a_refusal_for_now_is_tried_again(world: Any, moment: str, reply: str):
    (delivery,) = await world.campaign("ann@example.org")
    world.sink.misbehave("ann@example.org", moment, reply, times=2)
    await world.run()
    assert len(world.sink.mails) == 1
    row = await world.delivery(delivery)
    assert (row["status"], row["attempts"], row["uncertain"]) == ("sent", 3, 0)
    (job,) = await world.jobs("email.send")
    assert (job["status"], job["attempt_count"]) == ("completed", 2)
    assert await world.events() == ["sent"]


async def test_greylisting_for_ever_ends(world: Any):
    (delivery,) = await world.campaign("ann@example.org")
    world.sink.misbehave("ann@example.org", "rcpt", "451 4.7.1 later", times=99)
    await world.run()
    assert world.sink.attempts["ann@example.org"] == 12
    assert (await world.delivery(delivery))["status"] == "failed"
    assert (await world.jobs("email.send"))[0]["status"] == "dead"
    assert await world.events() == ["failed"]


async def test_a_lost_answer_is_sent_again_under_the_same_name_and_counted(world: Any):
    (delivery,) = await world.campaign("ann@example.org")
    world.sink.misbehave("ann@example.org", "drop-after", times=2)
    await world.run()
    mails = world.sink.arrived("ann@example.org")
    assert len(mails) == 3 and len({mail.message["Message-ID"] for mail in mails}) == 1
    row = await world.delivery(delivery)
    assert (row["status"], row["attempts"], row["uncertain"]) == ("sent", 3, 2)
    assert await world.events() == ["sent"]


async def test_the_server_is_away(world: Any):
    (delivery,) = await world.campaign("ann@example.org")
    away = EmailService(replace(world.services.config.smtp, port=1), timeout=1)
    world.services, there = replace(world.services, email=away), world.services
    await world.app.enqueue(SendEmail(delivery_id=delivery))  # another job, to be left alone
    await world.run()
    row = await world.delivery(delivery)
    assert row["status"] == "failed" and "cannot reach" in row["reply"] and row["uncertain"] == 0
    world.services = there


@pytest.mark.parametrize("address", ["ann@example.org", "Ann@EXAMPLE.org"])
async def test_the_suppressed_are_never_mailed(world: Any, address: str):
    (delivery,) = await world.campaign(address) if address.islower() else [None]
    await world.pg.execute("insert into mailer.suppressions values ('ann@example.org', 'bounced')")
    if delivery is None:
        await world.campaign(address, "ben@example.org")
    await world.run()
    assert world.sink.arrived("ann@example.org") == world.sink.arrived("Ann@example.org") == []
    statuses = await world.pg.fetch("select status from mailer.email_deliveries where lower(recipient) like 'ann@%'")
    assert [row["status"] for row in statuses] == ["suppressed"]
    assert "suppressed" in await world.events()


async def test_a_suppression_reaches_mails_that_wait_for_a_connection(world: Any):
    """Only a mail whose dialogue has begun is beyond recall; one that queues for a connection is not, nor is it in doubt."""
    one = EmailService(world.services.config.smtp, connections=1)
    world.services, there = replace(world.services, email=one), world.services
    people = [f"ann@{number}.example" for number in range(4)]  # of one domain they would take turns
    deliveries = await world.campaign(*people)
    world.sink.gate.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(world.run_patiently)
        with anyio.fail_after(30):
            await world.sink.waiting.wait()
        await world.pg.executemany("insert into mailer.suppressions values ($1, 'x')", [(each,) for each in people])
        world.sink.gate.set()
    await one.close()
    world.services = there
    assert len(world.sink.mails) == 1
    rows = [await world.delivery(each) for each in deliveries]
    assert sorted(row["status"] for row in rows) == ["sent", "suppressed", "suppressed", "suppressed"]
    assert sum(row["attempts"] for row in rows) == 1 and sum(row["uncertain"] for row in rows) == 0


@pytest.mark.parametrize(
    ("statement", "mistake"),
    [
        ("update mailer.email_templates set subject = '{{nobody}}'", "no value for {{nobody}}"),
        ("update mailer.email_templates set body_text = '{{#x}}'", "not closed"),
        ("update mailer.email_deliveries set recipient = 'x y@example.org'", "no address"),
    ],
)
async def test_what_cannot_be_sent_is_dead_before_a_server_hears_of_it(world: Any, statement: str, mistake: str):
    (delivery,) = await world.campaign("ann@example.org")
    await world.pg.execute(statement)
    await world.run()
    assert world.sink.connections == 0
    assert mistake in (await world.delivery(delivery))["reply"]
    (job,) = await world.jobs("email.send")
    assert job["status"] == "dead" and mistake in job["last_error"] and job["attempt_count"] <= 1


async def test_a_deleted_delivery(world: Any):
    (delivery,) = await world.campaign("ann@example.org")
    await world.pg.execute("delete from mailer.email_deliveries where id = $1", delivery)
    await world.run()
    assert (await world.jobs("email.send"))[0]["last_error"] == "discarded: the delivery was deleted"


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_each_domain_has_its_own_pace(world: Any, monkeypatch: pytest.MonkeyPatch):
    """Never faster than told, over all jobs; a domain does not wait for another one."""
    asked = []

    async def turn(*args: Any) -> float:
        asked.append(time.monotonic())
        return await wait_for_turn(*args)

    monkeypatch.setattr(sending, "wait_for_turn", turn)
    world.services = replace(world.services, config=replace(world.services.config, per_domain=20))
    await world.campaign(*[f"{number}@slow.example" for number in range(10)], "ann@other.example")
    # Really waiting: hastened jobs would come before their turn.
    await world.run_patiently()
    times = sorted(mail.at for mail in world.sink.mails if mail.recipient.endswith("@slow.example"))
    assert len(times) == 10 and len(world.sink.arrived("ann@other.example")) == 1
    # The first may arrive late, its turn was not before it was asked for; the clock of the turns counts milliseconds.
    assert times[-1] - asked[0] >= 9 * 0.05 - 0.05
    assert {row["attempts"] for row in await world.pg.fetch("select attempts from mailer.email_deliveries")} == {1}


async def test_personal_data_cannot_write_headers(world: Any):
    await world.campaign("ann@example.org", name="x\r\nBcc: everybody@example.org\r\n\r\nfree pills")
    await world.run()
    (mail,) = world.sink.mails
    assert mail.message["Bcc"] is None and mail.recipient == "ann@example.org"
    assert mail.message["Subject"] == "Hello x Bcc: everybody@example.org free pills"


def test_what_suppresses_comes_before_what_sends():
    """Workers take from the queues in this order: a campaign must not keep its own bounces waiting."""
    queues = list(app.queues)
    assert queues.index("bounce") == 0 and queues.index("email:processing") < queues.index("email-sending")
