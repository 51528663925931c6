"""Queue ``warmup``: a new mailbox makes itself known, a little more mail each day.

A chain of three steps a day. Each commits its work, the note that it was taken, and the job of the next step
together, so the chain neither breaks nor forks, whatever dies: a step that runs twice finds its note and does
nothing.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import msgspec

from mailer.jobs import SendEmail, WarmupEngagement, WarmupInbound, WarmupOutbound
from mailer.messages import message_id_for
from mailer.services import Connection, Services
from streamworker import Context, Handlers

warmup = Handlers[Services]()

DAY: Final = 86_400.0
SENDING: Final = 0.4
"""The part of a day over which its mails are spread."""
TOO_MUCH_SPAM: Final = 0.5
"""Above this share of mails in spam folders a warm-up does harm, and stops."""

_DELIVERY: Final = """
insert into mailer.email_deliveries
    (id, warmup_id, warmup_day, template_id, sender, recipient, variables, message_id, in_reply_to)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
_ARRIVED: Final = """
select distinct on (delivery.id) delivery.id, delivery.recipient, delivery.message_id, message.spam
from mailer.email_deliveries delivery
join mailer.email_messages message on message.message_id = delivery.message_id and message.mailbox = delivery.recipient
where delivery.warmup_id = $1 and delivery.warmup_day = $2 and delivery.in_reply_to is null
order by delivery.id, message.spam
"""


@warmup.handler(max_attempts=10, timeout=120)
async def outbound(payload: WarmupOutbound, ctx: Context[Services]) -> None:
    """Mail the seeds, more of them each day."""
    async with ctx.transaction() as pg:
        config = await _config(pg, payload.warmup_id)
        if config is None:
            return
        planned = min(config["most_per_day"], math.ceil(config["first_day"] * config["growth"] ** (payload.day - 1)))
        if not await _first_time(pg, payload.warmup_id, payload.day, "outbound", planned):
            return
        mails = [
            _Mail(config["template_id"], config["mailbox"], config["seeds"][number % len(config["seeds"])], number)
            for number in range(planned)
        ]
        await _send(pg, ctx, payload.warmup_id, payload.day, mails)
        following = WarmupInbound(warmup_id=payload.warmup_id, day=payload.day)
        await ctx.services.app.enqueue(following, delay=DAY * 0.5, connection=pg)


@warmup.handler(max_attempts=10, timeout=120)
async def inbound(payload: WarmupInbound, ctx: Context[Services]) -> None:
    """See what arrived at the seeds, and where; `mailer ingest` brings their mail in."""
    async with ctx.transaction() as pg:
        if await _config(pg, payload.warmup_id) is None:
            return
        arrived = await pg.fetch(_ARRIVED, payload.warmup_id, payload.day)
        spam = sum(row["spam"] for row in arrived)
        if not await _first_time(pg, payload.warmup_id, payload.day, "inbound", len(arrived), spam):
            return
        if arrived and spam / len(arrived) > TOO_MUCH_SPAM:
            ctx.log.error("warmup_stopped", warmup_id=str(payload.warmup_id), arrived=len(arrived), spam=spam)
            await pg.execute("update mailer.warmup_configs set active = false where id = $1", payload.warmup_id)
            return
        following = WarmupEngagement(warmup_id=payload.warmup_id, day=payload.day)
        await ctx.services.app.enqueue(following, delay=DAY * 0.2, connection=pg)


@warmup.handler(max_attempts=10, timeout=120)
async def engagement(payload: WarmupEngagement, ctx: Context[Services]) -> None:
    """The seeds answer a share of what arrived; then comes the next day."""
    async with ctx.transaction() as pg:
        config = await _config(pg, payload.warmup_id)
        if config is None:
            return
        arrived = [row for row in await pg.fetch(_ARRIVED, payload.warmup_id, payload.day) if not row["spam"]]
        answered = arrived[: math.ceil(len(arrived) * config["reply_share"])]
        if not await _first_time(pg, payload.warmup_id, payload.day, "engagement", len(answered)):
            return
        mails = [
            _Mail(config["reply_template_id"], row["recipient"], config["mailbox"], number, row["message_id"])
            for number, row in enumerate(answered)
        ]
        await _send(pg, ctx, payload.warmup_id, payload.day, mails)
        if payload.day < config["days"]:
            following = WarmupOutbound(warmup_id=payload.warmup_id, day=payload.day + 1)
            await ctx.services.app.enqueue(following, delay=DAY * 0.3, connection=pg)


class _Mail(msgspec.Struct, frozen=True):
    template_id: UUID
    sender: str
    recipient: str
    number: int
    in_reply_to: str | None = None


async def _config(pg: Connection, warmup_id: UUID) -> Any:
    """The warm-up, if it goes on."""
    return await pg.fetchrow("select * from mailer.warmup_configs where id = $1 and active", warmup_id)


async def _first_time(pg: Connection, warmup_id: UUID, day: int, step: str, mails: int, spam: int = 0) -> bool:
    """Note that a step is taken; whether nobody took it before."""
    note = (
        "insert into mailer.warmup_steps (warmup_id, day, step, mails, spam) values ($1, $2, $3, $4, $5)"
        " on conflict do nothing returning true"
    )
    return bool(await pg.fetchval(note, warmup_id, day, step, mails, spam))


async def _send(pg: Connection, ctx: Context[Services], warmup_id: UUID, day: int, mails: list[_Mail]) -> None:
    """Deliveries and their jobs, spread over the day: a person does not write fifty mails in a second."""
    rows, jobs, now = [], [], datetime.now(UTC)
    for place, mail in enumerate(mails):
        delivery_id = uuid4()
        variables = msgspec.json.encode({"day": day, "number": mail.number}).decode()
        message_id = message_id_for(delivery_id, ctx.services.config.domain)
        row = (delivery_id, warmup_id, day, mail.template_id, mail.sender, mail.recipient, variables, message_id)
        rows.append((*row, mail.in_reply_to))
        at = now + timedelta(seconds=DAY * SENDING * place / len(mails))
        jobs.append(ctx.services.app.job(SendEmail(delivery_id=delivery_id), run_at=at))
    await pg.executemany(_DELIVERY, rows)
    if jobs:
        await ctx.services.app.enqueue_many(jobs, connection=pg)
