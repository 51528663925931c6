"""Django (``pip install 'streamworker[django]'``): its database connections, `DjangoApp`, and what Django asks for.

``INSTALLED_APPS`` takes it as an app: ``manage.py migrate`` then migrates the ledger, and ``manage.py streamworker`` is
the command line. ``TASKS`` of Django 6 takes its `task_backend.StreamworkerBackend`.

`connection_of` and `transaction_of` are `adapters.Adapter`, for ``django.db.connection`` and those of
``django.db.connections``. Statements go through Django's cursors, on the connection that the ORM of this thread uses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from importlib import import_module
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec
from asgiref.sync import sync_to_async
from django.db import close_old_connections, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionProxy
from typing_extensions import TypeVar

from streamworker.app import App
from streamworker.errors import ConfigurationError, UsageError
from streamworker.handlers import Registration
from streamworker.policy import Backoff, Limits
from streamworker.postgres import SqlConnection, SqlTransaction
from streamworker.postgres.adapters import pyformat
from streamworker.postgres.sqlstate import break_off

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", default=Any)
LEDGER_URLS: Final = ("STREAMWORKER_DATABASE_URL", "DATABASE_URL")
"""Variables that say where the ledger is; without them it is in Django's database."""


def connection_of(given: Any) -> SqlConnection | None:
    """``django.db.connection``, or one of ``django.db.connections``."""
    return DjangoConnection(given.alias) if isinstance(given, ConnectionProxy | BaseDatabaseWrapper) else None


def transaction_of(source: Any) -> SqlTransaction | None:
    """A transaction on the connection of this thread."""
    return AtomicTransaction(source.alias) if isinstance(source, ConnectionProxy | BaseDatabaseWrapper) else None


def rows_of(alias: str, statement: str, *values: Any) -> list[dict[str, Any]]:
    """The rows of a query, by the names of its columns.

    Args:
        alias: of the database.
        statement: with parameters ``$1`` ….
        values: of these.
    """
    with connections[alias].cursor() as cursor:
        cursor.execute(*pyformat(statement, values))
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


URL_OPTIONS: Final = frozenset(
    {
        "connect_timeout", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "options",
        "passfile", "sslcert", "sslkey", "sslmode", "sslrootcert", "tcp_user_timeout",
    }
)  # fmt: skip
"""What of Django's ``OPTIONS`` goes into a URL."""


def is_set(*names: str) -> bool:
    """Whether one of these environment variables has a value, or names a file that holds it."""
    return any(os.environ.get(name) or os.environ.get(f"{name}_FILE") for name in names)


def url_of(alias: str) -> str | None:
    """The ``DATABASE_URL`` of one of Django's databases; ``None`` if a service file says where it is.

    Args:
        alias: of a database of PostgreSQL.
    """
    given = connections[alias].get_connection_params()
    if "service" in given:
        return None
    host, port = str(given.get("host") or ""), str(given.get("port") or "")
    query = {name: str(value) for name, value in given.items() if name in URL_OPTIONS}
    if not host or host.startswith("/"):  # a socket
        query |= {"host": host or "/var/run/postgresql", **({"port": port} if port else {})}
        place = ""
    else:
        place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    user, password = (quote(str(given.get(name) or ""), safe="") for name in ("user", "password"))
    name = quote(str(given.get("dbname") or given.get("database") or ""), safe="")
    who = (f"{user}:{password}@" if password else f"{user}@") if user else ""
    return f"postgresql://{who}{place}/{name}" + (f"?{urlencode(query)}" if query else "")


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
        super()._index(closing(registration))


def closing(registration: Registration) -> Registration:
    """The same handler, that leaves none of Django's connections behind."""
    wrapped = _closing_async if registration.is_async else _closing
    return msgspec.structs.replace(registration, function=wrapped(registration.function))


LIMITS: Final = "__streamworker_limits__"
"""Attribute of a function: what `run_options` keeps."""


def run_options(
    *, max_attempts: int = 1, timeout: float | None = 300.0, backoff: Backoff = Backoff()
) -> Callable[[F], F]:
    """Options of one task, in place of the backend's: written below ``@task``.

    Args:
        max_attempts: failed attempts after which the task has failed; 1 unless given, as Django retries nothing.
        timeout: seconds one run may take; ``None`` for no limit.
        backoff: waits between attempts.

    Raises:
        ConfigurationError: an option is wrong.
    """
    try:
        limits = Limits(max_attempts, timeout, backoff)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the task's options are wrong: {error}") from None

    def keep(function: F) -> F:
        setattr(function, LIMITS, limits)
        return function

    return keep


def __getattr__(name: str) -> Any:
    """``StreamworkerBackend``, by the name that ``TASKS`` gives: importing it needs Django 6, all else does not.

    Raises:
        ImportError: this Django has no ``django.tasks``.
    """
    if name != "StreamworkerBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f"{__name__}.task_backend").StreamworkerBackend
    except ModuleNotFoundError as error:
        if error.name != "django.tasks":
            raise
        raise ImportError("StreamworkerBackend needs django.tasks, which Django 6 brings: install django>=6") from error


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
