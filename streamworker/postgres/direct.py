"""Single connections past any pooler: for migrations and for LISTEN, which poolers in transaction mode cannot serve."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import asyncpg

from streamworker.postgres import dsn
from streamworker.postgres.failures import understood

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
