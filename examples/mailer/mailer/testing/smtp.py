"""An SMTP server that takes everything and delivers nothing, and misbehaves for the recipients it is told to.

Tests start it in their own event loop; ``python -m mailer sink`` runs it for the quick start.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from time import monotonic
from typing import Any, Literal, TypeAlias

from aiosmtpd.smtp import SMTP, AuthResult

Moment: TypeAlias = Literal["rcpt", "data", "drop-before", "drop-after", "hang-after"]


@dataclass
class Received:
    """One mail that the server has taken."""

    sender: str
    recipient: str
    message: Message
    connection: int
    at: float


@dataclass
class Sink:
    """What the server got, and what it shall do.

    Attributes:
        mails: everything it said 250 to, in order, and what it took without being able to say so (``drop-after``).
        connections: how many were opened.
        attempts: RCPT commands by recipient.
        gate: while it is clear, the answer to DATA waits.
        waiting: set when a mail has reached the gate.
        open: the connections, to be cut.
    """

    mails: list[Received] = field(default_factory=list)
    connections: int = 0
    attempts: Counter[str] = field(default_factory=Counter)
    port: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    open: set[asyncio.Transport] = field(default_factory=set)
    _script: defaultdict[str, deque[tuple[Moment, str]]] = field(default_factory=lambda: defaultdict(deque))

    def __post_init__(self) -> None:
        self.gate.set()

    def misbehave(self, recipient: str, moment: Moment, reply: str = "", times: int = 1) -> None:
        """The next ``times`` mails to ``recipient`` get this.

        ``rcpt`` and ``data`` answer with ``reply``; ``drop-before`` closes the connection instead of taking the
        mail, ``drop-after`` takes it and closes without a word, ``hang-after`` takes it and never answers.
        """
        self._script[recipient].extend((moment, reply) for _ in range(times))

    def arrived(self, recipient: str) -> list[Received]:
        """The mails to one recipient."""
        return [mail for mail in self.mails if mail.recipient == recipient]

    # -- aiosmtpd's hooks

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's words
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: list[str]
    ) -> str:
        self.attempts[address] += 1
        moment, reply = self._script[address][0] if self._script[address] else ("", "")
        if moment == "rcpt":
            self._script[address].popleft()
            return reply
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        (recipient,) = envelope.rcpt_tos
        script = self._script[recipient]
        moment, reply = script.popleft() if script else ("", "")
        if moment == "drop-before":
            server.transport.abort()
            return "250 nobody hears this"
        if moment == "data":
            return reply
        message = message_from_bytes(envelope.original_content)
        self.mails.append(Received(envelope.mail_from, recipient, message, session.number, monotonic()))
        if moment == "drop-after":
            server.transport.abort()
        if moment == "hang-after":
            await asyncio.Event().wait()
        self.waiting.set()
        await self.gate.wait()
        return "250 2.0.0 taken"


class _Server(SMTP):
    def __init__(self, sink: Sink, **options: Any) -> None:
        super().__init__(sink, hostname="localhost", ident="sink", **options)
        self._sink = sink

    def connection_made(self, transport: Any) -> None:
        first = self.session is None  # STARTTLS makes it twice on one connection
        super().connection_made(transport)
        self._sink.connections += first
        session: Any = self.session
        session.number = self._sink.connections
        self._sink.open.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._sink.open = {transport for transport in self._sink.open if not transport.is_closing()}


@asynccontextmanager
async def serve(
    *,
    context: ssl.SSLContext | None = None,
    starttls: bool = False,
    password: str | None = None,
    port: int = 0,
) -> AsyncIterator[Sink]:
    """Run the server on 127.0.0.1.

    Args:
        context: its certificate; with it the server speaks TLS from the first byte, or after STARTTLS.
        starttls: TLS after STARTTLS, which it then requires.
        password: what AUTH must bring; without it nobody has to log in.
        port: 0 for any that is free.
    """

    def authenticate(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        return AuthResult(success=data.password == (password or "").encode(), handled=False)

    sink = Sink()
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {"loop": loop}
    if starttls:
        options |= {"tls_context": context, "require_starttls": True}
    if password is not None:
        options |= {"authenticator": authenticate, "auth_required": True, "auth_require_tls": starttls}
    server = await loop.create_server(
        lambda: _Server(sink, **options), "127.0.0.1", port, ssl=None if starttls else context
    )
    sink.port = server.sockets[0].getsockname()[1]
    try:
        yield sink
    finally:
        server.close()
        for connection in sink.open:
            with suppress(AttributeError):  # over TLS, Python 3.11.2 does not expect that the other side was faster
                connection.abort()
        await asyncio.sleep(0)  # what was aborted is told so
