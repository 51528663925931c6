"""A campaign: its recipients and their jobs, in one transaction. It exists with all of them or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec

from mailer.jobs import SendEmail
from mailer.messages import BadAddress, address, message_id_for
from mailer.services import Connection
from mailer.templates import parse
from streamworker import App

_COLUMNS = ["id", "campaign_id", "template_id", "sender", "recipient", "variables", "message_id"]


class CampaignError(ValueError):
    """It cannot be started as asked; nothing was written."""


@dataclass
class Started:
    """What was started.

    Attributes:
        id: the campaign's.
        recipients: how many mails it is.
        left_out: lines of the list that are none, and why.
    """

    id: UUID
    recipients: int = 0
    left_out: list[str] = field(default_factory=list)


async def start(
    pg: Connection,
    app: App[Any],
    *,
    name: str,
    template: str,
    sender: str,
    domain: str,
    recipients: Iterable[Mapping[str, Any]],
) -> Started:
    """Write a campaign and enqueue its mails. The jobs run when this has committed.

    Args:
        pg: a connection that is in no transaction.
        app: enqueues.
        name: the campaign's; it can be started once.
        template: the name of its template.
        sender: the From address.
        domain: what its Message-IDs end with.
        recipients: one mapping each, with ``email``; everything else fills the template.

    Raises:
        CampaignError: the name is taken, or there is no such template.
        BadAddress: the sender is no address.
    """
    sender = address(sender)
    async with pg.transaction():
        template_id = await pg.fetchval("select id from mailer.email_templates where name = $1", template)
        if template_id is None:
            raise CampaignError(f"there is no template {template!r}: make it with `mailer template {template} …`")
        try:
            campaign_id = await pg.fetchval(
                "insert into mailer.campaigns (name, template_id, sender) values ($1, $2, $3) returning id",
                name,
                template_id,
                sender,
            )
        except asyncpg.UniqueViolationError:
            raise CampaignError(f"the campaign {name!r} was started before: take another name") from None
        started = Started(campaign_id)
        rows = []
        for recipient, variables in _checked(recipients, started.left_out):
            delivery_id = uuid4()
            message_id = message_id_for(delivery_id, domain)
            rows.append((delivery_id, campaign_id, template_id, sender, recipient, variables, message_id))
        started.recipients = len(rows)
        await pg.copy_records_to_table("email_deliveries", schema_name="mailer", columns=_COLUMNS, records=rows)
        await pg.execute("update mailer.campaigns set recipients = $2 where id = $1", campaign_id, len(rows))
        if rows:
            # Low: a campaign can wait, the password mail that somebody is waiting for cannot.
            jobs = (app.job(SendEmail(delivery_id=row[0]), priority="low") for row in rows)
            await app.enqueue_many(jobs, connection=pg)
    return started


async def put_template(pg: Connection, name: str, subject: str, text: str, html: str | None) -> None:
    """Create or replace a template.

    Raises:
        TemplateError: it is none; better said now than ten thousand times later.
    """
    for source in (subject, text, html or ""):
        parse(source)
    await pg.execute(
        "insert into mailer.email_templates (name, subject, body_text, body_html) values ($1, $2, $3, $4)"
        " on conflict (name) do update set subject = excluded.subject, body_text = excluded.body_text,"
        " body_html = excluded.body_html, updated_at = now()",
        name,
        subject,
        text,
        html,
    )


def _checked(recipients: Iterable[Mapping[str, Any]], left_out: list[str]) -> Iterable[tuple[str, str]]:
    """(address, variables as JSON), each address once."""
    seen = set()
    for number, row in enumerate(recipients, 1):
        try:
            recipient = address(str(row.get("email") or ""))
        except BadAddress as error:
            left_out.append(f"recipient {number}: {error}")
            continue
        if recipient.lower() in seen:
            left_out.append(f"recipient {number}: {recipient} is in the list twice")
            continue
        seen.add(recipient.lower())
        # A line with more fields than columns has them under no name; PostgreSQL's JSON knows no NUL.
        variables = {
            key: value.replace("\x00", "") if isinstance(value, str) else value
            for key, value in row.items()
            if key and key != "email"
        }
        yield recipient, msgspec.json.encode(variables).decode()
