"""The app of compose.yaml: one job sends one mail. Its services are a few SMTP connections that all jobs share."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import EmailMessage

import aiosmtplib
import anyio

from streamworker import App, Backoff, Context, Payload


class SendWelcome(Payload, kind="welcome.send", queue="mail"):
    """Welcome one new customer.

    Attributes:
        to: the address.
        seconds: how long the mail provider takes; the one in compose.yaml takes no time.
    """

    to: str
    seconds: float = 0.0


class Mail:
    """SMTP connections that are made when first needed and used again.

    Args:
        host: the SMTP server.
        port: its port.
        connections: how many at most.
    """

    def __init__(self, host: str, port: int, connections: int) -> None:
        self._idle: asyncio.LifoQueue[aiosmtplib.SMTP] = asyncio.LifoQueue()
        for _ in range(connections):
            self._idle.put_nowait(aiosmtplib.SMTP(hostname=host, port=port, use_tls=False, start_tls=False))

    async def send(self, message: EmailMessage) -> None:
        """Send one message.

        Args:
            message: with From and To.

        Raises:
            aiosmtplib.SMTPException: the server did not take it.
        """
        client = await self._idle.get()
        try:
            if not client.is_connected:
                await client.connect()
            await client.send_message(message)
        except BaseException:
            client.close()  # half a dialogue cannot be continued by the next job
            raise
        finally:
            self._idle.put_nowait(client)

    def close(self) -> None:
        """Close the idle connections; a worker that drained has no others."""
        while not self._idle.empty():
            self._idle.get_nowait().close()


@asynccontextmanager
async def lifespan() -> AsyncIterator[Mail]:
    """Entered once per worker; what it yields is ``ctx.services``."""
    mail = Mail(os.environ.get("SMTP_HOST", "localhost"), int(os.environ.get("SMTP_PORT", "1025")), connections=5)
    try:
        yield mail
    finally:
        mail.close()


app = App(lifespan=lifespan)


@app.handler(max_attempts=8, timeout=30, backoff=Backoff(base=0.5, cap=60))
async def send_welcome(payload: SendWelcome, ctx: Context[Mail]) -> None:
    """Send the mail. A worker that dies between the server's answer and ours sends it again: same job, same id."""
    await anyio.sleep(payload.seconds)
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "shop@example.com", payload.to, "Welcome"
    message["Message-ID"] = f"<{ctx.job.id}@shop.example.com>"
    message.set_content("Good to have you with us.")
    await ctx.services.send(message)
