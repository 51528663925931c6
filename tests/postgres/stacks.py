"""Each library's connections and sessions behind one face: what every adapter promises is tested once, for all of them.

The coroutines of stacks that block never suspend; statements that wait for another transaction belong into a thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

import asyncpg
import django
import django.db
import psycopg
import psycopg_pool
import pytest
import sqlalchemy
from django.conf import settings
from django.db.backends.signals import connection_created
from django.test.utils import override_settings
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from streamworker import App


class Stack:
    """A library, and one sort of its connections."""

    name: ClassVar[str]
    blocking: ClassVar[bool] = False
    broken: ClassVar[tuple[type[BaseException], ...]]
    """What a deferred constraint that does not hold raises at commit."""
    patience: float = 5.0
    """Seconds a pool waits for a server that is away."""

    @asynccontextmanager
    async def source(self, url: str) -> AsyncIterator[Any]:
        """What ``ctx.transaction()`` takes."""
        raise NotImplementedError
        yield

    @asynccontextmanager
    async def open(self, source: Any) -> AsyncIterator[Any]:
        """A connection or session, in a transaction."""
        raise NotImplementedError
        yield

    @asynccontextmanager
    async def autocommitting(self, url: str) -> AsyncIterator[Any]:
        """A connection that commits each statement by itself."""
        raise NotImplementedError
        yield

    async def execute(self, given: Any, statement: str) -> Any:
        raise NotImplementedError

    async def commit(self, given: Any) -> None:
        raise NotImplementedError

    async def rollback(self, given: Any) -> None:
        raise NotImplementedError

    def savepoint(self, given: Any) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    async def enqueue_all(self, app: App[Any], given: Any, payloads: Sequence[Any]) -> None:
        """Enqueue payloads in the transaction."""
        if self.blocking:
            for each in payloads:
                app.enqueue_blocking(each, connection=given)
        else:
            await app.enqueue_many(payloads, connection=given)


class Asyncpg(Stack):
    name = "asyncpg"
    broken = (asyncpg.UniqueViolationError,)

    @asynccontextmanager
    async def source(self, url):
        async with asyncpg.create_pool(url, min_size=0, max_size=3) as pool:
            yield pool
            pool.terminate()

    @asynccontextmanager
    async def open(self, source):
        async with source.acquire() as connection:
            self.transaction = connection.transaction()
            await self.transaction.start()
            yield connection

    @asynccontextmanager
    async def autocommitting(self, url):
        connection = await asyncpg.connect(url)
        yield connection
        await connection.close()

    async def execute(self, given, statement):
        await given.execute(statement)

    async def commit(self, given):
        await self.transaction.commit()

    async def rollback(self, given):
        await self.transaction.rollback()

    def savepoint(self, given):
        return given.transaction()


class Psycopg(Stack):
    name = "psycopg"
    broken = (psycopg.errors.UniqueViolation,)

    @asynccontextmanager
    async def source(self, url):
        async with psycopg_pool.AsyncConnectionPool(
            url, min_size=0, max_size=3, open=False, timeout=self.patience
        ) as pool:
            yield pool

    @asynccontextmanager
    async def open(self, source):
        async with source.connection() as connection:
            yield connection

    @asynccontextmanager
    async def autocommitting(self, url):
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            yield connection

    async def execute(self, given, statement):
        await given.execute(statement)

    async def commit(self, given):
        await given.commit()

    async def rollback(self, given):
        await given.rollback()

    def savepoint(self, given):
        return given.transaction()


class BlockingPsycopg(Stack):
    name = "psycopg-blocking"
    blocking = True
    broken = (psycopg.errors.UniqueViolation,)

    @asynccontextmanager
    async def source(self, url):
        with psycopg_pool.ConnectionPool(url, min_size=0, max_size=3, open=False, timeout=self.patience) as pool:
            yield pool

    @asynccontextmanager
    async def open(self, source):
        with source.connection() as connection:
            yield connection

    @asynccontextmanager
    async def autocommitting(self, url):
        with psycopg.connect(url, autocommit=True) as connection:
            yield connection

    async def execute(self, given, statement):
        given.execute(statement)

    async def commit(self, given):
        given.commit()

    async def rollback(self, given):
        given.rollback()

    @asynccontextmanager
    async def savepoint(self, given):
        with given.transaction():
            yield


class AsyncSqlalchemy(Stack):
    """An ``AsyncSession`` by a driver, or an ``AsyncConnection``."""

    broken = (sqlalchemy.exc.IntegrityError,)

    def __init__(self, driver: str, made: str) -> None:
        self.driver, self.made = driver, made
        self.name = f"sqlalchemy-{made}-{driver}"

    def engine(self, url: str, **options: Any) -> AsyncEngine:
        if self.driver == "asyncpg":
            url = url.replace("sslmode=", "ssl=")  # which SQLAlchemy hands to asyncpg as it is
        return create_async_engine(
            url.replace("postgresql://", f"postgresql+{self.driver}://"), poolclass=NullPool, **options
        )

    @asynccontextmanager
    async def source(self, url):
        engine = self.engine(url)
        match self.made:
            case "session":
                yield async_sessionmaker(engine)
            case "scoped":
                yield async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
            case _:
                yield engine
        await engine.dispose()

    @asynccontextmanager
    async def open(self, source):
        if isinstance(source, async_scoped_session):
            try:
                yield source
            finally:
                await source.remove()
        else:
            async with source.connect() if isinstance(source, AsyncEngine) else source() as given:
                yield given

    @asynccontextmanager
    async def autocommitting(self, url):
        engine = self.engine(url, isolation_level="AUTOCOMMIT")
        async with AsyncSession(engine) if self.made != "connection" else engine.connect() as given:
            yield given
        await engine.dispose()

    async def execute(self, given, statement):
        await given.execute(sqlalchemy.text(statement))

    async def commit(self, given):
        await given.commit()

    async def rollback(self, given):
        await given.rollback()

    def savepoint(self, given):
        return given.begin_nested()


class BlockingSqlalchemy(Stack):
    """A ``Session``, or a ``Connection``, by psycopg."""

    blocking = True
    broken = (sqlalchemy.exc.IntegrityError,)

    def __init__(self, made: str) -> None:
        self.made = made
        self.name = f"sqlalchemy-{made}-blocking"

    def engine(self, url: str, **options: Any) -> sqlalchemy.Engine:
        return sqlalchemy.create_engine(
            url.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool, **options
        )

    @asynccontextmanager
    async def source(self, url):
        engine = self.engine(url)
        match self.made:
            case "session":
                yield sessionmaker(engine)
            case "scoped":
                yield scoped_session(sessionmaker(engine))
            case _:
                yield engine
        engine.dispose()

    @asynccontextmanager
    async def open(self, source):
        if isinstance(source, scoped_session):
            try:
                yield source
            finally:
                source.remove()
        else:
            with source.connect() if isinstance(source, sqlalchemy.Engine) else source() as given:
                yield given

    @asynccontextmanager
    async def autocommitting(self, url):
        engine = self.engine(url, isolation_level="AUTOCOMMIT")
        with Session(engine) if self.made != "connection" else engine.connect() as given:
            yield given
        engine.dispose()

    async def execute(self, given, statement):
        given.execute(sqlalchemy.text(statement))

    async def commit(self, given):
        given.commit()

    async def rollback(self, given):
        given.rollback()

    @asynccontextmanager
    async def savepoint(self, given):
        with given.begin_nested():
            yield


class Django(Stack):
    """``django.db.connection``, in the thread that asks."""

    name = "django"
    blocking = True
    broken = (django.db.IntegrityError,)

    def configure(self, url: str, **options: Any) -> None:
        """Make Django's connections lead there."""
        # Tests use its connections on the thread of their event loop; handlers do not.
        os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
        parts, query = urlsplit(url), dict(parse_qsl(urlsplit(url).query))
        database = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": parts.path.removeprefix("/"),
            "USER": parts.username or "",
            "HOST": query.get("host") or parts.hostname or "",
            "PORT": str(query.get("port") or parts.port or ""),
            "OPTIONS": {"sslmode": "disable"},
            **options,
        }
        if not settings.configured:
            settings.configure(DATABASES={"default": database}, USE_TZ=True)
            django.setup()
        self.close()
        django.db.connections.settings["default"] = {**django.db.connections.settings["default"], **database}

    @staticmethod
    def close() -> None:
        """Close this thread's connection, and forget it: the next one is made by the settings of then."""
        django.db.connections["default"].close()
        del django.db.connections["default"]

    @asynccontextmanager
    async def source(self, url):
        self.configure(url)
        made: list[psycopg.Connection] = []

        def keep(connection: Any, **_: Any) -> None:
            made.append(connection.connection)

        connection_created.connect(keep)
        try:
            yield django.db.connection
        finally:
            connection_created.disconnect(keep)
            self.close()
            for each in made:  # also of threads: they end without closing theirs
                each.close()

    @asynccontextmanager
    async def open(self, source):
        self.block = django.db.transaction.atomic()
        self.block.__enter__()
        try:
            yield source
        finally:
            if self.block is not None:
                await self.rollback(source)

    @asynccontextmanager
    async def autocommitting(self, url):
        async with self.source(url) as source:
            yield source

    async def execute(self, given, statement):
        with given.cursor() as cursor:
            cursor.execute(statement)

    async def commit(self, given):
        if self.block is None:  # of ctx.transaction()
            django.db.transaction.commit()
            return
        block, self.block = self.block, None
        block.__exit__(None, None, None)

    async def rollback(self, given):
        block, self.block = self.block, None
        django.db.transaction.set_rollback(True)
        block.__exit__(None, None, None)

    block: Any = None

    @asynccontextmanager
    async def savepoint(self, given):
        with django.db.transaction.atomic():
            yield


class DjangoTasks(Django):
    """A task of Django 6 in place of each job: its backend enqueues, and its worker runs it in a transaction (``atomic``)."""

    name = "django-tasks"

    def configure(self, url: str, **options: Any) -> None:
        super().configure(url, **options)
        chosen = {"modules": ["tests.postgres.django.turmoil_tasks"], "atomic": True}
        backend = {
            "BACKEND": "streamworker.integrations.django.StreamworkerBackend",
            "QUEUES": ["writes"],
            "OPTIONS": chosen,
        }
        self.settings = override_settings(TASKS={"default": backend})
        self.settings.enable()

    @asynccontextmanager
    async def source(self, url):
        async with super().source(url) as source:
            yield source
        self.settings.disable()

    async def enqueue_all(self, app, given, payloads):
        from tests.postgres.django.turmoil_tasks import write  # with these settings

        for each in payloads:
            write.enqueue(each.n)


STACKS: list[Stack] = [
    Asyncpg(),
    Psycopg(),
    BlockingPsycopg(),
    *(AsyncSqlalchemy(driver, made) for driver in ("asyncpg", "psycopg") for made in ("session", "connection")),
    AsyncSqlalchemy("asyncpg", "scoped"),
    *(BlockingSqlalchemy(made) for made in ("session", "connection", "scoped")),
    Django(),
]

BY_DEFAULT = {
    "asyncpg", "psycopg", "psycopg-blocking", "sqlalchemy-session-asyncpg", "sqlalchemy-connection-psycopg",
    "sqlalchemy-session-blocking", "django",
}  # fmt: skip
"""Each adapter of ours once, each driver below it, and a connection as well as a session."""


def params(*more: str, only: Callable[[Stack], bool] = lambda _: True) -> list[Any]:
    """All stacks as parameters of a test: those `BY_DEFAULT` and ``more``, the others with ``--all``."""
    usual = BY_DEFAULT | {*more}
    return [
        pytest.param(each, id=each.name, marks=() if each.name in usual else pytest.mark.all)
        for each in STACKS
        if only(each)
    ]


ERRORS = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    psycopg.Error,
    sqlalchemy.exc.SQLAlchemyError,
    django.db.Error,
)
"""What the libraries raise when their server is away."""


def stack_of(name: str) -> Stack:
    """The stack of this name."""
    return next(each for each in [*STACKS, DjangoTasks()] if each.name == name)
