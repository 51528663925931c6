"""Queue ``email-sending``: one delivery, one mail.

What is certain, and what is not. A delivery is recorded as sent once: the row, the event, its webhooks and "this job
is done" commit together. The mail itself is at least once, as everything over SMTP: a worker that dies between the
server's 250 and that commit leaves the row in ``sending``, and the next run has to send again, because nobody can ask
the server. It does so with the same Message-ID, and counts the attempt in ``uncertain``: the sum over a campaign is
the most duplicates it can have caused, and at most `Config.connections` for each worker that died.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import msgspec

from mailer import events
from mailer.jobs import SendEmail
from mailer.messages import BadAddress, Mail, bounce_address, build, domain_of
from mailer.rate import wait_for_turn
from mailer.services import Services
from mailer.smtp import NotNow, Refused, Unknown
from mailer.templates import TemplateError, render
from streamworker import Backoff, Context, Discard, Handlers, Retry, Snooze

sending = Handlers[Services]()

_LOAD = """
select delivery.*, template.subject, template.body_text, template.body_html,
    exists (select from mailer.suppressions where address = lower(delivery.recipient)) as is_suppressed
from mailer.email_deliveries delivery join mailer.email_templates template on template.id = delivery.template_id
where delivery.id = $1
"""
# Suppressed in the same statement: from the moment a suppression commits, nobody begins. A row that is `sending`
# already is an attempt of this very job whose end nobody knows.
_BEGIN = """
update mailer.email_deliveries set status = 'sending', job_id = $2, attempts = attempts + 1,
    uncertain = uncertain + (status = 'sending')::integer, updated_at = now()
where id = $1 and (status in ('queued', 'deferred') or (status = 'sending' and job_id = $2))
    and not exists (select from mailer.suppressions where address = lower(recipient))
returning true
"""
_END = """
update mailer.email_deliveries set status = $2, reply = $3, uncertain = uncertain + $4, updated_at = now()
where id = $1 and status in ('queued', 'deferred', 'sending')
"""


@dataclass(frozen=True)
class Delivery:
    """What a job needs to know of its delivery."""

    id: UUID
    status: str
    job_id: str | None
    suppressed: bool
    reply: str
    recipient: str
    message: bytes | None
    mistake: str


@sending.handler(max_attempts=12, timeout=300, backoff=Backoff(base=30, cap=3600))
async def send_email(payload: SendEmail, ctx: Context[Services]) -> None:
    """Send it, unless it was sent, must not be sent, or cannot be."""
    delivery = await _load(ctx.database, payload.delivery_id)
    if delivery is None:
        raise Discard("the delivery was deleted")
    if delivery.status == "failed":
        raise Discard(delivery.reply)  # the worker died between recording this and saying it
    if delivery.status in ("sent", "bounced", "suppressed"):
        return
    if delivery.status == "sending" and delivery.job_id != ctx.job.id:
        ctx.log.warning("delivery_belongs_to_another_job", delivery_id=str(delivery.id), other=delivery.job_id)
        return
    if delivery.suppressed:
        async with ctx.transaction() as pg:
            await pg.execute(_END, delivery.id, "suppressed", "the address is suppressed", 0)
            await events.record(pg, ctx.services.app, delivery.id, "suppressed")
        return
    if delivery.message is None:
        await _fail(ctx, delivery.id, delivery.mistake)
        raise Discard(delivery.mistake)

    rate = ctx.services.config.per_domain
    if wait := await wait_for_turn(ctx.redis, domain_of(delivery.recipient), str(delivery.id), rate):
        raise Snooze(wait)
    await _send(ctx, delivery, delivery.message)


async def _send(ctx: Context[Services], delivery: Delivery, message: bytes) -> None:
    services = ctx.services
    try:
        # From beginning to commit inside the turn: what waits for a connection can still be suppressed, and of a worker
        # that dies no more mails are in doubt than it has connections.
        async with services.email.turn() as send:
            if not await ctx.database.fetchval(_BEGIN, delivery.id, ctx.job.id):
                raise Snooze(1)  # suppressed, or somebody else's, since we looked: look again
            reply = await send(bounce_address(delivery.id, services.config.domain), delivery.recipient, message)
            async with ctx.transaction() as pg:
                await pg.execute(_END, delivery.id, "sent", reply, 0)
                await events.record(pg, services.app, delivery.id, "sent")
    except Refused as refusal:
        await _fail(ctx, delivery.id, refusal.reply)
        raise Discard(refusal.reply) from None
    except NotNow as refusal:
        if ctx.last_attempt:
            await _fail(ctx, delivery.id, refusal.reply)
        else:
            await ctx.database.execute(_END, delivery.id, "deferred", refusal.reply, 0)
        raise Retry(reason=refusal.reply) from None
    except Unknown as silence:
        # The row stays `sending`: the next attempt counts this one as uncertain.
        if ctx.last_attempt:
            await _fail(ctx, delivery.id, silence.reply, uncertain=1)
        raise Retry(reason=silence.reply) from None


async def _fail(ctx: Context[Services], delivery_id: UUID, reply: str, *, uncertain: Literal[0, 1] = 0) -> None:
    """Recorded in a transaction of its own: the job itself is about to be dead, not done."""
    async with ctx.database.acquire() as pg, pg.transaction():
        await pg.execute(_END, delivery_id, "failed", reply, uncertain)
        await events.record(pg, ctx.services.app, delivery_id, "failed")


async def _load(pool: Any, delivery_id: UUID) -> Delivery | None:
    row = await pool.fetchrow(_LOAD, delivery_id)
    if row is None:
        return None
    message, mistake = None, ""
    try:
        message = build(_mail(row))
    except (TemplateError, BadAddress) as error:
        mistake = f"{type(error).__name__}: {error}"
    return Delivery(
        row["id"],
        row["status"],
        row["job_id"],
        row["is_suppressed"],
        row["reply"] or "",
        row["recipient"],
        message,
        mistake,
    )


def _mail(row: Any) -> Mail:
    variables = {"recipient": row["recipient"], **msgspec.json.decode(row["variables"], type=dict[str, Any])}
    html = row["body_html"]
    return Mail(
        message_id=row["message_id"],
        sender=row["sender"],
        recipient=row["recipient"],
        subject=render(row["subject"], variables),
        text=render(row["body_text"], variables),
        html=None if html is None else render(html, variables, html=True),
        in_reply_to=row["in_reply_to"],
    )
