"""Databases: one PostgreSQL per test process, and one database per test that is as new."""

from __future__ import annotations

import pkgutil
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.postgres.databases import Databases, Killable
from tests.postgres.servers import PostgresServer

WAITS = {
    "streamworker.loops.FIRST": 0.1,
    "streamworker.relay.loss_detector.LOOK": 0.4,
    "streamworker.postgres.outbox.RETRY": 0.3,
    "streamworker.worker.recorder.AGAIN_AFTER": 0.5,
    "streamworker.worker.recorder.BUSY_PAUSE": 0.3,
    "streamworker.worker.lookup.LONG": 0.3,
    "streamworker.worker.lookup.INTERVAL": 0.1,
}
"""Seconds between tries and looks, of which tests want the next one and not the distance."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in WAITS.items():
        assert isinstance(pkgutil.resolve_name(name), float), name
        monkeypatch.setattr(name, seconds)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One real server for this process."""
    directory = Path(tempfile.mkdtemp(prefix="streamworker-pg-"))
    server = PostgresServer(directory)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def killable() -> Iterator[Killable]:
    """A second server, that tests may kill."""
    directory = Path(tempfile.mkdtemp(prefix="streamworker-pg-"))
    killable = Killable(directory)
    try:
        yield killable
    finally:
        killable.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def own_postgres(killable: Killable) -> Iterator[PostgresServer]:
    """A server of this test's own: it may be killed and started again. Its database is migrated."""
    yield killable.take()
    killable.give_back()


@pytest.fixture(scope="session")
def migrated(postgres: PostgresServer) -> Iterator[Databases]:
    """Databases with the schema."""
    databases = Databases(postgres, migrated=True)
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def bare(postgres: PostgresServer) -> Iterator[Databases]:
    """Databases without the schema."""
    databases = Databases(postgres, migrated=False)
    yield databases
    databases.close()


@pytest.fixture
def empty_database(postgres: PostgresServer, bare: Databases) -> Iterator[str]:
    """The URL of a database without the schema."""
    name = bare.take()
    yield postgres.url(name)
    bare.give_back(name)


@pytest.fixture
def database_url(postgres: PostgresServer, migrated: Databases) -> Iterator[str]:
    """The URL of a migrated, empty database."""
    name = migrated.take()
    yield postgres.url(name)
    migrated.give_back(name)


@pytest.fixture
async def pg(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection to that database, to do what users do and to look at rows."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()
