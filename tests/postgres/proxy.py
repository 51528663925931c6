"""A wire to PostgreSQL that can be cut at a word: before it gets through, or before its answer does."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit


class CuttingProxy:
    """Listens on TCP, and speaks to the server's Unix socket."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        self._socket = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
        self._user, self._path = parts.username, parts.path
        self._word: bytes | None = None
        self._after = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"postgresql://{self._user}@127.0.0.1:{port}{self._path}?sslmode=disable"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, word: bytes, *, after: bool) -> None:
        """Cut the next connection whose client says ``word``; ``after`` the server has heard it."""
        self._word, self._after = word, after

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket)
        deaf, answered = asyncio.Event(), asyncio.Event()
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)

        async def up() -> None:
            while data := await reader.read(65536):
                if self._word is not None and self._word in data:
                    self._word = None
                    self.cuts += 1
                    deaf.set()
                    if self._after:
                        back.write(data)
                        await back.drain()
                        await answered.wait()
                    break
                back.write(data)
                await back.drain()

        async def down() -> None:
            while not deaf.is_set() and (data := await there.read(65536)):
                if deaf.is_set():
                    answered.set()  # so it has done it
                    break
                writer.write(data)
                await writer.drain()

        downward = asyncio.create_task(down())
        try:
            await up()
        finally:
            downward.cancel()
            writer.transport.abort()
            back.transport.abort()
            self._tasks.discard(task)
