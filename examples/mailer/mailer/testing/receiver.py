"""A receiver of webhooks that answers as it is told."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Request:
    """What came in."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """A web server's face.

    Attributes:
        requests: everything that came in.
        answers: raw answers for the next requests; ``None`` never answers, ``b""`` closes; without any it is 204.
    """

    requests: list[Request] = field(default_factory=list)
    answers: deque[bytes | None] = field(default_factory=deque)
    port: int = 0
    connections: int = 0

    def answer(self, status: int, *headers: str, times: int = 1) -> None:
        """Answer the next requests with a status."""
        lines = "".join(f"{line}\r\n" for line in headers)
        self.answers.extend([f"HTTP/1.1 {status} Said\r\n{lines}Content-Length: 0\r\n\r\n".encode()] * times)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.requests.append(Request(head[0], headers, body))
            answer = self.answers.popleft() if self.answers else b"HTTP/1.1 204 No Content\r\n\r\n"
            if answer is None:
                await reader.read()  # until the other side gives up
            else:
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def listen(
    *, host: str = "127.0.0.1", port: int = 0, context: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """Run a receiver."""
    receiver = Receiver()
    server = await asyncio.start_server(receiver._serve, host, port, ssl=context)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
