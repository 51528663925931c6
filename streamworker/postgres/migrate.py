"""Migrations: numbered SQL files, applied once and in order, however many processes start at once.

A file runs in one transaction together with the note that it was applied. Its first line may be
``-- transaction: off`` (CREATE INDEX CONCURRENTLY); such a file holds statements that are safe to run again, parted by
lines ``-- next`` and sent one by one. Files that were applied must not change: their checksums are kept.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from time import monotonic
from typing import Final, Literal, TypeAlias, TypeVar

import anyio
import asyncpg
import msgspec

from streamworker.errors import ConfigurationError, StreamworkerError
from streamworker.postgres.pool import OwnConnection, connect
from streamworker.postgres.sqlstate import understood
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.migrate")

T = TypeVar("T")
Word: TypeAlias = Literal["applied", "missing", "drifted", "unknown"]

LOCK: Final = 0x73_77_6D_69_67  # "swmig": any number that no other program uses
"""The advisory lock by which migrators exclude each other."""
POLL: Final = 0.05
LOCK_WAIT: Final = 300.0
"""Seconds to wait for another migrator."""
TELL: Final = 1.0
"""Seconds after which it is said that another migrator is waited for, and who that is."""
AGAIN: Final = 30.0
"""Seconds between two such lines."""
_HOLDER: Final = """
select a.pid, a.application_name as application, host(a.client_addr) as address, a.state,
       extract(epoch from clock_timestamp() - a.state_change)::float8 as seconds
from pg_locks l join pg_stat_activity a using (pid)
where l.locktype = 'advisory' and l.granted and l.objsubid = 1
  and (l.classid::bigint << 32 | l.objid::bigint) = $1
  and l.database = (select oid from pg_database where datname = current_database())
limit 1
"""
_NAME: Final = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_OFF: Final = "-- transaction: off"
_NEXT: Final = re.compile(r"^-- next$", re.MULTILINE)
TABLE: Final = """create schema if not exists streamworker;
create table if not exists streamworker.schema_migrations (
  version integer primary key,
  name text not null,
  checksum text not null,
  applied_at timestamptz not null default now()
);
"""


def recorded(values: str) -> str:
    """The statement that records a migration, of its values: version, name, checksum."""
    return f"insert into streamworker.schema_migrations (version, name, checksum) values ({values})"  # noqa: S608


class Migration(msgspec.Struct, frozen=True):
    """One SQL file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, however its lines end."""
        return sha256(self.sql.encode()).hexdigest()

    @property
    def atomic(self) -> bool:
        """Whether it runs in a transaction."""
        return not self.sql.startswith(_OFF)

    @property
    def statements(self) -> list[str]:
        """Sent one by one: several statements sent together would run in a transaction."""
        return [self.sql] if self.atomic else _NEXT.split(self.sql)


class MigrationState(msgspec.Struct, frozen=True):
    """The state of one migration in the database: ``drifted`` was changed since, ``unknown`` is of a newer release."""

    version: int
    name: str
    state: Word
    applied_at: str | None = None


def shipped() -> list[Migration]:
    """The migrations of this release, in order.

    Raises:
        ConfigurationError: the installation lacks them.
    """
    package = files("streamworker")
    # In a wheel they are inside the package; in a checkout beside it.
    for folder in (package.joinpath("_migrations"), Path(str(package)).parent / "migrations"):
        found = load(folder)
        if found:
            return found
    raise ConfigurationError("this installation of streamworker has no migrations: install the wheel again")


def load(folder: Traversable) -> list[Migration]:
    """The migrations in a folder, in order; other files are ignored."""
    if not folder.is_dir():
        return []
    found = []
    for file in folder.iterdir():
        match = _NAME.fullmatch(file.name)
        if match is not None:
            sql = file.read_text("utf-8").replace("\r\n", "\n")
            found.append(Migration(int(match[1]), file.name.removesuffix(".sql"), sql))
    return sorted(found, key=lambda migration: migration.version)


def printed(migrations: Sequence[Migration]) -> str:
    """The whole schema as SQL, for ``psql -v ON_ERROR_STOP=1 -f``."""
    parts = [TABLE]
    for each in migrations:
        record = recorded(f"{each.version}, '{each.name}', '{each.checksum}'") + ";\n"
        body = f"-- {each.name}\n{each.sql.rstrip()}\n{record}"
        parts.append(f"begin;\n{body}commit;\n" if each.atomic else body)
    return "\n".join(parts)


class Migrator:
    """Migrates the schema of one database to this release.

    Args:
        url: the database, past any connection pooler.
        migrations: instead of those shipped.
    """

    def __init__(self, url: str, migrations: Sequence[Migration] | None = None) -> None:
        self._url = url
        self.migrations: Final = shipped() if migrations is None else list(migrations)

    async def up(self) -> list[str]:
        """Apply the missing migrations; returns the names of those applied by this call.

        Raises:
            ConfigurationError: an applied migration was changed since, this user may not, or the database is
                not encoded in UTF8.
            Unreachable: no server answers.
            StreamworkerError: a statement failed; the file's earlier statements were rolled back.
        """
        done = []
        async with self._connected() as connection:
            await _exclusively(connection, _make_table)
            for migration in self.migrations:
                with understood(f"applying the migration {migration.name}"):
                    if await _applied(connection, migration):
                        log.info("migrated", migration=migration.name)
                        done.append(migration.name)
        return done

    async def status(self) -> list[MigrationState]:
        """The state of each migration, in order.

        Raises:
            Unreachable: no server answers.
        """
        async with self._connected() as connection:
            try:
                rows = await connection.fetch(
                    "select version, name, checksum, applied_at from streamworker.schema_migrations"
                )
            except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                rows = []
        checksums = {migration.version: migration.checksum for migration in self.migrations}
        states = {each.version: MigrationState(each.version, each.name, "missing") for each in self.migrations}
        for row in rows:
            ours, at = checksums.get(row["version"]), row["applied_at"].isoformat(timespec="seconds")
            word: Word = "unknown" if ours is None else "applied" if ours == row["checksum"] else "drifted"
            states[row["version"]] = MigrationState(row["version"], row["name"], word, at)
        return sorted(states.values(), key=lambda state: state.version)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[OwnConnection]:
        connection = await connect(self._url, "migrations")
        try:
            with understood("migrating"):
                yield connection
        finally:
            await connection.close(timeout=5)


async def _make_table(connection: OwnConnection) -> None:
    # The table is looked up first: IF NOT EXISTS needs the right to create even if the table exists.
    if await connection.fetchval("select to_regclass('streamworker.schema_migrations')") is not None:
        return
    encoding = getattr(connection.get_settings(), "server_encoding", "UTF8")  # a pooler may not report it
    if encoding not in ("UTF8", "SQL_ASCII"):  # SQL_ASCII keeps all bytes as they are; initdb chooses it under locale C
        raise ConfigurationError(
            f"this database is encoded in {encoding}, which cannot hold what jobs may say: create one in UTF8 "
            "(create database NAME encoding 'UTF8' template template0) and name it in DATABASE_URL"
        )
    await connection.execute(TABLE)


async def _applied(connection: OwnConnection, migration: Migration) -> bool:
    """Apply one file and record it; False if it was applied before."""

    async def apply(connection: OwnConnection) -> bool:
        checksum = await connection.fetchval(
            "select checksum from streamworker.schema_migrations where version = $1", migration.version
        )
        if checksum is None:
            for statement in migration.statements:
                await connection.execute(statement)
            values = (migration.version, migration.name, migration.checksum)
            await connection.execute(recorded("$1, $2, $3"), *values)
        elif checksum != migration.checksum:
            raise ConfigurationError(
                f"the migration {migration.name} was changed after this database applied it: restore the file as it "
                "was released, and put what is new into a file of its own"
            )
        return checksum is None

    return await (_exclusively if migration.atomic else _exclusively_bare)(connection, apply)


async def _exclusively(connection: OwnConnection, work: Callable[[OwnConnection], Awaitable[T]]) -> T:
    """Run ``work`` in a transaction, one migrator at a time."""
    turn = _Turn(connection)
    while True:
        async with connection.transaction():
            # A lock of the transaction: it works through any pooler, and ends with its holder. Polled: a wait inside
            # PostgreSQL would hold a snapshot, and CREATE INDEX CONCURRENTLY waits for all of them: a deadlock.
            if await connection.fetchval("select pg_try_advisory_xact_lock($1)", LOCK):
                return await work(connection)
        await turn.wait()


async def _exclusively_bare(connection: OwnConnection, work: Callable[[OwnConnection], Awaitable[T]]) -> T:
    """The same outside a transaction."""
    turn = _Turn(connection)
    while not await connection.fetchval("select pg_try_advisory_lock($1)", LOCK):
        await turn.wait()
    try:
        return await work(connection)
    finally:
        if not connection.is_closed():
            await connection.fetchval("select pg_advisory_unlock($1)", LOCK)


class _Turn:
    """The wait for another migrator: said when it lasts, and bounded."""

    def __init__(self, connection: OwnConnection) -> None:
        self._connection = connection
        self._began = monotonic()
        self._tell_at = self._began + TELL

    async def wait(self) -> None:
        """Wait a little.

        Raises:
            StreamworkerError: it has lasted too long.
        """
        waited = monotonic() - self._began
        if waited > LOCK_WAIT:
            raise StreamworkerError(
                f"another migration has been running for {LOCK_WAIT:g} s ({await self._holder()}): end it if it is "
                "stuck (select pg_terminate_backend(PID)), then try again"
            )
        if monotonic() > self._tell_at:
            self._tell_at = monotonic() + AGAIN
            left = round(LOCK_WAIT - waited)
            log.warning("migration_waits", holder=await self._holder(), seconds=round(waited), gives_up_in=left)
        await anyio.sleep(POLL)

    async def _holder(self) -> str:
        row = await self._connection.fetchrow(_HOLDER, LOCK)
        if row is None:
            return "it has just ended"
        since = "" if row["seconds"] is None else f" for {row['seconds']:.0f} s"
        who, where = row["application"] or "unnamed", row["address"] or "this host"
        return f"PID {row['pid']}, {who} at {where}, {row['state'] or 'state unknown'}{since}"
