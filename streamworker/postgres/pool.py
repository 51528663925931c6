"""Pools of connections to PostgreSQL: the ledger's own, those of handlers, or the user's pool where there is no URL.

Behind a pooler in transaction mode (PgBouncer) nothing may outlive a transaction: no named statements, no session
settings. There every statement is a transaction that sets what it needs; on a direct connection the settings belong to
the session, and a statement costs one round trip.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Final, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from streamworker.errors import ConfigurationError, NoConnection
from streamworker.postgres import LANES, dsn
from streamworker.postgres.sqlstate import break_off, is_gone, understood
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

OwnConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Connection: TypeAlias = "OwnConnection | PoolConnectionProxy[asyncpg.Record]"
AnyPool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

CONNECT_TIMEOUT: Final = 10.0
ACQUIRE_TIMEOUT: Final = 30.0
"""Seconds a handler waits for a connection of a pool before `NoConnection`."""
NOTICE: Final = 5.0
"""Seconds of waiting for a connection after which it is logged."""
LOG_AGAIN: Final = 60.0
"""Seconds until a pool logs that again."""
IDLE: Final = 300.0
IDLE_POOLED: Final = 3.0
"""Seconds an unused connection is kept; behind a pooler it may occupy a session that others wait for."""
COMMAND_TIMEOUT: Final = 30.0
"""Seconds without a reply after which a server counts as down."""
CONNECTIONS: Final = LANES + 3
"""Most connections of one ledger: record, look up, mark as running, prune."""
RELAY_CONNECTIONS: Final = 2
"""Most connections of one relay, besides the one that listens."""
TRY: Final = 3.0
"""Seconds in which each of the connections that `streamworker check` opens has to answer."""
SETTINGS: Final = {
    "lock_timeout": "250ms",
    "statement_timeout": "20s",
    # A process of ours that is frozen between two statements must not hold row locks; none of ours idles in between.
    "idle_in_transaction_session_timeout": "20s",
    # All our statements look up by key. A plan made for an empty table must not scan all of it later.
    "enable_seqscan": "off",
    "jit": "off",
}
_SET_LOCAL: Final = "begin; " + "; ".join(f"set local {name} = '{value}'" for name, value in SETTINGS.items())


class Pressure:
    """Whether PostgreSQL, or a pooler in front of it, grants fewer connections than this process asks for.

    Shared by the pools of a worker: while it is high, each pool closes a released connection instead of keeping it, so
    that no pool waits for the idle sessions of another (PgBouncer in session mode).
    """

    def __init__(self) -> None:
        self._until = 0.0

    def rise(self) -> None:
        """A connection was not made at once."""
        self._until = monotonic() + LOG_AGAIN

    @property
    def high(self) -> bool:
        """Whether it rose within the last minute."""
        return monotonic() < self._until


class NamedPool(asyncpg.Pool):
    """asyncpg's pool with a name for errors and logs, which detects a pooler in front of the server.

    Args:
        url: of the database.
        what: its name in errors and in the log.
        size: most connections.
        pressure: shared with the other pools of the worker.
        pooled: whether a pooler is in front of the server; ``None`` finds out with the first connection.
        options: of each connection.

    Raises:
        ConfigurationError: the URL asks for what asyncpg cannot do.
    """

    def __init__(
        self, url: str, *, what: str, size: int, pressure: Pressure, pooled: bool | None = None, **options: Any
    ) -> None:
        self.what: Final = what
        self._pressure = pressure
        self._pooled = pooled
        self._silent_until = 0.0
        dsn.parse(url)  # a wrong URL is an error when the worker starts, not of its first job
        super().__init__(
            url,
            min_size=0,  # connects when first needed
            max_size=size,
            max_queries=50_000,
            max_inactive_connection_lifetime=IDLE if pooled is False else IDLE_POOLED,
            loop=None,
            connection_class=asyncpg.Connection,
            record_class=asyncpg.Record,
            **{"connect": self._connected, "timeout": CONNECT_TIMEOUT, **options},
        )

    async def _connected(self, *place: Any, **options: Any) -> Any:
        """One connection; without prepared statements behind a pooler."""
        if self._pooled is not False:
            connection = await dsn.connect(*place, **{**options, "statement_cache_size": 0})
            try:
                pooled = await behind_pooler(connection)
            except BaseException:
                connection.terminate()
                raise
            if self._pooled is None:
                self._pooled = pooled
            if self._pooled:
                return connection
            connection.terminate()
        return await dsn.connect(*place, **{**options, "statement_cache_size": 100})

    async def _acquire(self, timeout: float | None) -> Any:
        acquire: Any = super()._acquire  # type: ignore[misc]
        timeout = ACQUIRE_TIMEOUT if timeout is None else timeout
        if self.get_idle_size():
            return await acquire(timeout)
        began, loop = monotonic(), asyncio.get_running_loop()
        timers = [loop.call_later(1.0, self._pressed), loop.call_later(NOTICE, self._log_wait)]
        try:
            return await acquire(timeout)
        except asyncio.CancelledError as error:
            error.add_note(self._waited(monotonic() - began))
            raise
        except TimeoutError as error:
            if not self._exhausted or not self.what.startswith("ctx."):
                raise TimeoutError(self._waited(monotonic() - began)) from error
            raise NoConnection(self._waited(monotonic() - began)) from error
        finally:
            for timer in timers:
                timer.cancel()

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:
        if self._pressure.high and self._pooled:
            await self.expire_connections()
        await super().release(connection, timeout=timeout)

    @property
    def _exhausted(self) -> bool:
        """All connections are open and in use: the wait is not for the server."""
        return self.get_size() - self.get_idle_size() >= self.get_max_size()

    def _pressed(self) -> None:
        if not self._exhausted:
            self._pressure.rise()

    def _log_wait(self) -> None:
        if monotonic() < self._silent_until:
            return
        self._silent_until = monotonic() + LOG_AGAIN
        hint = (
            "raise STREAMWORKER_DATABASE_CONNECTIONS, or hold them for shorter"
            if self._exhausted
            else "raise max_connections of the server or the size of the pooler's pool, or lower "
            "STREAMWORKER_DATABASE_CONNECTIONS; `streamworker check` says how many a worker needs"
        )
        log.warning("database_waiting", reason=self._waited(NOTICE), hint=hint)

    def _waited(self, seconds: float) -> str:
        most, there = self.get_max_size(), self.get_size()
        if self._exhausted:
            state = f"{most} connections, all taken"
        else:
            state = f"{there} of {most} are there, and PostgreSQL or its pooler gives no other"
        return f"waited {seconds:.1f} s for a connection of {self.what} ({state})"


class Database:
    """Connections of one database. Make it with `open_database`.

    Args:
        pool: the connections.
        pooled: a pooler is in front of the server.
        own: the pool is ours, with our settings in every session.
    """

    def __init__(self, pool: AnyPool, *, pooled: bool, own: bool) -> None:
        self.pool: Final = pool
        self.pooled: Final = pooled
        self._own: Final = own
        self.direct: Final = own and not pooled
        """A statement is one round trip: our settings belong to the session, and statements stay prepared."""
        self.active: set[Connection] = set()
        """Connections in use by us."""
        self.loop: Final = asyncio.get_running_loop()
        """The event loop that the connections belong to; threads ask through it."""

    @asynccontextmanager
    async def session(self, *, alone: bool = True) -> AsyncIterator[Connection]:
        """A connection with our settings.

        Args:
            alone: one statement will be sent, which is a transaction by itself on a direct connection; otherwise a
                transaction is put around all statements.
        """
        async with self.pool.acquire(timeout=CONNECT_TIMEOUT) as connection:
            self.active.add(connection)
            try:
                if alone and self.direct:
                    yield connection
                else:
                    await connection.execute(_SET_LOCAL)
                    yield connection
                    await connection.execute("commit")
            except (TimeoutError, asyncio.CancelledError):
                # Whether the server executed the statement is unknown, and a wait for its reply may never end.
                break_off(connection)
                raise
            except BaseException:
                if not (alone and self.direct) and not is_gone(connection):
                    await connection.execute("rollback")
                raise
            finally:
                self.active.discard(connection)

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """The rows of one statement, in a transaction of its own; raises what asyncpg raises."""
        async with self.session() as connection:
            return await connection.fetch(statement, *values)

    def kept(self, width: int = 1) -> KeptConnections:
        """Connections that are kept between statements, at most ``width``."""
        return KeptConnections(self, width)

    def abandon(self) -> None:
        """Break the connections in use by us: every pending statement fails."""
        for connection in list(self.active):
            break_off(connection)

    def close(self) -> None:
        """Close our connections without waiting for replies."""
        self.abandon()
        if self._own:
            self.pool.terminate()


class KeptConnections:
    """Connections of a `Database` that are not released between statements: the pool costs more than a short statement.

    A statement takes a connection of the pool while ``width`` others are pending, and where the pool is the user's.
    """

    def __init__(self, database: Database, width: int) -> None:
        self._database = database
        self._free = width
        self._kept: list[Connection] = []

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """The rows of one statement, in a transaction of its own; raises what asyncpg raises."""
        if not self._free or not self._database.direct:
            return await self._database.fetch(statement, *values)
        self._free -= 1
        try:
            return await self._fetch(statement, values)
        finally:
            self._free += 1

    async def _fetch(self, statement: str, values: tuple[Any, ...]) -> list[asyncpg.Record]:
        connection = await self._connection()
        try:
            return await connection.fetch(statement, *values)
        except (TimeoutError, asyncio.CancelledError):
            break_off(connection)
            raise
        finally:
            if is_gone(connection):
                await self._drop(connection)
            else:
                self._kept.append(connection)

    async def _connection(self) -> Connection:
        while self._kept:
            connection = self._kept.pop()
            if not is_gone(connection):
                return connection
            await self._drop(connection)
        connection = await self._database.pool.acquire(timeout=CONNECT_TIMEOUT)
        self._database.active.add(connection)
        return connection

    async def _drop(self, connection: Connection) -> None:
        self._database.active.discard(connection)
        await self._database.pool.release(connection)  # type: ignore[arg-type]


async def open_database(
    url: str, *, name: str = "ledger", connections: int = CONNECTIONS, pressure: Pressure | None = None
) -> Database:
    """A small pool of our own.

    Args:
        url: of the database.
        name: its purpose, shown by pg_stat_activity.
        connections: at most.
        pressure: shared with other pools.

    Raises:
        Unreachable: no server answers.
        ConfigurationError: it refuses this user or this database.
    """
    label = f"streamworker {name}"
    with understood(f"connecting for the {name}"):
        probe = await dsn.connect(
            url, timeout=CONNECT_TIMEOUT, statement_cache_size=0, server_settings={"application_name": label}
        )
        try:
            pooled = await behind_pooler(probe)
        finally:
            await probe.close(timeout=CONNECT_TIMEOUT)
        pool = NamedPool(
            url,
            what=f"the {name}",
            size=connections,
            pressure=pressure or Pressure(),
            pooled=pooled,
            command_timeout=COMMAND_TIMEOUT,
            # Poolers refuse settings they do not know.
            server_settings={"application_name": label, **({} if pooled else SETTINGS)},
            reset=_nothing_to_reset,
        )
        await pool
    return Database(pool, pooled=pooled, own=True)


async def borrowed_database(pool: AnyPool) -> Database:
    """The user's pool; no setting outlives a transaction in its sessions.

    Raises:
        Unreachable: no server answers.
        ConfigurationError: it refuses this user or this database.
    """
    with understood("looking at the pool of the worker"):
        async with pool.acquire(timeout=CONNECT_TIMEOUT) as connection:
            pooled = await behind_pooler(connection)
    return Database(pool, pooled=pooled, own=False)


async def behind_pooler(connection: Connection) -> bool:
    """Whether a pooler is in front of the server: the backend's pid is not the one in the connection's greeting."""
    async with connection.transaction():
        backend = await connection.fetchval("select pg_backend_pid()")
    return bool(backend != connection.get_server_pid())


async def count_sessions(url: str, wanted: int) -> int:
    """How many of ``wanted`` concurrent connections get a reply within `TRY` seconds.

    Args:
        url: of the database.
        wanted: how many are opened.
    """
    there: list[Any] = []

    async def one() -> bool:
        try:
            connection = await dsn.connect(url, timeout=TRY, statement_cache_size=0)
            there.append(connection)
            await connection.execute("select 1", timeout=TRY)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            return False
        return True

    try:
        return sum(await asyncio.gather(*(one() for _ in range(wanted))))
    finally:
        for connection in there:
            connection.terminate()


async def require_same_database(ledger: Database, pool: AnyPool) -> None:
    """Check that the ledger is visible through the pool of handlers' transactions.

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


async def connect(url: str, what: str) -> OwnConnection:
    """One connection, of no pool.

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
        connection: OwnConnection = await dsn.connect(url, timeout=CONNECT_TIMEOUT, statement_cache_size=0, **options)
        return connection
