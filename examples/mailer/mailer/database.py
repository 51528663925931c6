"""A connection for commands, and the tables."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

import asyncpg

import mailer
from mailer.services import Connection
from streamworker import Settings, embedded
from streamworker.settings import EMBEDDED

_LOCK = 7_265_107  # any number that nobody else takes


@asynccontextmanager
async def connected() -> AsyncIterator[Connection]:
    """A connection to ``DATABASE_URL``, or to the embedded server of ``REDIS_URL=embedded``."""
    settings = Settings.load()
    url, servers = settings.database_url, None
    if url is None and settings.redis_url == EMBEDDED:
        servers = embedded.acquire(settings.state_dir)
        url = servers.database_url
    connection = await asyncpg.connect(url or settings.require_database_url())
    try:
        yield connection
    finally:
        await connection.close()
        if servers is not None:
            servers.close()


async def migrate(pg: Connection) -> list[str]:
    """Apply what is missing of ``migrations/*.sql``, in order; returns the names. Safe when several do it at once."""
    done = []
    await pg.execute("select pg_advisory_lock($1)", _LOCK)
    try:
        await pg.execute(
            "create schema if not exists mailer;"
            "create table if not exists mailer.migrations (name text primary key, at timestamptz default now())"
        )
        known = {row["name"] for row in await pg.fetch("select name from mailer.migrations")}
        for name, sql in _migrations():
            if name not in known:
                async with pg.transaction():
                    await pg.execute(sql)
                    await pg.execute("insert into mailer.migrations (name) values ($1)", name)
                done.append(name)
    finally:
        await pg.execute("select pg_advisory_unlock($1)", _LOCK)
    return done


def _migrations() -> list[tuple[str, str]]:
    package = files(mailer)
    # In a wheel they lie inside the package; in a checkout beside it.
    for folder in (package.joinpath("_migrations"), Path(str(package)).parent / "migrations"):
        if folder.is_dir():
            found = [(each.name, each.read_text()) for each in folder.iterdir() if each.name.endswith(".sql")]
            return sorted(found)
    raise FileNotFoundError("this installation of the mailer has no migrations: install it again")
