"""Databases: one PostgreSQL per test process, one database per test, copied from one that is migrated."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import asyncpg
import pytest

from streamworker.postgres.migrate import Migrator
from tests.postgres.servers import PostgresServer


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


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[PostgresServer]:
    """A server of this test's own: it may be killed and started again. Its database is migrated."""
    server = PostgresServer(tmp_path / "pg")
    beside(Migrator(server.url()).up)
    try:
        yield server
    finally:
        server.kill()


def beside(work: Any, *args: Any) -> None:
    """Run a coroutine function though this thread may run an event loop: fixtures are made in any order."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(anyio.run, work, *args).result()


async def _admin(server: PostgresServer, *statements: str) -> None:
    connection = await asyncpg.connect(server.url("postgres"))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def template(postgres: PostgresServer) -> str:
    """The name of a migrated database to copy."""

    async def make() -> None:
        await _admin(postgres, "create database migrated")
        await Migrator(postgres.url("migrated")).up()

    beside(make)
    return "migrated"


@pytest.fixture
def empty_database(postgres: PostgresServer) -> Iterator[str]:
    """The URL of a database without the schema."""
    name = f"test_{uuid4().hex[:12]}"
    beside(_admin, postgres, f"create database {name}")
    yield postgres.url(name)
    beside(_admin, postgres, f"drop database {name} with (force)")


@pytest.fixture
def database_url(postgres: PostgresServer, template: str) -> Iterator[str]:
    """The URL of a migrated, empty database."""
    name = f"test_{uuid4().hex[:12]}"
    beside(_admin, postgres, f"create database {name} template {template}")
    yield postgres.url(name)
    beside(_admin, postgres, f"drop database {name} with (force)")


@pytest.fixture
async def pg(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection to that database, to do what users do and to look at rows."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()
