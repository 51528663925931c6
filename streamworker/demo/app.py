"""The app of the demo: one job, which sends one mail. It is written as a user would write it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiosmtplib

from streamworker import App, Backoff, Context, Payload
from streamworker.demo import script

SMTP_PORT: Final = "DEMO_SMTP_PORT"
"""The environment variable that tells the workers where mail goes."""


class SendWelcome(Payload, kind=script.KIND, queue=script.QUEUE):
    """Welcome one new customer."""

    number: int
    to: str


class EmailService:
    """A few SMTP connections that all jobs of a worker share.

    Args:
        port: the SMTP server's, on this machine.
        connections: how many at most.
    """

    def __init__(self, port: int, connections: int) -> None:
        self._idle: asyncio.LifoQueue[aiosmtplib.SMTP] = asyncio.LifoQueue()
        self._all = [
            aiosmtplib.SMTP(hostname="127.0.0.1", port=port, use_tls=False, start_tls=False) for _ in range(connections)
        ]
        for client in self._all:
            self._idle.put_nowait(client)

    async def send(self, to: str, subject: str, text: str) -> None:
        """Send one mail.

        Args:
            to: the recipient.
            subject: one line.
            text: the body.

        Raises:
            aiosmtplib.SMTPException: the server did not take it.
        """
        message = f"From: shop@example.com\nTo: {to}\nSubject: {subject}\n\n{text}\n"
        client = await self._idle.get()
        try:
            if not client.is_connected:
                await client.connect()
            await client.sendmail("shop@example.com", [to], message)
        except BaseException:
            client.close()  # half a dialogue cannot be continued by the next job
            raise
        finally:
            self._idle.put_nowait(client)

    def close(self) -> None:
        """Close all connections."""
        for client in self._all:
            client.close()


@asynccontextmanager
async def lifespan() -> AsyncIterator[EmailService]:
    """Entered once per worker; what it yields is ``ctx.services``."""
    service = EmailService(int(os.environ[SMTP_PORT]), script.CONNECTIONS)
    try:
        yield service
    finally:
        service.close()


app = App(lifespan=lifespan)


@app.handler(max_attempts=script.MAX_ATTEMPTS, timeout=30, backoff=Backoff(base=0.25, cap=1))
async def send_welcome(payload: SendWelcome, ctx: Context[EmailService]) -> None:
    """Send the mail, except where the script wants a failure."""
    if script.fails(payload.number, ctx.attempt):
        raise ConnectionError("the mail provider had a bad moment, as the script wants it")
    await ctx.services.send(payload.to, "Welcome", f"You are customer number {payload.number}.")
