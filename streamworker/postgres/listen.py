"""LISTEN on a connection of its own, past any pooler: notifications of commits and of changed queues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import anyio
import asyncpg

from streamworker.postgres import dsn
from streamworker.postgres.enqueue import CHANNEL
from streamworker.postgres.sqlstate import understood
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.relay")

RETRY: Final = 2.0
"""Seconds between tries to connect again; meanwhile the relay polls."""
PROBE: Final = 30.0
"""Seconds after which a silent connection is probed."""


async def listen(url: str, on_message: Callable[[str], None], on_state: Callable[[bool], None]) -> None:
    """Call ``on_message`` for every notification. Never returns; cancel it.

    Args:
        url: of the database, past any connection pooler.
        on_message: called with the message.
        on_state: called with whether notifications arrive, when that changes.
    """
    logged = False
    while True:
        try:
            connection = await connect(url, "relay, listening")
            try:
                gone = anyio.Event()
                connection.add_termination_listener(lambda _, gone=gone: gone.set())
                with understood("listening for jobs"):
                    await connection.add_listener(CHANNEL, lambda _c, _p, _n, message: on_message(str(message)))
                    on_state(True)
                    logged = False
                    while not gone.is_set():
                        with anyio.move_on_after(PROBE):
                            await gone.wait()
                            break
                        await connection.execute("select 1", timeout=PROBE)
            finally:
                on_state(False)
                connection.terminate()
        except Exception as error:  # noqa: BLE001 - a hint that fails must not end the relay
            if not logged:
                log.info("listen_lost", error=str(error), hint="queued jobs are looked for twice a second meanwhile")
            logged = True
        await anyio.sleep(RETRY)


Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

CONNECT_TIMEOUT: Final = 10.0
"""Seconds a connection may take to be made."""


async def connect(url: str, what: str) -> Connection:
    """One connection.

    Args:
        url: of the database.
        what: its purpose, shown by pg_stat_activity.

    Raises:
        Unreachable: no server answers.
        ConfigurationError: it refuses this user or this database.
    """
    options: dict[str, Any] = {"server_settings": {"application_name": f"streamworker {what}"}}
    with understood(f"connecting for {what}"):
        # No cached statements: the URL may lead through a pooler all the same.
        connection: Connection = await dsn.connect(url, timeout=CONNECT_TIMEOUT, statement_cache_size=0, **options)
        return connection
