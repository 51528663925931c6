"""Whether there is a ledger, and through which connections: the PostgreSQL side of the composition root."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import asyncpg

from streamworker.errors import ConfigurationError
from streamworker.postgres.archive import PostgresArchive
from streamworker.postgres.failures import understood
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.pool import Database, borrowed_database, open_database, require_same_database
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

HANDLERS: Final = 10
"""Most connections of the pool that handlers get."""

# The key of a job is (id, queue_name).
_THERE: Final = """
select to_regclass('streamworker.jobs') is not null as any, exists (
  select from pg_index where indexrelid = to_regclass('streamworker.jobs_pkey') and indnkeyatts = 2
) as all"""


async def open_durable(
    stack: AsyncExitStack, settings: Settings, url: str | None, database: Any, worker_id: str, queues: Sequence[str]
) -> tuple[Any, PostgresLedger | None]:
    """(the handlers' database, the ledger), closed with ``stack``; what the user brought stays the user's.

    Args:
        stack: closes what is made here.
        settings: `ledger` decides.
        url: of the database, if there is one.
        database: what the user brought for the handlers, if anything.
        worker_id: whose runs are recorded.
        queues: what the worker works on.

    Raises:
        ConfigurationError: the ledger is wanted and cannot be had.
        Unreachable: PostgreSQL does not answer.
    """
    brought = database if isinstance(database, asyncpg.Pool) else None
    ledger = await _ledger_database(stack, settings, url, brought)
    pool = brought
    if url is not None and brought is None:
        pool = asyncpg.create_pool(
            url,
            min_size=0,  # connects when a handler first needs it
            max_size=HANDLERS,
            statement_cache_size=0 if ledger is not None and ledger.pooled else 100,
        )
        await stack.enter_async_context(pool)
    if database is None:
        database = pool
    if ledger is None or pool is None:
        return database, None
    if brought is not None:
        await require_same_database(ledger, brought)
    made = PostgresLedger(ledger, pool, worker_id)
    await made.open(queues)
    return database, made


async def open_archive(stack: AsyncExitStack, url: str, *, required: bool = True) -> PostgresArchive | None:
    """What people ask the ledger, closed with ``stack``; ``None`` without its schema, unless it is ``required``.

    Raises:
        ConfigurationError: the schema is not there.
        Unreachable: PostgreSQL does not answer.
    """
    database = await open_database(url, name="jobs", connections=2)
    stack.callback(database.close)
    return PostgresArchive(database) if await _schema(database, required=required) else None


async def _ledger_database(stack: AsyncExitStack, settings: Settings, url: str | None, brought: Any) -> Database | None:
    if settings.ledger == "off" or (url is None and brought is None):
        if settings.ledger == "on":
            raise ConfigurationError("STREAMWORKER_LEDGER is 'on' but there is no PostgreSQL: set DATABASE_URL")
        return None
    database = await (open_database(url) if url is not None else borrowed_database(brought))
    stack.callback(database.close)
    if await _schema(database, required=settings.ledger == "on"):
        return database
    log.warning("ledger_off", reason="the schema streamworker is not there: `streamworker migrate up` makes it")
    return None


async def _schema(database: Database, *, required: bool) -> bool:
    """Whether the schema is there as this release needs it."""
    with understood("looking for the schema streamworker"):
        there = (await database.fetch(_THERE))[0]
    if there["all"]:
        return True
    if required or there["any"]:
        what = "of an older release" if there["any"] else "not there"
        raise ConfigurationError(
            f"the schema streamworker is {what}: run `streamworker migrate up`, or set STREAMWORKER_LEDGER=off"
        )
    return False
