"""Serving the dashboard by itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import anyio
import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from streamworker.app import App
from streamworker.errors import ConfigurationError, UsageError
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger
from streamworker.web.security import Access
from streamworker.web.site import Site
from streamworker.worker import signals

log = get_logger("streamworker.web")

REQUEST: Final = 10.0
"""Seconds in which a connection has to send a request's head."""
CONNECTIONS: Final = 500
"""Connections at once, those that have not asked included."""
GRACE: Final = 1
"""Seconds open streams of events may take to end."""


class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, which does not wait for ever for a request: silent connections would pile up."""

    def connection_made(self, transport: Any) -> None:
        """One more; beyond `CONNECTIONS` the oldest that has not asked gives way."""
        super().connection_made(transport)
        self.since = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = self.loop.call_later(REQUEST, self._late)
        if len(self.connections) > CONNECTIONS:
            silent = [each for each in self.connections if each.silent]
            if silent:
                min(silent, key=lambda each: each.since).transport.abort()

    def data_received(self, data: bytes) -> None:
        """A further request of a connection has its time, too."""
        super().data_received(data)
        if self._deadline is None and self.timeout_keep_alive_task is None and self.silent:
            self._deadline = self.loop.call_later(REQUEST, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Without a connection there is nothing to be late for."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    @property
    def silent(self) -> bool:
        """No request of it is being answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _late(self) -> None:
        self._deadline = None
        if self.silent and self.timeout_keep_alive_task is None:
            self.transport.abort()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would end the process with them."""
        yield


def serve(app: App[Any], settings: Settings, access: Access, listen: str) -> int:
    """Serve until SIGINT or SIGTERM.

    Args:
        app: whose server is shown.
        settings: where that is.
        access: who may see and do what.
        listen: host:port.

    Raises:
        ConfigurationError: the address cannot be listened on, or others could reach it without a password.
        UsageError: it is no address.
        Unreachable: no Redis answers.
    """
    host, port = _address(listen)
    site = Site(app, settings, access.for_bind(host))
    with _listening(host, port) as listener:
        anyio.run(_serve, site, listener)
    return 0


async def _serve(site: Site, listener: socket.socket) -> None:
    await site.monitor.operator()  # a wrong REDIS_URL is said here, not to the first who looks
    config = uvicorn.Config(
        site,
        http=PatientProtocol,
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE,
    )
    server = _Server(config)
    host, port = listener.getsockname()[:2]
    log.info("dashboard_ready", url=f"http://{f'[{host}]' if ':' in host else host}:{port}/", read_only=site.read_only)
    async with anyio.create_task_group() as group:

        def stop(_number: int) -> None:
            server.force_exit = server.should_exit
            server.should_exit = True
            site.monitor.leave()

        await group.start(signals.watch, stop)
        await server.serve(sockets=[listener])
        group.cancel_scope.cancel()


def _address(listen: str) -> tuple[str, int]:
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65_535:
        raise UsageError(f"--listen takes host:port, such as 127.0.0.1:8787, and not {listen!a}")
    return host.strip("[]") or "127.0.0.1", int(port)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigurationError(
            f"the dashboard cannot listen on {host}:{port} ({error.strerror or error}): choose another with --listen"
        ) from None
    with listener:
        yield listener
