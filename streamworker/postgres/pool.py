"""The ledger's way to PostgreSQL: a few connections of its own, or the user's pool where there is no URL.

Behind a pooler in transaction mode (PgBouncer) nothing may outlive a transaction: no named statements, no session
settings. There every statement is a transaction that sets what it needs; on a straight line, the settings belong to the
session and a statement costs one round trip.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from streamworker.errors import ConfigurationError
from streamworker.postgres import LANES
from streamworker.postgres.failures import break_off, is_gone, understood

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
AnyPool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

CONNECT_TIMEOUT: Final = 10.0
COMMAND_TIMEOUT: Final = 30.0
"""Seconds after which a server that says nothing counts as down."""
CONNECTIONS: Final = LANES + 3
"""Most connections of one ledger: recording, looking up, noting what runs, cleaning up."""
SETTINGS: Final = {
    "lock_timeout": "250ms",
    "statement_timeout": "20s",
    # All our statements are questions by key. A plan made while a table was empty must not read all of it later.
    "enable_seqscan": "off",
    "jit": "off",
}
_SET_LOCAL: Final = "begin; " + "; ".join(f"set local {name} = '{value}'" for name, value in SETTINGS.items())


class Database:
    """Connections of one database. Make it with `open_database`.

    Args:
        pool: the connections.
        pooled: a pooler stands in between.
        own: the pool is ours, with our settings in every session.
    """

    def __init__(self, pool: AnyPool, *, pooled: bool, own: bool) -> None:
        self.pool: Final = pool
        self.pooled: Final = pooled
        self._own: Final = own
        self.straight: Final = own and not pooled
        """A statement is one round trip: our settings hold for the session, and statements stay prepared."""
        self.active: set[Connection] = set()
        """In use by us."""

    @asynccontextmanager
    async def session(self, *, alone: bool = True) -> AsyncIterator[Connection]:
        """A connection with our settings.

        Args:
            alone: one statement will be sent, which is a transaction by itself on a straight line; else there is one
                around all of them.
        """
        async with self.pool.acquire(timeout=CONNECT_TIMEOUT) as connection:
            self.active.add(connection)
            try:
                if alone and self.straight:
                    yield connection
                else:
                    await connection.execute(_SET_LOCAL)
                    yield connection
                    await connection.execute("commit")
            except (TimeoutError, asyncio.CancelledError):
                # What the server does about it is unknown, and waiting for it to say so may take for ever.
                break_off(connection)
                raise
            except BaseException:
                if not (alone and self.straight) and not is_gone(connection):
                    await connection.execute("rollback")
                raise
            finally:
                self.active.discard(connection)

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """The rows of one statement, in a transaction of its own; raises what asyncpg raises."""
        async with self.session() as connection:
            return await connection.fetch(statement, *values)

    def line(self, width: int = 1) -> Line:
        """A way to ask again and again, ``width`` questions at once."""
        return Line(self, width)

    def abandon(self) -> None:
        """Break the connections that are in use by us: whatever is under way on them fails."""
        for connection in list(self.active):
            break_off(connection)

    def close(self) -> None:
        """Close the connections that are ours; nothing is waited for."""
        self.abandon()
        if self._own:
            self.pool.terminate()


class Line:
    """Questions on connections that are kept where they are ours: a pool costs more than many a question.

    Who asks while ``width`` questions are under way takes a connection of the pool.
    """

    def __init__(self, database: Database, width: int) -> None:
        self._database = database
        self._room = width
        self._kept: list[Connection] = []

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """The rows of one statement, in a transaction of its own; raises what asyncpg raises."""
        if not self._room or not self._database.straight:
            return await self._database.fetch(statement, *values)
        self._room -= 1
        try:
            return await self._ask(statement, values)
        finally:
            self._room += 1

    async def _ask(self, statement: str, values: tuple[Any, ...]) -> list[asyncpg.Record]:
        connection = await self._connection()
        try:
            return await connection.fetch(statement, *values)
        except (TimeoutError, asyncio.CancelledError):
            break_off(connection)
            raise
        finally:
            if is_gone(connection):
                await self._let_go(connection)
            else:
                self._kept.append(connection)

    async def _connection(self) -> Connection:
        while self._kept:
            connection = self._kept.pop()
            if not is_gone(connection):
                return connection
            await self._let_go(connection)
        connection = await self._database.pool.acquire(timeout=CONNECT_TIMEOUT)
        self._database.active.add(connection)
        return connection

    async def _let_go(self, connection: Connection) -> None:
        self._database.active.discard(connection)
        await self._database.pool.release(connection)  # type: ignore[arg-type]


async def open_database(url: str, *, name: str = "ledger", connections: int = CONNECTIONS) -> Database:
    """A small pool of our own.

    Args:
        url: of the database.
        name: what it is for, shown by pg_stat_activity.
        connections: at most.

    Raises:
        Unreachable: no server answers.
        ConfigurationError: it refuses this user or this database.
    """
    label = f"streamworker {name}"
    with understood(f"connecting for the {name}"):
        probe = await asyncpg.connect(
            url, timeout=CONNECT_TIMEOUT, statement_cache_size=0, server_settings={"application_name": label}
        )
        try:
            pooled = await behind_pooler(probe)
        finally:
            await probe.close(timeout=CONNECT_TIMEOUT)
        pool = asyncpg.create_pool(
            url,
            min_size=0,
            max_size=connections,
            timeout=CONNECT_TIMEOUT,
            command_timeout=COMMAND_TIMEOUT,
            statement_cache_size=0 if pooled else 100,
            # Poolers refuse settings they do not know.
            server_settings={"application_name": label, **({} if pooled else SETTINGS)},
            reset=_nothing_to_reset,
        )
        await pool
    return Database(pool, pooled=pooled, own=True)


async def borrowed_database(pool: AnyPool) -> Database:
    """The user's pool; nothing is set in its sessions beyond a transaction.

    Raises:
        Unreachable: no server answers.
        ConfigurationError: it refuses this user or this database.
    """
    with understood("looking at the pool of the worker"):
        async with pool.acquire(timeout=CONNECT_TIMEOUT) as connection:
            pooled = await behind_pooler(connection)
    return Database(pool, pooled=pooled, own=False)


async def behind_pooler(connection: Connection) -> bool:
    """Whether a pooler answers for the server: the process it named at connecting is not the one that works for us."""
    async with connection.transaction():
        backend = await connection.fetchval("select pg_backend_pid()")
    return bool(backend != connection.get_server_pid())


async def require_same_database(ledger: Database, pool: AnyPool) -> None:
    """See that the ledger is visible through the pool that handlers' transactions use.

    Raises:
        ConfigurationError: the pool leads to another database, to a standby, or may not write the ledger.
        Unreachable: no server answers.
    """
    number = secrets.randbits(62)
    with understood("looking for the ledger through the pool of the worker"):
        async with ledger.session(alone=False) as ours:
            await ours.fetchval("select pg_advisory_xact_lock_shared($1::bigint)", number)
            async with pool.acquire(timeout=CONNECT_TIMEOUT) as theirs, theirs.transaction():
                # Advisory locks belong to one database of one server, and need no permission.
                free = await theirs.fetchval("select pg_try_advisory_xact_lock($1::bigint)", number)
                there = await theirs.fetchval("select to_regclass('streamworker.jobs') is not null")
    if free:
        raise ConfigurationError(
            "the database pool of the worker and DATABASE_URL lead to different databases: "
            "ctx.transaction() needs the ledger where the handlers write"
        )
    if not there:
        raise ConfigurationError(
            "the schema streamworker is not visible through the database pool of the worker: "
            "grant its user usage of the schema, or run `streamworker migrate up` on that database"
        )


async def _nothing_to_reset(_: asyncpg.Connection[asyncpg.Record]) -> None:
    """Nothing of ours stays behind in a session; asyncpg's own reset would cost a round trip each time."""
