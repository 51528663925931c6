"""Webhooks, analytics and warm-up, in a worker."""

import itertools
import json
from typing import Any

import asyncpg
import pytest

from mailer import campaigns
from mailer.jobs import CountEvents, HandleBounce, Report, WarmupEngagement, WarmupInbound, WarmupOutbound

pytestmark = pytest.mark.anyio

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"


async def register(world: Any, *events: str, url: str = "") -> Any:
    return await world.pg.fetchval(
        "insert into mailer.webhooks (url, secret, events) values ($1, $2, $3) returning id",
        url or f"http://127.0.0.1:{world.receiver.port}/hook",
        SECRET,
        list(events),
    )


async def calls(world: Any) -> list[Any]:
    return list(await world.pg.fetch("select * from mailer.webhook_deliveries order by updated_at"))


# -- webhooks


async def test_receivers_are_told_what_they_asked_for(world: Any):
    await register(world, "sent")
    await register(world, "failed", "hard_bounce")
    world.sink.misbehave("ben@example.org", "rcpt", "550 5.1.1 no such user")
    ann, ben = await world.campaign("ann@example.org", "ben@example.org")
    await world.run()
    told = {body["type"]: body["data"] for body in (json.loads(each.body) for each in world.receiver.requests)}
    assert told["email.sent"]["delivery_id"] == str(ann) and told["email.sent"]["recipient"] == "ann@example.org"
    assert told["email.failed"]["delivery_id"] == str(ben)
    assert told["email.failed"]["reply"] == "550 5.1.1 no such user"
    assert len(world.receiver.requests) == 2 and {each["status"] for each in await calls(world)} == {"delivered"}


async def test_a_busy_receiver_is_tried_again_with_the_same_bytes(world: Any):
    await register(world, "sent")
    world.receiver.answer(503)
    world.receiver.answers.append(b"")
    world.receiver.answer(429, "Retry-After: 60")
    await world.campaign("ann@example.org")
    await world.run()
    assert len(world.receiver.requests) == 4
    assert len({each.body for each in world.receiver.requests}) == 1
    assert len({each.headers["webhook-id"] for each in world.receiver.requests}) == 1
    (call,) = await calls(world)
    assert (call["status"], call["attempts"]) == ("delivered", 4)


@pytest.mark.parametrize("status", [302, *(pytest.param(each, marks=pytest.mark.all) for each in (400, 404))])
async def test_a_receiver_that_says_no_is_believed(world: Any, status: int):
    webhook = await register(world, "sent")
    world.receiver.answer(status, "Location: http://10.0.0.1/")
    await world.campaign("ann@example.org")
    await world.run()
    assert len(world.receiver.requests) == 1
    (job,) = await world.jobs("webhook.call")
    assert (job["status"], job["last_error"]) == ("dead", f"discarded: HTTP {status}")
    assert await world.pg.fetchval("select active from mailer.webhooks where id = $1", webhook)


async def test_a_receiver_that_is_gone_is_switched_off(world: Any):
    webhook = await register(world, "sent")
    world.receiver.answer(410)
    await world.campaign("ann@example.org")
    await world.run()
    row = await world.pg.fetchrow("select * from mailer.webhooks where id = $1", webhook)
    assert (row["active"], row["disabled_because"]) == (False, "HTTP 410")
    await world.campaign("ben@example.org", called="winter")
    await world.run()
    assert len(world.receiver.requests) == 1 and len(await calls(world)) == 1


async def test_a_receiver_that_never_answers(world: Any):
    await register(world, "sent")
    world.receiver.answer(500, times=20)
    await world.campaign("ann@example.org")
    await world.run()
    assert len(world.receiver.requests) == 10
    (call,) = await calls(world)
    assert (call["status"], call["attempts"], call["last_answer"]) == ("failed", 10, "HTTP 500")
    assert (await world.jobs("webhook.call"))[0]["status"] == "dead"


async def test_a_receiver_inside_our_network(world: Any):
    await register(world, "sent", url="http://169.254.169.254/latest/meta-data/")
    await world.campaign("ann@example.org")
    await world.run()
    (job,) = await world.jobs("webhook.call")
    assert job["status"] == "dead" and "not on the internet" in job["last_error"] and job["attempt_count"] <= 1


# -- analytics


async def metrics(world: Any) -> list[tuple[int, ...]]:
    rows = await world.pg.fetch(
        "select sum(sent)::int, sum(failed)::int, sum(suppressed)::int, sum(hard_bounces)::int, sum(soft_bounces)::int"
        " from mailer.campaign_metrics group by campaign_id"
    )
    return [tuple(row) for row in rows]


async def test_events_are_counted_once_however_often_they_are_counted(world: Any):
    world.sink.misbehave("1@example.org", "rcpt", "550 5.1.1 no")
    await world.pg.execute("insert into mailer.suppressions values ('2@example.org', 'x')")
    await world.campaign(*[f"{number}@example.org" for number in range(10)])
    await world.run()
    for _ in range(3):
        await world.enqueue(CountEvents(), CountEvents())
        await world.run()
    assert await metrics(world) == [(8, 1, 1, 0, 0)]
    await world.campaign("9@example.org", called="winter")
    await world.run()
    await world.enqueue(CountEvents())
    await world.run()
    assert sorted(await metrics(world)) == [(1, 0, 0, 0, 0), (8, 1, 1, 0, 0)]
    assert await world.pg.fetchval("select counted from mailer.analytics_progress") == 11


async def test_bounces_are_counted_for_their_campaign(world: Any):
    """From the report that comes in to the figure of the day: two mails back for good, one for now, twice."""
    hard, also, soft, *_ = await world.campaign(*[f"{number}@example.org" for number in range(5)])
    await world.run()
    for delivery, status, source in (
        (hard, "5.1.1", "a"),
        (also, "5.1.1", "b"),
        (also, "5.1.1", "b"),  # the same report, taken in twice
        (soft, "4.2.2", "c"),
        (soft, "4.2.2", "d"),
    ):
        report = Report("somebody@example.org", status, "failed", "")
        await world.enqueue(HandleBounce(source=source, delivery_id=delivery, message_id=None, reports=[report]))
    await world.enqueue(CountEvents())
    await world.run()
    await world.enqueue(CountEvents())
    await world.run()
    assert await metrics(world) == [(5, 0, 0, 2, 2)]


async def test_an_event_that_commits_late_is_not_lost(world: Any, database_url: str):
    """Ids are given when a row is written; a count that goes by them would pass over this one for ever."""
    early, late = await world.campaign("ann@example.org", "ben@example.org")
    insert = (
        "insert into mailer.email_events (delivery_id, campaign_id, type) select id, campaign_id, 'sent'"
        " from mailer.email_deliveries where id = $1"
    )
    other = await asyncpg.connect(database_url)
    try:
        slow = other.transaction()
        await slow.start()
        await other.execute(insert, late)
        await world.pg.execute(insert, early)
        await world.pg.execute("update streamworker.jobs set status = 'cancelled'")
        await world.enqueue(CountEvents())
        await world.run()
        before = await metrics(world)
        await slow.commit()
    finally:
        await other.close()
    await world.enqueue(CountEvents())
    await world.run()
    assert sum(row[0] for row in before) <= 1 and await metrics(world) == [(2, 0, 0, 0, 0)]


async def test_a_series_schedules_its_next_count_and_two_series_are_one(world: Any):
    await world.enqueue(CountEvents(every=3600), CountEvents(every=3600))

    async def both() -> bool:
        return [job["status"] for job in await world.jobs("analytics.count")].count("completed") == 2

    await world.run_until(both)
    jobs = await world.jobs("analytics.count")
    assert [job["status"] for job in jobs].count("completed") == 2 and len(jobs) == 3
    (following,) = [job for job in jobs if job["status"] != "completed"]
    assert following["run_at"].timestamp() % 3600 == 0 and json.loads(following["payload"]) == {"every": 3600.0}


# -- warm-up


@pytest.fixture
async def warming(world: Any) -> Any:
    await campaigns.put_template(world.pg, "warmup", "Day {{day}}", "Letter {{number}}", None)
    return await world.pg.fetchval(
        "insert into mailer.warmup_configs (mailbox, seeds, template_id, reply_template_id, first_day, growth, days,"
        " reply_share) select 'new@example.com', array['a@seed.example', 'b@seed.example'], id, id, 4, 1.5, 3, 0.5"
        " from mailer.email_templates returning id"
    )


async def deliver(world: Any, *, spam: bool = False) -> None:
    """What went out comes in at the seeds."""
    for mail in world.sink.mails:
        raw = mail.message.as_bytes()
        await world.receive((b"X-Spam-Flag: YES\r\n" if spam else b"") + raw, mail.recipient)
    world.sink.mails.clear()


async def steps(world: Any) -> list[tuple[int, str, int, int]]:
    rows = await world.pg.fetch("select day, step, mails, spam from mailer.warmup_steps order by at")
    return [(row["day"], row["step"], row["mails"], row["spam"]) for row in rows]


async def test_a_warm_up_walks_its_days(world: Any, warming: Any):
    """Days pass as fast as their jobs can run; the seeds' mail comes in as soon as it is sent."""
    await world.enqueue(WarmupOutbound(warmup_id=warming, day=1))
    expected = []
    for day, mails in ((1, 4), (2, 6), (3, 9)):
        await world.run_kind("warmup.outbound", "email.send")
        assert len(world.sink.mails) == mails
        assert {mail.recipient for mail in world.sink.mails} == {"a@seed.example", "b@seed.example"}
        await deliver(world)
        await world.run_kind("email.process")
        await world.run_kind("warmup.inbound")
        await world.run_kind("warmup.engagement", "email.send")
        answers = -(-mails // 2)
        assert [mail.recipient for mail in world.sink.mails] == ["new@example.com"] * answers
        assert all(mail.message["In-Reply-To"] for mail in world.sink.mails)
        world.sink.mails.clear()
        expected += [(day, "outbound", mails, 0), (day, "inbound", mails, 0), (day, "engagement", answers, 0)]
    assert await steps(world) == expected
    assert await world.left() == 0  # the last day is the last


async def test_a_step_that_runs_twice_is_taken_once(world: Any, warming: Any):
    twice = WarmupOutbound(warmup_id=warming, day=1)
    await world.enqueue(twice, twice)
    await world.run_kind("warmup.outbound", "email.send")
    assert len(world.sink.mails) == 4
    for kind, payload in (
        ("warmup.inbound", WarmupInbound(warmup_id=warming, day=1)),
        ("warmup.engagement", WarmupEngagement(warmup_id=warming, day=1)),
    ):
        await world.enqueue(payload)
        await world.run_kind(kind)
    assert [each[1] for each in await steps(world)] == ["outbound", "inbound", "engagement"]
    assert [job["payload"] for job in await world.jobs("warmup.outbound") if job["status"] == "queued"] == [
        json.dumps({"day": 2, "warmup_id": str(warming)})
    ]


async def test_a_warm_up_that_lands_in_spam_stops(world: Any, warming: Any):
    await world.enqueue(WarmupOutbound(warmup_id=warming, day=1))
    await world.run_kind("warmup.outbound", "email.send")
    await deliver(world, spam=True)
    await world.run_kind("email.process")
    await world.run_kind("warmup.inbound")
    assert await steps(world) == [(1, "outbound", 4, 0), (1, "inbound", 4, 4)]
    assert not await world.pg.fetchval("select active from mailer.warmup_configs") and await world.left() == 0


async def test_a_warm_up_that_was_switched_off_ends(world: Any, warming: Any):
    await world.pg.execute("update mailer.warmup_configs set active = false")
    await world.enqueue(WarmupOutbound(warmup_id=warming, day=1))
    await world.run()
    assert world.sink.mails == [] and await steps(world) == []


async def test_mails_of_a_day_are_spread_over_it(world: Any, warming: Any):
    await world.enqueue(WarmupOutbound(warmup_id=warming, day=1))
    await world.run_kind("warmup.outbound")
    times = sorted(job["run_at"].timestamp() for job in await world.jobs("email.send") if job["run_at"])[-4:]
    assert [round(later - earlier) for earlier, later in itertools.pairwise(times)] == [8640] * 3
