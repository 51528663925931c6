"""Queue ``email:processing``: an incoming message is read, stored, and understood if it is a bounce.

Everything it writes, the jobs that follow and "this job is done" are one transaction. A message that comes twice (same
bytes, same mailbox) is stored once; the same Message-ID on other bytes is another message, or anybody could make mail
disappear by naming it first.
"""

from __future__ import annotations

from tempfile import TemporaryFile
from uuid import UUID

import anyio.to_thread

from mailer import content, incoming, reports
from mailer.incoming import Incoming
from mailer.jobs import HandleBounce, ProcessIncoming
from mailer.services import Connection, Services
from streamworker import Context, Discard, Handlers

processing = Handlers[Services]()

_INSERT = """ insert into mailer.email_messages (mailbox, raw_content_id, message_id, in_reply_to, subject, sender,
recipients, sent_at,
    spam, body_text, body_html, defects)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
on conflict (mailbox, raw_content_id) do nothing returning id
"""


@processing.handler(max_attempts=8, timeout=600)
async def process_incoming(payload: ProcessIncoming, ctx: Context[Services]) -> None:
    """Read the raw bytes, store what they hold."""
    async with content.spooled(ctx.database, payload.content_id) as raw:
        if raw is None:
            raise Discard("the raw message was deleted")
        with TemporaryFile() as scratch:
            found = await anyio.to_thread.run_sync(incoming.read, raw, scratch, limiter=ctx.services.readers)
            async with ctx.transaction() as pg:
                message_id = await _store(pg, payload, found)
                if message_id is not None:
                    await _follow_up(pg, ctx, message_id, found)


async def _store(pg: Connection, payload: ProcessIncoming, found: Incoming) -> UUID | None:
    """Write the message; ``None`` if it is there already."""
    message_id: UUID | None = await pg.fetchval(
        _INSERT,
        payload.mailbox,
        payload.content_id,
        found.message_id,
        found.in_reply_to,
        found.subject,
        found.sender,
        found.recipients,
        found.sent_at,
        found.spam,
        found.body_text,
        found.body_html,
        found.defects,
    )
    if message_id is None:
        return None
    # In the order of their hashes: two messages with the same attachments would otherwise wait for each other.
    contents = {}
    for attachment in sorted(found.attachments, key=lambda attachment: attachment.sha256):
        pieces = found.pieces(attachment)
        contents[attachment.sha256] = await content.store(pg, attachment.sha256, attachment.size, pieces)
    await pg.executemany(
        "insert into mailer.email_attachments (message_id, n, content_id, media_type, filename)"
        " values ($1, $2, $3, $4, $5)",
        [
            (message_id, number, contents[each.sha256], each.media_type, each.filename)
            for number, each in enumerate(found.attachments)
        ],
    )
    return message_id


async def _follow_up(pg: Connection, ctx: Context[Services], message_id: UUID, found: Incoming) -> None:
    said = reports.read(found)
    if not said:
        return
    job = HandleBounce(
        source=str(message_id),
        delivery_id=reports.own_delivery(found),
        message_id=reports.original_message_id(found),
        reports=said,
    )
    await ctx.services.app.enqueue(job, connection=pg)
