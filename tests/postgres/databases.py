"""Databases that tests share one after the other: emptied in between, which takes a tenth of the time of a new one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from uuid import uuid4

import anyio
import psycopg

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

DATABASE: Final = "row(datacl, datconnlimit, datallowconn)::text from pg_database where datname = current_database()"

SCHEMA: Final = (
    "select md5(string_agg(said, '' order by said)) from ("
    + " union all ".join(
        f"select '{catalog}' || (to_jsonb(each) - '{{{','.join(OF_STORAGE)}}}'::text[])::text as said from {catalog} each where {own}"
        for catalog, own in CATALOGS.items()
    )
    + f" union all select 'database' || {DATABASE}) as catalogs"
)
"""Every row of every catalog, in 17 ms."""

WRITES: Final = (
    "select array["
    + ", ".join(
        f"(select count(*) || ' ' || coalesce(max(xmin::text::bigint), 0) from {catalog} where {own})"
        for catalog, own in CATALOGS.items()
    )
    + f", (select {DATABASE})]"
)
"""How many rows each catalog has, and which transaction wrote the last of them, in 1 ms: while that is the same, so is `SCHEMA`."""

END: Final = """
select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
"""

NEWER: Final = """
select array(select format('schema %%I', nspname) from pg_namespace where oid > %(last)s and nspname !~ '^pg_')
  || array(select format('table if exists %%s', oid::regclass) from pg_class
    where oid > %(last)s and relkind in ('r', 'p') and relpersistence <> 't')
  || array(select format('function if exists %%s', oid::regprocedure) from pg_proc where oid > %(last)s)
"""
"""What is newer than the database, as ``drop`` wants it."""

FILLED: Final = """
select array(select format(case when pg_relation_size(oid) < 10 * 8192 and pg_table_size(oid) < 20 * 8192
      then 'delete from %s' else 'truncate %s restart identity cascade' end, oid::regclass) from pg_class
    where oid >= 16384 and relkind = 'r' and relnamespace <> 'pg_toast'::regnamespace
      and relname <> 'schema_migrations' and pg_relation_size(oid) > 0)
  || array(select format('select setval(''%s'', %s, false)', seqrelid::regclass, seqstart) from pg_sequence
    where pg_sequence_last_value(seqrelid) is not null)
"""
"""Statements that empty each table that ever had a row, and start the sequences anew. To truncate means new files for a table and
its eleven indexes, 6 ms; rows that were deleted are not seen, by the planner neither: it takes any table below ten pages for
one of ten."""

MIGRATIONS: Final = (
    "select coalesce(md5(string_agg(each::text, '' order by version)), '') from streamworker.schema_migrations each"
)

CLEANER: Final = "tests, cleaning"
"""The name of the session that stays in a database; tests that count sessions leave it out."""


def beside(work: Any, *args: Any) -> Any:
    """Run a coroutine function though this thread may run an event loop: fixtures are made in any order."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(anyio.run, work, *args).result()


def admin(server: PostgresServer, *statements: str) -> None:
    """Run statements in the database ``postgres``."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


class _Session:
    """A session that stays in a database: the caches of a new one cost more than all that it does here.

    Args:
        url: of the database.
    """

    def __init__(self, url: str) -> None:
        # Without triggers and foreign keys, and whatever a test made the default of the server.
        options = (
            "-c session_replication_role=replica -c default_transaction_read_only=off -c client_min_messages=warning"
        )
        self._connection = psycopg.connect(url, autocommit=True, application_name=CLEANER, options=options)

    def ask(self, query: str) -> Any:
        """The one value that a query answers; it is planned once."""
        (answer,) = self._connection.execute(query, prepare=True).fetchone() or (None,)
        return answer

    def empty(self, last: int) -> None:
        """End all other sessions, drop what is newer than ``last``, and empty every table."""
        late = time.monotonic() + 10
        # Not by PostgreSQL's own wait: that looks ten times a second, and takes a process with a number used again for the old one.
        while self.ask(END) and time.monotonic() < late:
            time.sleep(0.001)
        for each in self.ask(NEWER % {"last": last}):
            self._connection.execute(f"drop {each} cascade")
        if statements := self.ask(FILLED):
            self._connection.execute(";".join(statements))

    def close(self) -> None:
        self._connection.close()


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
        self._sessions: dict[str, _Session] = {}
        self._writes: dict[str, Any] = {}  # of those that were as new
        self._free: list[str] = []

    def take(self) -> str:
        """The name of a database that is as new."""
        if not self._whole:
            self._make_template()
        if self._free:
            return self._free.pop()
        name = self._name or f"test_{uuid4().hex[:12]}"
        admin(
            self._server,
            f"drop database if exists {name} with (force)",
            f"create database {name} template {self._template}",
        )
        session = self._sessions[name] = _Session(self._server.url(name))
        self._writes[name] = session.ask(WRITES)
        return name

    def give_back(self, name: str) -> None:
        """Keep it for the next test if it can be made as new; or drop it."""
        try:
            good = self._empty(name)
        except psycopg.Error:
            good = False
        if good:
            self._free.append(name)
        else:
            self._sessions.pop(name).close()
            admin(self._server, f"drop database if exists {name} with (force)")

    def _make_template(self) -> None:
        admin(self._server, f"create database {self._template}")
        if self._migrated:
            beside(Migrator(self._server.url(self._template)).up)
        session = _Session(self._server.url(self._template))
        self._whole = self._describe(session)
        self._last = session.ask("select greatest(max(c.oid), (select max(oid) from pg_proc)) from pg_class c")
        session.close()

    def _describe(self, session: _Session) -> str:
        return str(session.ask(SCHEMA)) + self._migrations(session)

    def _migrations(self, session: _Session) -> str:
        return str(session.ask(MIGRATIONS)) if self._migrated else ""

    def _empty(self, name: str) -> bool:
        """Empty the database; whether it is as new then."""
        session = self._sessions[name]
        try:
            session.empty(self._last)
        except psycopg.OperationalError:  # the test ended it, or its server
            session.close()
            session = self._sessions[name] = _Session(self._server.url(name))
            session.empty(self._last)
        writes = session.ask(WRITES)
        if writes == self._writes[name]:
            return self._whole.endswith(self._migrations(session))
        self._writes[name] = writes
        return self._describe(session) == self._whole

    def close(self) -> None:
        """End the sessions."""
        for session in self._sessions.values():
            session.close()


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
        self._databases.take()
        return self._server

    def give_back(self) -> None:
        """Make it whole for the next test."""
        server = self._server
        assert server is not None
        server.resume()
        if not server.alive:
            server.start()  # in this thread: a server ends with the thread that started it
        try:
            self._mend(server)
            whole = not server.listens
        except psycopg.Error:
            whole = False
        if whole:
            self._databases.give_back("streamworker")
        else:
            self.close()

    def _mend(self, server: PostgresServer) -> None:
        options = "-c default_transaction_read_only=off"
        with psycopg.connect(server.url(), autocommit=True, options=options) as connection:
            connection.execute("alter system reset all")
            connection.execute("select pg_reload_conf()")
            roles = "select quote_ident(rolname) from pg_roles where oid >= 16384 and rolname <> %s"
            for (role,) in connection.execute(roles, [PG_USER]).fetchall():
                connection.execute(f"drop owned by {role} cascade; drop role {role}")

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._databases.close()
            self._server.kill()
            self._server = None
