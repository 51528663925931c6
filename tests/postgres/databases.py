"""Databases that tests share one after the other: emptied in between, which takes a tenth of the time of a new one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from uuid import uuid4

import anyio
import asyncpg

from streamworker.embedded.layout import PG_USER
from streamworker.postgres.migrate import Migrator
from tests.postgres.servers import PostgresServer

CATALOGS: Final = {
    "pg_class": "oid >= 16384", "pg_attribute": "attrelid >= 16384", "pg_attrdef": "true", "pg_constraint": "oid >= 16384",
    "pg_trigger": "true", "pg_proc": "oid >= 16384", "pg_namespace": "nspname !~ '^pg_(toast_)?temp_'", "pg_type": "oid >= 16384",
    "pg_index": "indexrelid >= 16384", "pg_extension": "true", "pg_default_acl": "true", "pg_policy": "true",
    "pg_rewrite": "oid >= 16384", "pg_event_trigger": "true", "pg_publication": "true", "pg_cast": "oid >= 16384",
    "pg_operator": "oid >= 16384", "pg_collation": "oid >= 16384", "pg_language": "true", "pg_largeobject_metadata": "true",
    "pg_statistic_ext": "true", "pg_foreign_server": "true", "pg_seclabel": "true", "pg_description": "objoid >= 16384",
    "pg_statistic": "starelid >= 16384",
    "pg_db_role_setting": "setdatabase in (0, (select oid from pg_database where datname = current_database()))",
}  # fmt: skip
"""What a database consists of besides its rows: each catalog, and which of its rows are not PostgreSQL's own."""

OF_STORAGE: Final = (
    "relfilenode", "relpages", "reltuples", "relallvisible", "relallfrozen", "relfrozenxid", "relminmxid", "setdatabase"
)  # fmt: skip
"""What differs between a table that was emptied and one that never held a row."""

SCHEMA: Final = (
    "select md5(string_agg(said, '' order by said)) from ("
    + " union all ".join(
        f"select '{catalog}' || (to_jsonb(each) - '{{{','.join(OF_STORAGE)}}}'::text[])::text as said from {catalog} each where {own}"
        for catalog, own in CATALOGS.items()
    )
    + " union all select 'database' || row(datacl, datconnlimit, datallowconn)::text from pg_database where datname = current_database()"
    ") as catalogs"
)

EMPTY: Final = """
do $$ declare each record; filled text; begin
  perform pg_terminate_backend(pid, 10000) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid();
  for each in select nspname from pg_namespace where oid > %(last)s and nspname !~ '^pg_' loop
    execute format('drop schema %%I cascade', each.nspname);
  end loop;
  for each in select oid::regclass as name from pg_class where oid > %(last)s and relkind in ('r', 'p') and relpersistence <> 't' loop
    execute format('drop table if exists %%s cascade', each.name);
  end loop;
  for each in select oid::regprocedure as name from pg_proc where oid > %(last)s loop
    execute format('drop function if exists %%s cascade', each.name);
  end loop;
  select string_agg(oid::regclass::text, ', ') into filled from pg_class
    where oid >= 16384 and relkind = 'r' and relnamespace <> 'pg_toast'::regnamespace
      and relname <> 'schema_migrations' and pg_relation_size(oid) > 0;
  if filled is not null then
    execute 'truncate ' || filled || ' restart identity';
  end if;
end $$
"""
"""End all other sessions, drop what is newer than the database, and truncate every table that ever had a row."""

MIGRATIONS: Final = (
    "select coalesce(md5(string_agg(each::text, '' order by version)), '') from streamworker.schema_migrations each"
)


def beside(work: Any, *args: Any) -> Any:
    """Run a coroutine function though this thread may run an event loop: fixtures are made in any order."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(anyio.run, work, *args).result()


async def admin(server: PostgresServer, *statements: str) -> None:
    """Run statements in the database ``postgres``."""
    connection = await asyncpg.connect(server.url("postgres"))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


class Databases:
    """Databases of one kind in one server, all alike: each is given to one test at a time.

    Args:
        server: where they are.
        migrated: whether they have the schema.
        name: of the only one, instead of any number with names of their own.
    """

    def __init__(self, server: PostgresServer, *, migrated: bool, name: str | None = None) -> None:
        self._server = server
        self._migrated = migrated
        self._name = name
        self._template = f"{'migrated' if migrated else 'bare'}_{uuid4().hex[:12]}"
        self._whole = ""  # what the catalogs of one say that is as new
        self._last = 0
        self._kept: list[str] = []

    async def take(self) -> str:
        """The name of a database that is as new."""
        if not self._whole:
            await self._make_template()
        if self._kept:
            return self._kept.pop()
        name = self._name or f"test_{uuid4().hex[:12]}"
        await admin(
            self._server,
            f"drop database if exists {name} with (force)",
            f"create database {name} template {self._template}",
        )
        return name

    async def give_back(self, name: str) -> None:
        """Keep it for the next test if it can be made as new; or drop it."""
        try:
            good = await self._empty(name)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            good = False
        if good:
            self._kept.append(name)
        else:
            await admin(self._server, f"drop database if exists {name} with (force)")

    async def _make_template(self) -> None:
        await admin(self._server, f"create database {self._template}")
        if self._migrated:
            await Migrator(self._server.url(self._template)).up()
        connection = await asyncpg.connect(self._server.url(self._template))
        try:
            self._whole = await self._describe(connection)
            self._last = await connection.fetchval(
                "select greatest(max(c.oid), (select max(oid) from pg_proc)) from pg_class c"
            )
        finally:
            await connection.close()

    async def _describe(self, connection: Any) -> str:
        return str(await connection.fetchval(SCHEMA)) + (
            await connection.fetchval(MIGRATIONS) if self._migrated else ""
        )

    async def _empty(self, name: str) -> bool:
        connection = await asyncpg.connect(self._server.url(name))
        try:
            await connection.execute(EMPTY % {"last": self._last})
            return await self._describe(connection) == self._whole
        finally:
            await connection.close()


class Killable:
    """A server that tests may kill, freeze, break and start again; its database ``streamworker`` is migrated.

    After each test it is made whole. What cannot be made whole is thrown away with its server.
    """

    def __init__(self, directory: Any) -> None:
        self._directory = directory
        self._server: PostgresServer | None = None
        self._databases: Any = None
        self._made = 0

    def take(self) -> PostgresServer:
        """The server, as new."""
        if self._server is None:
            self._made += 1
            self._server = PostgresServer(self._directory / str(self._made))
            self._databases = Databases(self._server, migrated=True, name="streamworker")
        beside(self._databases.take)
        return self._server

    def give_back(self) -> None:
        """Make it whole for the next test."""
        server = self._server
        assert server is not None
        server.resume()
        if not server.alive:
            server.start()  # in this thread: a server ends with the thread that started it
        try:
            beside(self._mend, server)
            whole = not server.listens
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            whole = False
        if whole:
            beside(self._databases.give_back, "streamworker")
        else:
            self.close()

    async def _mend(self, server: PostgresServer) -> None:
        connection = await asyncpg.connect(server.url(), server_settings={"default_transaction_read_only": "off"})
        try:
            await connection.execute("alter system reset all")
            await connection.execute("select pg_reload_conf()")
            for (role,) in await connection.fetch(
                "select quote_ident(rolname) from pg_roles where oid >= 16384 and rolname <> $1", PG_USER
            ):
                await connection.execute(f"drop owned by {role} cascade; drop role {role}")
        finally:
            await connection.close()

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.kill()
            self._server = None
