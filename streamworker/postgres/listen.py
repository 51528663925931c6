"""Hearing of commits: LISTEN on a connection of its own, past any pooler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import anyio
import asyncpg

from streamworker.postgres import dsn
from streamworker.postgres.enqueue import CHANNEL
from streamworker.postgres.errors import understood
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.relay")

RETRY: Final = 2.0
"""Seconds between tries to connect again; until then the relay polls."""
PROBE: Final = 30.0
"""Seconds after which a silent connection is asked whether it lives."""


async def listen(url: str, told: Callable[[str], None], hearing: Callable[[bool], None]) -> None:
    """Call ``told(message)`` for every notification. Never returns; cancel it.

    Args:
        url: where, past any connection pooler.
        told: gets the message.
        hearing: is told whether notifications come in.
    """
    said = False
    while True:
        try:
            connection = await connect(url, "relay, listening")
            try:
                gone = anyio.Event()
                connection.add_termination_listener(lambda _, gone=gone: gone.set())
                with understood("listening for jobs"):
                    await connection.add_listener(CHANNEL, lambda _c, _p, _n, message: told(str(message)))
                    hearing(True)
                    said = False
                    while not gone.is_set():
                        with anyio.move_on_after(PROBE):
                            await gone.wait()
                            break
                        await connection.execute("select 1", timeout=PROBE)
            finally:
                hearing(False)
                connection.terminate()
        except Exception as error:  # noqa: BLE001 - a hint that fails must not end the relay
            if not said:
                log.info("relay_deaf", error=str(error), hint="queued jobs are looked for twice a second meanwhile")
            said = True
        await anyio.sleep(RETRY)


Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

CONNECT_TIMEOUT: Final = 10.0
"""Seconds a connection may take to come about."""


async def connect(url: str, what: str) -> Connection:
    """One connection.

    Args:
        url: where.
        what: what it is for, shown by pg_stat_activity.

    Raises:
        Unreachable: no server answers.
        ConfigurationError: it refuses this user or this database.
    """
    options: dict[str, Any] = {"server_settings": {"application_name": f"streamworker {what}"}}
    with understood(f"connecting for {what}"):
        # No cached statements: the URL may lead through a pooler all the same.
        connection: Connection = await dsn.connect(url, timeout=CONNECT_TIMEOUT, statement_cache_size=0, **options)
        return connection
