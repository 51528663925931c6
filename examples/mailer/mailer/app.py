"""The app: ``streamworker worker mailer.app:app``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from mailer.config import Config
from mailer.handlers.analytics import analytics
from mailer.handlers.bounce import bounce
from mailer.handlers.processing import processing
from mailer.handlers.sending import sending
from mailer.handlers.warmup import warmup
from mailer.handlers.webhook import webhook
from mailer.services import Services
from mailer.smtp import EmailService
from mailer.webhooks import WebhookClient
from streamworker import App


@asynccontextmanager
async def lifespan() -> AsyncIterator[Services]:
    """Entered once per worker, left when it stops."""
    config = Config.load()
    email = EmailService(config.smtp, connections=config.connections)
    try:
        yield Services(
            app=app,
            config=config,
            email=email,
            webhooks=WebhookClient(allowed=config.webhook_networks),
            readers=anyio.CapacityLimiter(4),
        )
    finally:
        await email.close()


app = App(lifespan=lifespan)
# In this order workers take from the queues: what suppresses an address comes before what would mail it, and a campaign
# of a million comes last.
app.include(bounce, processing, webhook, warmup, analytics, sending)
