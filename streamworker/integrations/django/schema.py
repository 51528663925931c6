"""The ledger's migrations as migrations of Django: the SQL files stay the one truth, and each is applied once.

Both notes are kept: Django's, in ``django_migrations``, and ours, in ``streamworker.schema_migrations``. What
`streamworker migrate up` has applied, Django's ``migrate`` notes and leaves alone; and the other way round. Databases
that are no PostgreSQL are left alone, and so are those that a router keeps apart (``allow_migrate``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import migrations, router
from django.db.migrations.operations.base import Operation

from streamworker.errors import ConfigurationError
from streamworker.postgres.migrate import LOCK, LOCK_WAIT, POLL, TABLE, Migration, recorded, shipped


class ApplyFile(Operation):
    """Apply one SQL file, unless the database has it. There is no way back.

    Args:
        file: the name of a file of ours, without its ending.
    """

    reduces_to_sql = True
    reversible = False

    def __init__(self, file: str) -> None:
        self.file = file

    def state_forwards(self, app_label: str, state: Any) -> None:
        """There are no models."""

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Apply the file.

        Raises:
            ConfigurationError: the database has applied it, and it was changed since; or is not encoded in UTF8.
        """
        connection = schema_editor.connection
        if connection.vendor != "postgresql" or not router.allow_migrate(connection.alias, app_label):
            return
        migration = _file(self.file)
        if schema_editor.collect_sql:
            schema_editor.collected_sql += [TABLE, *migration.statements, _record(migration)]
            return
        with connection.cursor() as cursor, _turn(cursor, atomic=migration.atomic):
            if _is_applied(cursor, migration):
                return
            for statement in migration.statements:
                cursor.execute(statement)
            cursor.execute(_record(migration))

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """There is none: Django says so before."""

    def describe(self) -> str:
        """For ``migrate --plan``."""
        return f"streamworker: apply {self.file}.sql"


def migration_of(module: str) -> type[migrations.Migration]:
    """The migration of Django for one SQL file.

    Args:
        module: the name of the module that Django finds, which ends as the file is called.
    """
    name = module.rpartition(".")[2]
    names = [each.name for each in shipped()]
    before = names[: names.index(name)][-1:]
    return type(
        "Migration",
        (migrations.Migration,),
        {
            "__module__": module,
            "initial": not before,
            "atomic": _file(name).atomic,
            "dependencies": [("streamworker", each) for each in before],
            "operations": [ApplyFile(name)],
        },
    )


def _file(name: str) -> Migration:
    return next(each for each in shipped() if each.name == name)


def _record(migration: Migration) -> str:
    return recorded(f"{migration.version}, '{migration.name}', '{migration.checksum}'")


def _is_applied(cursor: Any, migration: Migration) -> bool:
    cursor.execute("select to_regclass('streamworker.schema_migrations'), current_setting('server_encoding')")
    table, encoding = cursor.fetchone()
    if table is None:
        if encoding not in ("UTF8", "SQL_ASCII"):
            raise ConfigurationError(f"this database is encoded in {encoding}: create one in UTF8")
        cursor.execute(TABLE)
    cursor.execute("select checksum from streamworker.schema_migrations where version = %s", [migration.version])
    row = cursor.fetchone()
    if row is not None and row[0] != migration.checksum:
        raise ConfigurationError(
            f"the migration {migration.name} was changed after this database applied it: restore the file as it was "
            "released, and put what is new into a file of its own"
        )
    return row is not None


@contextmanager
def _turn(cursor: Any, *, atomic: bool) -> Iterator[None]:
    """One migrator at a time: those of `streamworker migrate` and of other ``migrate`` wait for this one."""
    kind, give_up_at = "xact_lock" if atomic else "lock", time.monotonic() + LOCK_WAIT
    while True:
        # Polled: a wait inside PostgreSQL would hold a snapshot, for which CREATE INDEX CONCURRENTLY waits.
        cursor.execute(f"select pg_try_advisory_{kind}(%s)", [LOCK])
        if cursor.fetchone()[0]:
            break
        if time.monotonic() > give_up_at:
            raise ConfigurationError(f"another migration has been running for {LOCK_WAIT:g} s: end it if it is stuck")
        time.sleep(POLL)
    try:
        yield
    finally:
        if not atomic:
            cursor.execute("select pg_advisory_unlock(%s)", [LOCK])
