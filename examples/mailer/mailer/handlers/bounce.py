"""Queue ``bounce``: a mail of ours came back.

Anyone can write a bounce. It counts only for a delivery that it can name by something that nobody but us and those who
got the mail has seen: the address it comes to (``bounce+<id>@``), or the Message-ID it quotes. Others are logged.
"""

from __future__ import annotations

from uuid import UUID

from mailer import events, reports
from mailer.jobs import HandleBounce
from mailer.services import Connection, Services
from streamworker import Context, Handlers

bounce = Handlers[Services]()

_COUNT_SOFT = "update mailer.email_deliveries set soft_bounces = soft_bounces + 1, updated_at = now() where id = $1"
# The delivery's own recipient, whatever address the report gives: mail is forwarded.
_SUPPRESS = """
with bounced as (
    update mailer.email_deliveries set status = 'bounced', reply = $2, updated_at = now() where id = $1
    returning lower(recipient) as address)
insert into mailer.suppressions (address, reason) select address, $2 from bounced on conflict do nothing
"""


@bounce.handler(max_attempts=8, timeout=60)
async def handle_bounce(payload: HandleBounce, ctx: Context[Services]) -> None:
    """Hard: never mail the recipient again. Soft: count it. Once per bounce, however often this runs."""
    severities = {reports.severity(report) for report in payload.reports}
    severity = next((each for each in ("hard", "soft") if each in severities), None)
    if severity is None:
        return  # "delayed" is soft; "delivered", "relayed" and "expanded" are good news
    worst = next(report for report in payload.reports if reports.severity(report) == severity)
    said = f"{worst.status} {worst.diagnostic}".strip()[:1000]
    async with ctx.transaction() as pg:
        delivery = await _find(pg, payload)
        if delivery is None:
            ctx.log.warning("bounce_of_unknown_mail", source=payload.source)
            return
        event: events.Event = "hard_bounce" if severity == "hard" else "soft_bounce"
        if not await events.record(pg, ctx.services.app, delivery, event, payload.source):
            return
        if severity == "soft":
            await pg.execute(_COUNT_SOFT, delivery)
            return
        await pg.execute(_SUPPRESS, delivery, said)


async def _find(pg: Connection, payload: HandleBounce) -> UUID | None:
    """The delivery that came back."""
    found: UUID | None = await pg.fetchval(
        "select id from mailer.email_deliveries where id = $1 or message_id = $2 order by (id = $1) desc limit 1",
        payload.delivery_id,
        payload.message_id,
    )
    return found
