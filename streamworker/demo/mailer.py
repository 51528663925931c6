"""The app of the demo: one job, which sends one mail. It is written as a user would write it.

``python -m streamworker.demo.mailer`` is one of its workers: what ``streamworker worker`` does, and it ends when its
parent does.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiosmtplib
import uvloop

from streamworker import App, Backoff, Context, Payload, QueueWorker, Settings
from streamworker.demo import script
from streamworker.telemetry.logs import configure

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


def _end_with_parent() -> None:
    """The parent holds the other end of our standard input and never writes to it."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read(): its lock would make the interpreter abort at its own end
    os._exit(1)  # no clean end: the servers are gone as well


def main() -> int:
    """Work until SIGTERM; returns the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = Settings.load()
    configure(settings.log_level, settings.log_format)
    worker = QueueWorker(app, redis=None, database=None, services=None, settings=settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(worker.run())


if __name__ == "__main__":
    sys.exit(main())
