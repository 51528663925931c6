"""A small HTTP server in a thread of its own, for probes: it answers while a handler blocks the worker's event loop.

Only the standard library, only GET, one answer a connection. What it serves is a mapping of paths to async functions,
which run on the thread's own event loop and must not touch the worker's.

Strangers in the network must not keep a probe from its answer, for then a restart would follow: silent and half-sent
requests give way to new ones, those of the address that has the most of them first.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeAlias

from streamworker.errors import ConfigurationError
from streamworker.settings import Address
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.http")

PATIENCE: Final = 5.0
"""Seconds one connection may take, from its first byte to our last."""
CONNECTIONS: Final = 100
"""Connections at once; one more takes the place of the oldest that has not sent its request."""
HAND_OVER: Final = 1.0
"""Seconds for requests that are there when another process takes the address over."""
TURNS: Final = 0.02
"""Seconds in which a connection that was just accepted is served."""
HEAD: Final = 8192
"""Bytes of a request's head."""
_PHRASES: Final = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Error"}


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    content_type: str = "application/json"


Route: TypeAlias = Callable[[str], Awaitable[Answer]]
"""Answers a request; its argument is the query string, percent-encoded as it was sent."""
Task: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class _Peer:
    """One connection.

    Args:
        host: the other end.
        writer: to it.
    """

    __slots__ = ("asked", "host", "writer")

    def __init__(self, host: str, writer: asyncio.StreamWriter) -> None:
        self.host = host
        self.writer = writer
        self.asked = False
        """Its request is complete."""


def listen(address: Address) -> socket.socket:
    """A socket that listens.

    Args:
        address: where; port 0 takes any free one.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    try:
        family, *_, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family)
    except OSError as error:
        raise ConfigurationError(
            f"STREAMWORKER_HTTP={address} cannot be listened on ({error.strerror or error}): "
            "choose another host:port, port 0 for any free one, or off"
        ) from None


class HttpThread:
    """Serves ``routes`` from `open` to `close`.

    Args:
        address: where to listen; port 0 takes any free one.
        routes: path to what answers it.
        tasks: run on the thread's loop as long as it serves.
        listener: a socket that listens there, shared with other processes; ``None`` makes one.
    """

    def __init__(
        self,
        address: Address,
        routes: Mapping[str, Route],
        tasks: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
        listener: socket.socket | None = None,
    ) -> None:
        self._address = address
        self._routes = routes
        self._tasks = tasks
        self._open: dict[asyncio.Task[Any], _Peer] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._listener = listener
        self._server: asyncio.Server | None = None
        self.port = 0

    def open(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: the address cannot be listened on.
        """
        self._listener = listener = self._listener or listen(self._address)
        self.port = listener.getsockname()[1]
        self._loop = loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, args=(loop, listener), name="streamworker-http", daemon=True)
        self._thread.start()
        log.info("http_listening", address=str(Address(self._address.host, self.port)), paths=sorted(self._routes))

    async def hand_over(self) -> None:
        """Accept no more connections, and answer those that are there, for `HAND_OVER` seconds at most."""
        if self._thread is not None and self._loop is not None:
            done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._accept_no_more(), self._loop))
            await asyncio.wait([done], timeout=2 * HAND_OVER)

    async def _accept_no_more(self) -> None:
        # Not `Server.close` yet: it resets connections that are accepted and have no transport so far.
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
        await asyncio.sleep(TURNS)
        if self._server is not None:
            self._server.close()
        if self._open:
            await asyncio.wait(list(self._open), timeout=HAND_OVER)

    def close(self) -> None:
        """Stop listening; open connections are cut. May be called without `open`."""
        if self._thread is not None and self._loop is not None:
            with suppress(RuntimeError):  # the loop ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(PATIENCE)
            self._thread = None

    def close_in_forked_child(self) -> None:
        """Let go of the port: a child that outlives a killed worker would keep its successor from listening."""
        if self._listener is not None:
            self._listener.close()

    def _main(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        if hasattr(signal, "pthread_sigmask"):  # the main thread is to hear them
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        self._server = server = await asyncio.start_server(self._connected, sock=listener, limit=HEAD)
        tasks = [asyncio.create_task(task()) for task in self._tasks]
        await self._stop.wait()
        server.close()
        for task in tasks:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise AssertionError("asyncio runs this in a task")
        if len(self._open) >= CONNECTIONS:
            self._drop_oldest()
        self._open[task] = peer = _Peer(str((writer.get_extra_info("peername") or ("",))[0]), writer)
        try:
            async with asyncio.timeout(PATIENCE):
                await self._answer(reader, writer, peer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the client has gone, never finished asking, or gave way; or we end
        finally:
            self._open.pop(task, None)
            writer.close()

    def _drop_oldest(self) -> None:
        """Cut off the oldest connection of the address that has the most, one that still has to ask if there is any."""
        silent = {task: peer for task, peer in self._open.items() if not peer.asked}
        candidates = silent or self._open
        [(busiest, _)] = Counter(peer.host for peer in candidates.values()).most_common(1)
        task = next(task for task, peer in candidates.items() if peer.host == busiest)
        self._open.pop(task).writer.transport.abort()
        task.cancel()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: _Peer) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            head = b""
        peer.asked = True
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            method, answer = b"", Answer(400, b'{"ok":false,"why":"this is no HTTP request"}\n')
        else:
            path, _, query = words[1].decode("latin-1").partition("?")
            method, answer = words[0], await self._look_up(words[0], path, query)
        phrase = _PHRASES.get(answer.status, "Service Unavailable")
        lines = [
            f"HTTP/1.1 {answer.status} {phrase}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(answer.body)}",
            "Cache-Control: no-store",
            "Connection: close",
            *(["Allow: GET, HEAD"] if answer.status == 405 else []),
        ]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == b"HEAD" else answer.body))
        with suppress(OSError):
            await writer.drain()

    async def _look_up(self, method: bytes, path: str, query: str) -> Answer:
        route = self._routes.get(path)
        if route is None:
            there = ", ".join(sorted(self._routes))
            return Answer(404, f'{{"ok":false,"why":"there is only {there}"}}\n'.encode())
        if method not in (b"GET", b"HEAD"):
            return Answer(405, b'{"ok":false,"why":"only GET is served"}\n')
        try:
            return await route(query)
        except Exception as error:
            log.error("http_failed", path=path, error=str(error), type=type(error).__name__)
            log.debug("http_failed_traceback", exc_info=error)
            return Answer(500, b'{"ok":false,"why":"an error of ours, see the log"}\n')
