"""What happened to deliveries, written down once, and told to whoever wants to know."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias
from uuid import UUID

from mailer.jobs import CallWebhook
from mailer.services import Connection
from streamworker import App

Event: TypeAlias = Literal["sent", "failed", "suppressed", "hard_bounce", "soft_bounce"]

_CALLS = """
insert into mailer.webhook_deliveries (webhook_id, event_id, body)
select webhook.id, event.id, json_build_object(
    'type', 'email.' || event.type,
    'timestamp', to_char(event.at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
    'data', json_build_object(
      'delivery_id', delivery.id, 'campaign_id', delivery.campaign_id, 'recipient', delivery.recipient,
      'message_id', delivery.message_id, 'reply', delivery.reply))::text
from mailer.email_events event
join mailer.email_deliveries delivery on delivery.id = event.delivery_id
join mailer.webhooks webhook on webhook.active and event.type = any(webhook.events)
where event.id = $1
returning id
"""


async def record(pg: Connection, app: App[Any], delivery_id: UUID, event: Event, source: str = "") -> bool:
    """Record an event and enqueue its webhooks; returns whether it was new.

    Args:
        pg: a connection in a transaction: event, webhooks and whatever else it holds commit together.
        app: enqueues.
        delivery_id: whose event.
        event: its type.
        source: tells events of one type apart.
    """
    event_id = await pg.fetchval(
        "insert into mailer.email_events (delivery_id, campaign_id, type, source)"
        " select id, campaign_id, $2, $3 from mailer.email_deliveries where id = $1"
        " on conflict do nothing returning id",
        delivery_id,
        event,
        source,
    )
    if event_id is None:
        return False
    calls = [CallWebhook(webhook_delivery_id=row["id"]) for row in await pg.fetch(_CALLS, event_id)]
    if calls:
        await app.enqueue_many(calls, connection=pg)
    return True
