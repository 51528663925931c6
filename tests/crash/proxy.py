"""A TCP proxy that misbehaves on demand: delays, truncates, drops single replies, resets, swallows everything."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from contextlib import suppress


class Proxy:
    """Stands between workers and a server. Its faults are attributes that may change at any moment.

    Attributes:
        delay: seconds every reply waits.
        truncate: the probability that a reply is cut in half and the connection closed.
        drop: the probability that a reply vanishes while the connection stays.
        reset: the probability that a connection is reset instead of answering.
        target: port of the server for new connections.
        hole: nothing goes through in either direction, and nobody is told.
    """

    def __init__(self, target: int, seed: int) -> None:
        self.target = target
        self._random = random.Random(seed)
        self._links: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.calm()

    def calm(self) -> None:
        """No faults; replies that are held go on."""
        self.delay = self.truncate = self.drop = self.reset = 0.0
        self.hole = False
        self._open.set()

    def swallow(self) -> None:
        """Become a black hole."""
        self.hole = True
        self._open.clear()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self.port

    async def close(self) -> None:
        self._server.close()
        self.reset_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset_all(self) -> int:
        """Reset every connection; returns how many there were."""
        links = list(self._links)
        for writer in links:
            _abort(writer)
        return len(links)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._links.add(writer)
        try:
            upstream, sink = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self._links.discard(writer)
            return _abort(writer)
        ways = [asyncio.create_task(self._pump(reader, sink)), asyncio.create_task(self._replies(upstream, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(writer)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            _abort(writer)
            sink.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                dice = self._random.random
                if dice() < self.drop:
                    continue
                if dice() < self.reset:
                    return
                if dice() < self.truncate:
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    return
                writer.write(data)
                await writer.drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, AttributeError):
        # Linger of 0 s: the peer gets RST, as from a host that lost power and came back.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
