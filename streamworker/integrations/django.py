"""Django (``pip install 'streamworker[django]'``): its database connections, and `DjangoApp`.

`connection_of` and `transaction_of` are `adapters.Adapter`, for ``django.db.connection`` and those of
``django.db.connections``. Statements go through Django's cursors, on the connection that the ORM of this thread uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import wraps
from typing import Any, Final

import msgspec
from asgiref.sync import sync_to_async
from django.db import close_old_connections, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionProxy
from typing_extensions import TypeVar

from streamworker.app import App
from streamworker.errors import UsageError
from streamworker.handlers import Registration
from streamworker.postgres import SqlConnection, SqlTransaction
from streamworker.postgres.adapters import pyformat
from streamworker.postgres.sqlstate import break_off

S = TypeVar("S", default=Any)


def connection_of(given: Any) -> SqlConnection | None:
    """``django.db.connection``, or one of ``django.db.connections``."""
    return DjangoConnection(given.alias) if isinstance(given, ConnectionProxy | BaseDatabaseWrapper) else None


def transaction_of(source: Any) -> SqlTransaction | None:
    """A transaction on the connection of this thread."""
    return AtomicTransaction(source.alias) if isinstance(source, ConnectionProxy | BaseDatabaseWrapper) else None


class DjangoConnection:
    """`SqlConnection` of a database alias of Django, in the thread that calls."""

    blocking: Final = True

    def __init__(self, alias: str) -> None:
        self._connection: Any = connections[alias]

    async def require_transaction(self) -> None:
        connection = self._connection
        if connection.vendor != "postgresql":
            raise UsageError(
                f"this connection leads to {connection.vendor}, and jobs are stored in PostgreSQL: use its alias"
            )
        if connection.get_autocommit() and not connection.in_atomic_block:
            raise UsageError(
                "connection= needs a transaction that the job shares: use it inside `with transaction.atomic():`"
            )

    async def fetch(self, statement: str, *values: Any) -> Sequence[Sequence[Any]]:
        with self._connection.cursor() as cursor:
            cursor.execute(*pyformat(statement, values))
            rows: Sequence[Sequence[Any]] = cursor.fetchall()
        return rows

    async def copy(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> bool:
        return False


class AtomicTransaction:
    """`SqlTransaction` of a database alias of Django: an outermost ``atomic()`` block.

    Args:
        alias: of the database.
    """

    blocking: Final = True

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._block: Any = None
        self._driver: Any = None

    async def begin(self) -> tuple[SqlConnection, Any]:
        connection: Any = connections[self._alias]
        connection.close_if_unusable_or_obsolete()
        block = transaction.atomic(using=self._alias, durable=True)
        block.__enter__()
        self._block, self._driver = block, connection.connection
        made = DjangoConnection(self._alias)
        await made.require_transaction()
        return made, connection

    async def commit(self) -> None:
        block, self._block = self._block, None
        block.__exit__(None, None, None)

    async def rollback(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            error = RuntimeError("rolled back")
            block.__exit__(RuntimeError, error, None)

    async def release(self) -> None:
        self._driver = None
        connections[self._alias].close_if_unusable_or_obsolete()

    def break_off(self) -> None:
        """By the driver's own connection, which another thread may be waiting for."""
        if self._driver is not None:
            break_off(self._driver)


class DjangoApp(App[S]):
    """`App` whose handlers may use the ORM: Django's connections are closed after each job, as after each request.

    Of sync handlers those of their thread; of async ones those of the thread in which Django's async ORM works.
    Django's setting ``CONN_MAX_AGE`` says how long one may live.
    """

    def _index(self, registration: Registration) -> None:
        closing = _closing_async if registration.is_async else _closing
        super()._index(msgspec.structs.replace(registration, function=closing(registration.function)))


def _closing(function: Any) -> Any:
    @wraps(function)
    def call(*arguments: Any) -> Any:
        close_old_connections()
        try:
            return function(*arguments)
        finally:
            close_old_connections()

    return call


def _closing_async(function: Any) -> Any:
    @wraps(function)
    async def call(*arguments: Any) -> Any:
        try:
            return await function(*arguments)
        finally:
            await sync_to_async(close_old_connections)()

    return call
