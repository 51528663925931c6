"""redis-py's connections with one change: a task that writes can be cancelled.

redis-py bounds a write with ``asyncio.wait_for``, which on Python 3.11 forgets a cancellation that arrives just as what
it waits for ends (https://github.com/python/cpython/issues/86296): Ctrl-C is lost, a task that shall end goes on.
``asyncio.timeout`` forgets nothing, and needs no task for each write.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio as aioredis
from redis import exceptions as redis_errors


class _Bounded:
    """Bounds its writes by ``asyncio.timeout``."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        here: Any = self
        if not here.is_connected:
            await here.connect()
        limit = here.socket_timeout
        if limit is None:  # the hot path: `Wire` bounds the whole exchange
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
            return
        here.socket_timeout = None  # nobody else uses a connection meanwhile
        try:
            async with asyncio.timeout(limit):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except TimeoutError:
            raise redis_errors.TimeoutError("Timeout writing to socket") from None
        finally:
            here.socket_timeout = limit


class Connection(_Bounded, aioredis.Connection):
    """Over TCP."""


class SSLConnection(_Bounded, aioredis.SSLConnection):
    """Over TLS."""


class UnixDomainSocketConnection(_Bounded, aioredis.UnixDomainSocketConnection):
    """Over a socket of this machine."""
