"""What handlers share: made once per worker by the lifespan of `mailer.app`, typed as ``ctx.services``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import anyio
import asyncpg

from mailer.config import Config
from mailer.smtp import EmailService
from mailer.webhooks import WebhookClient
from streamworker import App

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything beside the database, which is ``ctx.database`` and ``ctx.transaction()``.

    Attributes:
        app: to enqueue what follows.
        readers: bounds how many messages are read at once: each takes a thread and up to 30 MB.
    """

    app: App[Any]
    config: Config
    email: EmailService
    webhooks: WebhookClient
    readers: anyio.CapacityLimiter
