"""Adapters: which library a user's connection or pool is of, and what makes a `SqlConnection` of it. asyncpg's own.

The other libraries' adapters are `streamworker.integrations`; each is imported when a connection of its library is met.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from importlib import import_module
from typing import Any, Final, Protocol

from asyncpg.transaction import Transaction as AsyncpgTransaction

from streamworker.errors import ConfigurationError, UsageError
from streamworker.postgres import SqlConnection, SqlTransaction
from streamworker.postgres.pool import AnyPool, Connection
from streamworker.postgres.sqlstate import break_off, is_gone

EXTRAS: Final = {
    "django": "django",
    "psycopg": "psycopg",
    "psycopg_pool": "psycopg",
    "sqlalchemy": "sqlalchemy",
}
"""The extra, and the module of `streamworker.integrations`, for the package that a class or a base of it is of."""
CONNECTIONS: Final = (
    "a connection of asyncpg or psycopg 3, a session or a connection of SQLAlchemy, or Django's connection"
)
SOURCES: Final = (
    "a sessionmaker or an engine of SQLAlchemy, a pool of asyncpg or psycopg, or Django's connection; or nothing, "
    "for the worker's own pool"
)


class Adapter(Protocol):
    """A module of `streamworker.integrations` that knows a library's connections."""

    def connection_of(self, given: Any) -> SqlConnection | None:
        """The connection as we use it; ``None`` if it is none."""

    def transaction_of(self, source: Any) -> SqlTransaction | None:
        """A transaction on a connection of this source; ``None`` if it is none."""


async def connection_of(given: Any, *, blocking: bool, instead: str) -> SqlConnection:
    """A user's connection as we use it, inside its transaction.

    Args:
        given: the user's.
        blocking: whether the caller blocks.
        instead: the call for a connection of the other sort, for the sentence.

    Raises:
        UsageError: it is no connection that we know, or of the other sort, or in no transaction.
        ConfigurationError: its library is too old.
    """
    adapter = _adapter_of(given)
    found = _asyncpg_connection(given) if adapter is None else adapter.connection_of(given)
    name = type(given).__name__
    if found is None:
        raise UsageError(
            f"connection={name} is none that streamworker can use: give {CONNECTIONS}; with another library, run "
            "`select streamworker.enqueue(kind, payload, queue)` in your transaction"
        )
    if found.blocking != blocking:
        raise UsageError(f"connection={name} {'blocks' if found.blocking else 'must be awaited'}: {instead}")
    await found.require_transaction()
    return found


def transaction_of(source: Any) -> SqlTransaction:
    """A transaction on a connection of a user's pool, engine or session factory.

    Raises:
        UsageError: it is none of these.
        ConfigurationError: its library is too old.
    """
    adapter = _adapter_of(source)
    found = _asyncpg_transaction(source) if adapter is None else adapter.transaction_of(source)
    if found is None:
        raise UsageError(f"ctx.transaction({type(source).__name__}) has no connections: give it {SOURCES}")
    return found


def _adapter_of(given: Any) -> Adapter | None:
    """By the packages of the classes it is of, so that no library is imported which the user has not."""
    for cls in type(given).__mro__:
        root = cls.__module__.partition(".")[0]
        extra = EXTRAS.get(root)
        if extra is None:
            continue
        try:
            module: Any = import_module(f"streamworker.integrations.{extra}")
        except ImportError as error:
            raise ConfigurationError(
                f"this {root} cannot be used with streamworker ({error}): pip install 'streamworker[{extra}]'"
            ) from error
        return module  # type: ignore[no-any-return]
    return None


def pyformat(statement: str, values: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    """A statement with ``$1`` … and its values, for drivers whose parameters are ``%(name)s``."""
    parts = statement.replace("%", "%%").split("$")
    written = [parts[0]]
    for part in parts[1:]:
        rest = part.lstrip("0123456789")
        written.append(f"%(p{part[: len(part) - len(rest)]})s{rest}")
    return "".join(written), {f"p{number}": value for number, value in enumerate(values, 1)}


class AsyncpgConnection:
    """`SqlConnection` of asyncpg: a connection, or one of a pool."""

    blocking: Final = False

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def require_transaction(self) -> None:
        if not self._connection.is_in_transaction():
            raise UsageError(
                "connection= needs a transaction that the job shares: use it inside `async with "
                "connection.transaction():`"
            )

    async def fetch(self, statement: str, *values: Any) -> Sequence[Sequence[Any]]:
        return await self._connection.fetch(statement, *values)  # type: ignore[no-any-return]

    async def copy(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> bool:
        async def source() -> AsyncIterator[bytes]:
            for line in lines:
                yield line

        await self._connection.copy_to_table(
            table, schema_name="streamworker", columns=columns, source=source(), format="text"
        )
        return True


class PoolTransaction:
    """`SqlTransaction` of asyncpg.

    Args:
        pool: where its connection comes from.
    """

    blocking: Final = False

    def __init__(self, pool: AnyPool) -> None:
        self._pool = pool
        self._connection: Connection | None = None
        self._transaction: AsyncpgTransaction | None = None

    async def begin(self) -> tuple[SqlConnection, Connection]:
        connection = self._connection = await self._pool.acquire()
        transaction = connection.transaction()
        await transaction.start()
        self._transaction = transaction
        return AsyncpgConnection(connection), connection

    async def commit(self) -> None:
        if self._transaction is None:
            raise AssertionError("a transaction is committed after it began")
        await self._transaction.commit()

    async def rollback(self) -> None:
        if self._transaction is not None and not is_gone(self._connection):
            await self._transaction.rollback()

    async def release(self) -> None:
        connection, self._connection, self._transaction = self._connection, None, None
        if connection is not None:
            await self._pool.release(connection)  # type: ignore[arg-type]

    def break_off(self) -> None:
        if self._connection is not None:
            break_off(self._connection)


def _asyncpg_connection(given: Any) -> SqlConnection | None:
    known = hasattr(given, "is_in_transaction") and hasattr(given, "copy_to_table")
    return AsyncpgConnection(given) if known else None


def _asyncpg_transaction(source: Any) -> SqlTransaction | None:
    return PoolTransaction(source) if hasattr(source, "acquire") and hasattr(source, "get_idle_size") else None
