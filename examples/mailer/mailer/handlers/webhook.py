"""Queue ``webhook``: tell a receiver what happened. At least once: receivers know a repeat by its ``webhook-id``."""

from __future__ import annotations

from uuid import UUID

from mailer.jobs import CallWebhook
from mailer.services import Services
from mailer.webhooks import Forbidden, NoAnswer
from streamworker import Backoff, Context, Discard, Handlers, Retry

webhook = Handlers[Services]()

_LOAD = """
select delivery.status, delivery.body, delivery.last_answer, webhook.url, webhook.secret, webhook.active, webhook.id
from mailer.webhook_deliveries delivery join mailer.webhooks webhook on webhook.id = delivery.webhook_id
where delivery.id = $1
"""
_NOTE = """
update mailer.webhook_deliveries set status = $2, last_answer = $3, attempts = attempts + 1, updated_at = now()
where id = $1 and status = 'waiting'
"""


@webhook.handler(max_attempts=10, timeout=60, backoff=Backoff(base=5, cap=3600))
async def call_webhook(payload: CallWebhook, ctx: Context[Services]) -> None:
    """POST it, and do by the answer."""
    row = await ctx.database.fetchrow(_LOAD, payload.webhook_delivery_id)
    if row is None:
        raise Discard("the webhook was deleted")
    if row["status"] == "delivered":
        return
    if row["status"] == "failed":
        raise Discard(row["last_answer"])
    if not row["active"]:
        await _give_up(ctx, payload, "the webhook is switched off")
    try:
        message_id = str(payload.webhook_delivery_id)
        answer = await ctx.services.webhooks.post(row["url"], row["secret"], message_id, row["body"].encode())
    except Forbidden as error:
        await _give_up(ctx, payload, str(error))
    except NoAnswer as error:
        await _try_again(ctx, payload, str(error))
    else:
        said = f"HTTP {answer.status}"
        match answer.verdict:
            case "delivered":
                async with ctx.transaction() as pg:
                    await pg.execute(_NOTE, payload.webhook_delivery_id, "delivered", said)
            case "again":
                await _try_again(ctx, payload, said, answer.retry_after)
            case "gone":
                await _switch_off(ctx, row["id"], said)
                await _give_up(ctx, payload, said)
            case "never":
                await _give_up(ctx, payload, said)


async def _try_again(ctx: Context[Services], payload: CallWebhook, said: str, after: float | None = None) -> None:
    status = "failed" if ctx.last_attempt else "waiting"
    await ctx.database.execute(_NOTE, payload.webhook_delivery_id, status, said)
    raise Retry(after, said)


async def _give_up(ctx: Context[Services], payload: CallWebhook, said: str) -> None:
    await ctx.database.execute(_NOTE, payload.webhook_delivery_id, "failed", said)
    raise Discard(said)


async def _switch_off(ctx: Context[Services], webhook_id: UUID, said: str) -> None:
    """410: the receiver wants no more of it, ever."""
    off = "update mailer.webhooks set active = false, disabled_because = $2 where id = $1"
    await ctx.database.execute(off, webhook_id, said)
