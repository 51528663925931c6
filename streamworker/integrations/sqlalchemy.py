"""SQLAlchemy 2 (``pip install 'streamworker[sqlalchemy]'``): its sessions, connections, engines and session factories.

On PostgreSQL by asyncpg or psycopg. `connection_of` and `transaction_of` are `adapters.Adapter`. Statements go to the
driver as they are (``exec_driver_sql``), on the session's own connection: pending objects are not flushed for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from streamworker.errors import UsageError
from streamworker.postgres import SqlConnection, SqlTransaction
from streamworker.postgres.adapters import pyformat
from streamworker.postgres.sqlstate import break_off


def connection_of(given: Any) -> SqlConnection | None:
    """A session or a connection, async or not."""
    if isinstance(given, async_scoped_session | scoped_session):
        given = given()
    if isinstance(given, AsyncSession | AsyncConnection):
        return SqlalchemyConnection(given)
    return BlockingSqlalchemyConnection(given) if isinstance(given, Session | Connection) else None


def transaction_of(source: Any) -> SqlTransaction | None:
    """A transaction on a session of a factory, or on a connection of an engine."""
    if isinstance(source, async_sessionmaker | AsyncEngine | async_scoped_session):
        return SessionTransaction(source)
    return BlockingSessionTransaction(source) if isinstance(source, sessionmaker | Engine | scoped_session) else None


def _check(connection: Connection) -> None:
    """Refuse what would not commit the job with the caller's rows."""
    if connection.dialect.name != "postgresql":
        raise UsageError(
            f"this session leads to {connection.dialect.name}, and jobs are stored in PostgreSQL: use a session of that"
        )
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise UsageError(
            "connection= needs a transaction that the job shares, and the isolation level of this one is AUTOCOMMIT: "
            "leave that execution option out"
        )


def _driver_statement(connection: Connection, statement: str, values: Sequence[Any]) -> tuple[str, Any]:
    if connection.dialect.paramstyle == "pyformat":
        return pyformat(statement, values)
    return statement, tuple(values)  # asyncpg's


def _sync(connection: AsyncConnection) -> Connection:
    if connection.sync_connection is None:
        raise UsageError("this AsyncConnection is not open: use it inside `async with engine.begin() as connection:`")
    return connection.sync_connection


class SqlalchemyConnection:
    """`SqlConnection` of an `AsyncSession` or an `AsyncConnection`."""

    blocking: Final = False

    def __init__(self, given: AsyncSession | AsyncConnection) -> None:
        self._given = given

    async def _connection(self) -> AsyncConnection:
        """The session's own; it begins its transaction if it has not yet."""
        return await self._given.connection() if isinstance(self._given, AsyncSession) else self._given

    async def require_transaction(self) -> None:
        _check(_sync(await self._connection()))

    async def fetch(self, statement: str, *values: Any) -> Sequence[Sequence[Any]]:
        connection = await self._connection()
        text, given = _driver_statement(_sync(connection), statement, values)
        rows: Sequence[Sequence[Any]] = (await connection.exec_driver_sql(text, given)).fetchall()
        return rows

    async def copy(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> bool:
        return False  # the driver's COPY would not know that SQLAlchemy has yet to begin the transaction


class BlockingSqlalchemyConnection:
    """`SqlConnection` of a `Session` or a `Connection`."""

    blocking: Final = True

    def __init__(self, given: Session | Connection) -> None:
        self._given = given

    def _connection(self) -> Connection:
        return self._given.connection() if isinstance(self._given, Session) else self._given

    async def require_transaction(self) -> None:
        _check(self._connection())

    async def fetch(self, statement: str, *values: Any) -> Sequence[Sequence[Any]]:
        connection = self._connection()
        text, given = _driver_statement(connection, statement, values)
        rows: Sequence[Sequence[Any]] = connection.exec_driver_sql(text, given).fetchall()
        return rows

    async def copy(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> bool:
        return False


class SessionTransaction:
    """`SqlTransaction` of an async session factory or an `AsyncEngine`.

    Args:
        source: makes the session or the connection.
    """

    blocking: Final = False

    def __init__(self, source: Any) -> None:
        self._source = source
        self._given: AsyncSession | AsyncConnection | None = None
        self._scope: Any = None
        self._driver: Any = None

    async def begin(self) -> tuple[SqlConnection, AsyncSession | AsyncConnection]:
        if isinstance(self._source, async_scoped_session):
            self._scope = self._source.registry.scopefunc()
        given: Any = self._source.connect() if isinstance(self._source, AsyncEngine) else self._source()
        if isinstance(given, AsyncConnection):
            await given.start()
        self._given = given
        await given.begin()
        made = SqlalchemyConnection(given)
        await made.require_transaction()
        connection = await given.connection() if isinstance(given, AsyncSession) else given
        self._driver = (await connection.get_raw_connection()).driver_connection
        return made, given

    async def commit(self) -> None:
        if self._given is None:
            raise AssertionError("a transaction is committed after it began")
        await self._given.commit()

    async def rollback(self) -> None:
        if self._given is not None:
            await self._given.rollback()

    async def release(self) -> None:
        given, self._given, self._driver = self._given, None, None
        if given is None:
            return
        if isinstance(self._source, async_scoped_session):
            # Not `remove`: this may be another task than the handler's, whose session it is.
            self._source.registry.registry.pop(self._scope, None)
        await given.close()

    def break_off(self) -> None:
        if self._driver is not None:
            break_off(self._driver)


class BlockingSessionTransaction:
    """`SqlTransaction` of a session factory or an `Engine`.

    Args:
        source: makes the session or the connection.
    """

    blocking: Final = True

    def __init__(self, source: Any) -> None:
        self._source = source
        self._given: Session | Connection | None = None
        self._driver: Any = None

    async def begin(self) -> tuple[SqlConnection, Session | Connection]:
        given: Any = self._source.connect() if isinstance(self._source, Engine) else self._source()
        self._given = given
        given.begin()
        made = BlockingSqlalchemyConnection(given)
        await made.require_transaction()
        connection = given.connection() if isinstance(given, Session) else given
        self._driver = connection.connection.driver_connection
        return made, given

    async def commit(self) -> None:
        if self._given is None:
            raise AssertionError("a transaction is committed after it began")
        self._given.commit()

    async def rollback(self) -> None:
        if self._given is not None:
            self._given.rollback()

    async def release(self) -> None:
        given, self._given, self._driver = self._given, None, None
        if given is None:
            return
        if isinstance(self._source, scoped_session):
            self._source.remove()
        else:
            given.close()

    def break_off(self) -> None:
        if self._driver is not None:
            break_off(self._driver)
