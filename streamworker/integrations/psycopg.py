"""psycopg 3 (``pip install 'streamworker[psycopg]'``): its connections, and its pools, async and blocking.

`connection_of` and `transaction_of` are `adapters.Adapter`. Statements go through psycopg's raw cursors, which take the
parameters ``$1``, ``$2`` … of PostgreSQL itself (https://www.psycopg.org/psycopg3/docs/advanced/cursors.html).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, Connection, RawCursor
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from streamworker.errors import UsageError
from streamworker.postgres import SqlConnection, SqlTransaction
from streamworker.postgres.sqlstate import break_off


def connection_of(given: Any) -> SqlConnection | None:
    """A connection of psycopg, or one of a pool."""
    if isinstance(given, AsyncConnection):
        return PsycopgConnection(given)
    return BlockingPsycopgConnection(given) if isinstance(given, Connection) else None


def transaction_of(source: Any) -> SqlTransaction | None:
    """A transaction on a connection of a pool of psycopg_pool."""
    if not (hasattr(source, "getconn") and hasattr(source, "putconn")):
        return None
    names = {cls.__name__ for cls in type(source).__mro__}
    return PsycopgTransaction(source) if "AsyncConnectionPool" in names else BlockingPsycopgTransaction(source)


def _require_transaction(connection: AsyncConnection[Any] | Connection[Any]) -> None:
    """A connection that does not commit by itself begins a transaction with the next statement."""
    if connection.autocommit and connection.info.transaction_status is TransactionStatus.IDLE:
        word = "async with" if isinstance(connection, AsyncConnection) else "with"
        raise UsageError(
            f"connection= needs a transaction that the job shares: use it inside `{word} connection.transaction():`"
        )


def _copy_statement(table: str, columns: Sequence[str]) -> bytes:
    return f"copy streamworker.{table} ({', '.join(columns)}) from stdin".encode()


class PsycopgConnection:
    """`SqlConnection` of psycopg's `AsyncConnection`."""

    blocking: Final = False

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def require_transaction(self) -> None:
        _require_transaction(self._connection)

    async def fetch(self, statement: str, *values: Any) -> Sequence[Sequence[Any]]:
        async with AsyncRawCursor(self._connection, row_factory=tuple_row) as cursor:
            await cursor.execute(statement.encode(), values)
            rows: Sequence[Sequence[Any]] = await cursor.fetchall()
        return rows

    async def copy(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> bool:
        async with (
            AsyncRawCursor(self._connection) as cursor,
            cursor.copy(_copy_statement(table, columns)) as target,
        ):
            for line in lines:
                await target.write(line)
        return True


class BlockingPsycopgConnection:
    """`SqlConnection` of psycopg's `Connection`."""

    blocking: Final = True

    def __init__(self, connection: Connection[Any]) -> None:
        self._connection = connection

    async def require_transaction(self) -> None:
        _require_transaction(self._connection)

    async def fetch(self, statement: str, *values: Any) -> Sequence[Sequence[Any]]:
        with RawCursor(self._connection, row_factory=tuple_row) as cursor:
            cursor.execute(statement.encode(), values)
            rows: Sequence[Sequence[Any]] = cursor.fetchall()
        return rows

    async def copy(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> bool:
        with RawCursor(self._connection) as cursor, cursor.copy(_copy_statement(table, columns)) as target:
            for line in lines:
                target.write(line)
        return True


class PsycopgTransaction:
    """`SqlTransaction` of an `AsyncConnectionPool`.

    Args:
        pool: where its connection comes from.
    """

    blocking: Final = False

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._connection: AsyncConnection[Any] | None = None
        self._block: AbstractAsyncContextManager[Any] | None = None

    async def begin(self) -> tuple[SqlConnection, AsyncConnection[Any]]:
        connection: AsyncConnection[Any] = await self._pool.getconn()
        self._connection = connection
        # As a block: psycopg refuses commit() and rollback() inside it.
        block = connection.transaction()
        await block.__aenter__()
        self._block = block
        return PsycopgConnection(connection), connection

    async def commit(self) -> None:
        block, self._block = self._block, None
        if block is None:
            raise AssertionError("a transaction is committed after it began")
        await block.__aexit__(None, None, None)

    async def rollback(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            await block.__aexit__(psycopg.Rollback, psycopg.Rollback(), None)

    async def release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._pool.putconn(connection)

    def break_off(self) -> None:
        if self._connection is not None:
            break_off(self._connection)


class BlockingPsycopgTransaction:
    """`SqlTransaction` of a `ConnectionPool`.

    Args:
        pool: where its connection comes from.
    """

    blocking: Final = True

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._connection: Connection[Any] | None = None
        self._block: AbstractContextManager[Any] | None = None

    async def begin(self) -> tuple[SqlConnection, Connection[Any]]:
        connection: Connection[Any] = self._pool.getconn()
        self._connection = connection
        block = connection.transaction()
        block.__enter__()
        self._block = block
        return BlockingPsycopgConnection(connection), connection

    async def commit(self) -> None:
        block, self._block = self._block, None
        if block is None:
            raise AssertionError("a transaction is committed after it began")
        block.__exit__(None, None, None)

    async def rollback(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(psycopg.Rollback, psycopg.Rollback(), None)

    async def release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.putconn(connection)

    def break_off(self) -> None:
        if self._connection is not None:
            break_off(self._connection)
