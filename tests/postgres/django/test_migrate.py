"""Django's ``migrate`` and `streamworker migrate up` apply the same files, and see each other's work."""

from __future__ import annotations

import importlib
import pkgutil
from concurrent.futures import ThreadPoolExecutor

import asyncpg
import django
import pytest
from django.utils.module_loading import import_string

from streamworker.postgres.migrate import Migrator, shipped
from tests.postgres.django.project import Project

# Each starts programs that import Django.
pytestmark = pytest.mark.timeout(240)

NAMES = [each.name for each in shipped()]


@pytest.fixture
def project(tmp_path, empty_database):
    """With an empty database; no Redis is asked."""
    made = Project(tmp_path, empty_database, "redis://127.0.0.1:1/0")
    if django.VERSION < (6,):
        (tmp_path / "shop/tasks.py").write_text("")
    return made


async def fetch(url, statement):
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def applied(url):
    """(what streamworker has noted, what Django has)."""
    ours = await fetch(url, "select name, checksum from streamworker.schema_migrations order by version")
    assert ours == [(each.name, each.checksum) for each in shipped()]
    theirs = await fetch(url, "select name from django_migrations where app = 'streamworker' order by id")
    return [name for name, _ in ours], [name for (name,) in theirs]


SHAPE = """
select table_name, column_name, data_type, is_nullable from information_schema.columns where table_schema = 'streamworker'
union all select 'index', indexname, indexdef, '' from pg_indexes where schemaname = 'streamworker'
union all select 'function', proname, md5(prosrc), '' from pg_proc where pronamespace = 'streamworker'::regnamespace
order by 1, 2, 3"""


@pytest.mark.skipif(django.VERSION >= (6,), reason="this Django has tasks")
def test_an_older_django_is_told_what_tasks_need():
    with pytest.raises(ImportError, match="needs django.tasks, which Django 6 brings: install django>=6"):
        import_string("streamworker.integrations.django.StreamworkerBackend")


def test_each_sql_file_is_a_migration():
    from streamworker.integrations.django import migrations

    assert sorted(each.name for each in pkgutil.iter_modules(migrations.__path__)) == NAMES
    assert importlib.import_module(f"{migrations.__name__}.{NAMES[1]}").Migration.dependencies == [
        ("streamworker", NAMES[0])
    ]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{migrations.__name__}.0000_nothing")


async def test_an_empty_database(project, empty_database, database_url):
    done = project.manage("migrate", "--no-input")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.endswith("OK")] == [
        f"streamworker.{n}..." for n in NAMES
    ]
    assert await applied(empty_database) == (NAMES, NAMES)
    assert {state.state for state in await Migrator(empty_database).status()} == {"applied"}
    assert await Migrator(empty_database).up() == []
    assert await fetch(empty_database, SHAPE) == await fetch(database_url, SHAPE)
    assert "No migrations to apply" in project.manage("migrate", "--no-input").stdout
    assert project.manage("makemigrations", "--check", "--dry-run").returncode == 0
    assert project.manage("check").returncode == 0


async def test_a_database_that_streamworker_has_migrated(project, empty_database):
    first = shipped()[:5]
    assert await Migrator(empty_database, first).up() == NAMES[:5]
    done = project.manage("migrate", "--no-input")
    assert done.returncode == 0, done.stderr
    assert await applied(empty_database) == (NAMES, NAMES)


async def test_django_stops_half_way_and_streamworker_goes_on(project, empty_database):
    done = project.manage("migrate", "streamworker", NAMES[3])
    assert done.returncode == 0, done.stderr
    assert await Migrator(empty_database).up() == NAMES[4:]
    assert project.manage("migrate", "--no-input").returncode == 0
    assert await applied(empty_database) == (NAMES, NAMES)


async def test_both_at_once(project, empty_database):
    with ThreadPoolExecutor(2) as threads:
        django = threads.submit(project.manage, "migrate", "--no-input")
        await Migrator(empty_database).up()
        assert django.result().returncode == 0, django.result().stderr
    assert await applied(empty_database) == (NAMES, NAMES)


async def test_a_file_that_was_changed_since_is_refused(project, empty_database):
    await Migrator(empty_database).up()
    await fetch(empty_database, "update streamworker.schema_migrations set checksum = 'x' where version = 2")
    done = project.manage("migrate", "--no-input")
    assert (
        done.returncode != 0 and f"the migration {NAMES[1]} was changed after this database applied it" in done.stderr
    )
    theirs = await fetch(empty_database, "select name from django_migrations where app = 'streamworker'")
    assert theirs == [(NAMES[0],)]


async def test_there_is_no_way_back(project, empty_database):
    assert project.manage("migrate", "--no-input").returncode == 0
    done = project.manage("migrate", "streamworker", "zero")
    assert done.returncode != 0 and "IrreversibleError" in done.stderr
    assert await applied(empty_database) == (NAMES, NAMES)


async def test_sqlmigrate_prints_the_file(project, empty_database):
    said = project.manage("sqlmigrate", "streamworker", NAMES[0]).stdout
    assert shipped()[0].sql.strip().splitlines()[-1] in said and shipped()[0].checksum in said
    assert await fetch(empty_database, "select to_regclass('streamworker.jobs')") == [(None,)]


async def test_other_databases_are_left_alone(tmp_path):
    other = f"DATABASES = {{'default': {{'ENGINE': 'django.db.backends.sqlite3', 'NAME': {str(tmp_path / 'db')!r}}}}}"
    project = Project(tmp_path, "postgresql://nobody@nowhere/nothing", "redis://127.0.0.1:1/0", more=other)
    done = project.manage("migrate", "--no-input")
    assert done.returncode == 0, done.stderr
