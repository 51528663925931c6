"""The jobs: what is asked for, and in which queue it waits. Producers need this file and nothing else."""

from __future__ import annotations

from uuid import UUID

import msgspec

from streamworker import Payload


class SendEmail(Payload, kind="email.send", queue="email-sending"):
    """Send one delivery: a row of ``email_deliveries``."""

    delivery_id: UUID


class ProcessIncoming(Payload, kind="email.process", queue="email:processing"):
    """Take in one message. Its bytes lie in ``email_content``: a job holds 256 KiB at most, a message does not."""

    content_id: UUID
    mailbox: str


class Report(msgspec.Struct, frozen=True):
    """What a bounce says of one recipient.

    Attributes:
        recipient: the address that was not reached, as the reporter writes it.
        status: enhanced status code (RFC 3463), such as ``5.1.1``; empty if the report has none.
        action: ``failed``, ``delayed``, ``delivered``, ``relayed`` or ``expanded`` (RFC 3464).
        diagnostic: the reporter's own words, shortened.
    """

    recipient: str
    status: str
    action: str
    diagnostic: str


class HandleBounce(Payload, kind="email.bounce", queue="bounce"):
    """Mail came back.

    Attributes:
        source: what reported it, such as the id of an incoming message; one source counts once per delivery.
        delivery_id: from the address the bounce came to, which only we and those who got the mail know.
        message_id: the Message-ID of the mail that came back, if the bounce quotes it.
        reports: one per recipient.
    """

    source: str
    delivery_id: UUID | None
    message_id: str | None
    reports: list[Report]


class WarmupOutbound(Payload, kind="warmup.outbound", queue="warmup"):
    """Day N of a warm-up: mail the seeds."""

    warmup_id: UUID
    day: int


class WarmupInbound(Payload, kind="warmup.inbound", queue="warmup"):
    """Day N of a warm-up: see what arrived at the seeds."""

    warmup_id: UUID
    day: int


class WarmupEngagement(Payload, kind="warmup.engagement", queue="warmup"):
    """Day N of a warm-up: answer some of it."""

    warmup_id: UUID
    day: int


class CountEvents(Payload, kind="analytics.count", queue="analytics"):
    """Add new events to the daily metrics of their campaigns.

    Attributes:
        every: seconds until the next count, which this one schedules; ``None`` for this time only.
    """

    every: float | None = None


class CallWebhook(Payload, kind="webhook.call", queue="webhook"):
    """Tell one receiver about one event: a row of ``webhook_deliveries``."""

    webhook_delivery_id: UUID
