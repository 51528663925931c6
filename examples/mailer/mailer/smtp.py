"""The email service: a few SMTP connections that all jobs of a worker share.

What matters about a mail that was not sent is what may be done next, so there are three errors:

- `Refused`: the server will never take this mail. Trying again is spam.
- `NotNow`: the server did not take it. Trying again later is right, and sends it once.
- `Unknown`: the server had the whole mail, and its answer was lost. Trying again may send it twice, not trying again
  may lose it; SMTP has no third way. Repeats carry the same Message-ID, by which receivers may drop them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Final, TypeAlias

import aiosmtplib
from aiosmtplib import (
    SMTPException,
    SMTPReadTimeoutError,
    SMTPResponseException,
    SMTPServerDisconnected,
    SMTPTimeoutError,
)

from mailer.config import Smtp

# Said in answer to MAIL: about our credentials and not about the mail. An operator will put it right.
_OURS: Final = frozenset({530, 534, 535, 538})

Send: TypeAlias = Callable[[str, str, bytes], Awaitable[str]]


class SmtpError(Exception):
    """A mail was not sent, or not for certain.

    Attributes:
        reply: what the server said, such as ``550 5.1.1 no such user``, or what went wrong before it could.
    """

    def __init__(self, reply: str) -> None:
        super().__init__(reply)
        self.reply = reply[:1000]


class Refused(SmtpError):
    """5xx to this sender, recipient or message."""


class NotNow(SmtpError):
    """4xx, or the connection failed before the server had the mail."""


class Unknown(SmtpError):
    """The connection failed between the mail and the server's answer."""


@dataclass(eq=False)
class _Connection:
    client: aiosmtplib.SMTP
    mails: int = 0
    idle_since: float = 0.0


class EmailService:
    """Sends mails over a bounded number of connections, each reused for many mails.

    Args:
        smtp: the server.
        connections: how many at most.
        mails_per_connection: after that many a connection is replaced; servers limit this, and balance by it.
        idle: seconds after which an unused connection is not trusted any more.
        timeout: seconds to wait for each answer.
    """

    def __init__(
        self,
        smtp: Smtp,
        *,
        connections: int = 10,
        mails_per_connection: int = 100,
        idle: float = 30,
        timeout: float = 30,
    ) -> None:
        self._smtp = smtp
        self._context = smtp.context()
        self._turns = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []
        self._mails_per_connection = mails_per_connection
        self._longest_idle = idle
        self._timeout = timeout

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Send]:
        """Wait until a connection is free; yields what sends one mail over it.

        Whoever has to note that a mail is about to go out does it in here: before, the mail may wait behind others for
        as long as a slow server likes.
        """
        async with self._turns:
            yield self._send

    async def send(self, sender: str, recipient: str, message: bytes) -> str:
        """Send one mail to one recipient; returns what the server said when it took it.

        Args:
            sender: the envelope's sender, where bounces go.
            recipient: the envelope's recipient.
            message: the whole message.

        Raises:
            Refused: the server will never take it.
            NotNow: the server did not take it.
            Unknown: the server may have taken it.
        """
        async with self.turn() as send:
            return await send(sender, recipient, message)

    async def _send(self, sender: str, recipient: str, message: bytes) -> str:
        connection = self._take()
        try:
            return await self._converse(connection, sender, recipient, message)
        except BaseException:
            # Half a dialogue cannot be continued by the next job; cancellation ends up here too.
            connection.client.close()
            raise
        finally:
            self._put(connection)

    async def close(self) -> None:
        """Say goodbye on all idle connections."""
        for connection in self._idle:
            with suppress(SMTPException, OSError):
                await connection.client.quit(timeout=2)
            connection.client.close()
        self._idle.clear()

    async def _converse(self, connection: _Connection, sender: str, recipient: str, message: bytes) -> str:
        client = connection.client
        await self._begin(connection, sender)
        try:
            await client.rcpt(recipient)
        except SMTPResponseException as error:
            raise _judged(error) from error
        except (SMTPException, OSError) as error:
            raise NotNow(_said(error)) from error
        try:
            response = await client.data(message)
        except SMTPResponseException as error:
            raise _judged(error) from error
        except (SMTPServerDisconnected, SMTPReadTimeoutError, SMTPTimeoutError, OSError) as error:
            raise Unknown(_said(error)) from error
        connection.mails += 1
        return f"{response.code} {response.message}"

    async def _begin(self, connection: _Connection, sender: str) -> None:
        """MAIL FROM, on a connection that is open; a reused one that turns out to be dead is replaced, once."""
        client = connection.client
        reused = client.is_connected
        try:
            if not reused:
                connection.mails = 0
                await client.connect()
        except (SMTPException, OSError) as error:  # greeting, TLS, login: nothing was said about this mail
            raise NotNow(f"cannot reach the mail server: {_said(error)}") from error
        try:
            await client.mail(sender)
        except SMTPResponseException as error:
            if reused and error.code == 421:  # "I have waited long enough"
                client.close()
                return await self._begin(connection, sender)
            raise _judged(error) from error
        except (SMTPException, OSError) as error:
            if reused:
                client.close()
                return await self._begin(connection, sender)
            raise NotNow(_said(error)) from error
        return None

    def _take(self) -> _Connection:
        """The connection that was used last, so that those nobody needs grow old."""
        while self._idle:
            connection = self._idle.pop()
            if connection.client.is_connected and monotonic() - connection.idle_since < self._longest_idle:
                return connection
            connection.client.close()
        smtp = self._smtp
        client = aiosmtplib.SMTP(
            hostname=smtp.host,
            port=smtp.port,
            username=smtp.username,
            password=smtp.password,
            use_tls=smtp.tls == "implicit",
            start_tls=smtp.tls == "starttls",  # None would mean "if the server offers it", which an attacker decides
            tls_context=self._context,
            timeout=self._timeout,
        )
        return _Connection(client)

    def _put(self, connection: _Connection) -> None:
        if connection.client.is_connected and connection.mails < self._mails_per_connection:
            connection.idle_since = monotonic()
            self._idle.append(connection)
        else:
            connection.client.close()


def _judged(error: SMTPResponseException) -> SmtpError:
    permanent = 500 <= error.code < 600 and error.code not in _OURS
    return (Refused if permanent else NotNow)(_said(error))


def _said(error: Exception) -> str:
    if isinstance(error, SMTPResponseException):
        return f"{error.code} {error.message}"
    return f"{type(error).__name__}: {error}"
