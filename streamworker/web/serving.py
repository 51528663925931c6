"""Serving the dashboard by itself."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import anyio
import uvicorn

from streamworker import signals
from streamworker.app import App
from streamworker.errors import ConfigurationError, UsageError
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger
from streamworker.web.access import Access
from streamworker.web.site import Site

log = get_logger("streamworker.web")

GRACE: Final = 1
"""Seconds open streams of events may take to end."""


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
        ConfigurationError: the address cannot be listened on, or others could reach it and nobody would be asked.
        UsageError: it is no address.
        Unreachable: no Redis answers.
    """
    host, port = _address(listen)
    site = Site(app, settings, access.for_bind(host))
    with _listening(host, port) as door:
        anyio.run(_serve, site, door)
    return 0


async def _serve(site: Site, door: socket.socket) -> None:
    await site.room.operator()  # a wrong REDIS_URL is said here, not to the first who looks
    config = uvicorn.Config(
        site,
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
    host, port = door.getsockname()[:2]
    log.info("dashboard_ready", url=f"http://{f'[{host}]' if ':' in host else host}:{port}/", read_only=site.read_only)
    async with anyio.create_task_group() as group:

        def stop(_number: int) -> None:
            server.force_exit = server.should_exit
            server.should_exit = True

        await group.start(signals.watch, stop)
        await server.serve(sockets=[door])
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
        door = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigurationError(
            f"the dashboard cannot listen on {host}:{port} ({error.strerror or error}): choose another with --listen"
        ) from None
    with door:
        yield door
