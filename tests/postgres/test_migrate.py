"""Migrations: once and in order, however many start at once; what drifted is told; print is SQL that works."""

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path

import asyncpg
import pytest

from streamworker import App, Payload, Settings
from streamworker.embedded.binaries import find_binaries
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable
from streamworker.postgres import migrate
from streamworker.postgres.migrate import LOCK, Migration, Migrator, load, printed, shipped
from tests import forkserver, inprocess

ROOT = Path(__file__).parents[2]
# A migration that takes long enough for others to arrive, and would fail if it ran twice.
SLOW = Migration(
    1,
    "0001_slow",
    "create schema if not exists streamworker; create table streamworker.once (x int); select pg_sleep(0.3);",
)
INDEX = Migration(
    2, "0002_index", "-- transaction: off\ncreate index concurrently if not exists once_x on streamworker.once (x);"
)


def bare():
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("STREAMWORKER_") and k not in ("DATABASE_URL", "REDIS_URL")
    }
    return {**clean, "PYTHONPATH": str(ROOT)}


def run(*words, **env):
    return inprocess.run(["migrate", *words], env={**bare(), **env}, cwd=ROOT)


async def test_five_migrators_at_once_apply_everything_once(empty_database):
    results = await asyncio.gather(*(Migrator(empty_database, [SLOW, INDEX]).up() for _ in range(5)))
    assert sorted(name for done in results for name in done) == ["0001_slow", "0002_index"]
    assert [state.state for state in await Migrator(empty_database, [SLOW, INDEX]).status()] == ["applied", "applied"]


def test_five_processes_at_once(empty_database, tmp_path):
    program = tmp_path / "up.py"
    program.write_text(
        "import anyio, sys\n"
        "from streamworker.postgres.migrate import Migrator\n"
        "print(*anyio.run(Migrator(sys.argv[1]).up))\n"
    )
    processes = [
        forkserver.forked([empty_database], module=str(program), cwd=ROOT, env=bare(), stdout=subprocess.PIPE)
        for _ in range(5)
    ]
    said = [process.communicate(timeout=30)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 5
    assert sorted(name for words in said for name in words) == [each.name for each in shipped()]


async def test_what_fails_leaves_nothing_behind_and_names_the_file(empty_database):
    broken = Migration(
        1, "0001_broken", "create schema if not exists streamworker; create table streamworker.a (x int); select 1/0;"
    )
    with pytest.raises(StreamworkerError, match="0001_broken: division by zero"):
        await Migrator(empty_database, [broken]).up()
    assert [state.state for state in await Migrator(empty_database, [broken]).status()] == ["missing"]
    connection = await asyncpg.connect(empty_database)
    assert await connection.fetchval("select to_regclass('streamworker.a')") is None
    await connection.close()
    assert await Migrator(empty_database, [Migration(1, "0001_broken", "select 1")]).up() == ["0001_broken"]


async def test_a_changed_file_is_refused_in_one_sentence_and_nothing_more_is_applied(empty_database):
    await Migrator(empty_database, [SLOW]).up()
    changed = Migrator(empty_database, [Migration(1, "0001_slow", SLOW.sql + " "), INDEX])
    with pytest.raises(ConfigurationError, match="0001_slow was changed after this database applied it: restore"):
        await changed.up()
    assert [state.state for state in await changed.status()] == ["drifted", "missing"]


async def test_a_newer_release_is_no_trouble_for_an_older_one(empty_database):
    await Migrator(empty_database, [SLOW, INDEX]).up()
    older = Migrator(empty_database, [SLOW])
    assert await older.up() == []
    assert [state.state for state in await older.status()] == ["applied", "unknown"]


async def test_a_server_that_is_not_there_and_a_database_that_is_not_there(empty_database, tmp_path):
    with pytest.raises(Unreachable, match="PostgreSQL does not answer"):
        await Migrator(f"postgresql://postgres@/x?host={tmp_path}&port=5432").up()
    with pytest.raises(ConfigurationError, match="check DATABASE_URL"):
        await Migrator(empty_database.replace("/test_", "/no_such_")).up()


async def test_a_user_without_rights_is_told_what_is_missing_but_may_look_and_may_find_nothing_to_do(empty_database):
    connection = await asyncpg.connect(empty_database)
    await connection.execute("create role plain login")
    try:
        plain = Migrator(empty_database.replace("postgres@", "plain@"))
        with pytest.raises(ConfigurationError, match="grant it to this user"):
            await plain.up()
        await Migrator(empty_database).up()
        await connection.execute(
            "grant usage on schema streamworker to plain; grant select on streamworker.schema_migrations to plain"
        )
        assert await plain.up() == []
        assert {state.state for state in await plain.status()} == {"applied"}
    finally:
        await connection.execute("drop owned by plain; drop role plain")
        await connection.close()


async def test_a_database_that_cannot_hold_what_jobs_say_is_refused_before_it_is_used(empty_database):
    connection = await asyncpg.connect(empty_database)
    await connection.execute("create database latin encoding 'LATIN1' locale 'C' template template0")
    latin = re.sub("/test_[0-9a-f]+", "/latin", empty_database)
    try:
        with pytest.raises(
            ConfigurationError, match="encoded in LATIN1, which cannot hold what jobs may say: create one in UTF8"
        ):
            await Migrator(latin).up()
    finally:
        await connection.execute("drop database latin")
        await connection.close()


async def test_a_database_that_keeps_all_bytes_as_they_are_will_do(empty_database):
    """SQL_ASCII: what initdb makes under the locale C, in minimal images for example."""
    connection = await asyncpg.connect(empty_database)
    await connection.execute("create database bytes encoding 'SQL_ASCII' locale 'C' template template0")
    url = re.sub("/test_[0-9a-f]+", "/bytes", empty_database)
    try:
        assert await Migrator(url).up() == [each.name for each in shipped()]
        inside = await asyncpg.connect(url)
        await inside.execute("select streamworker.enqueue('k', $1::jsonb, 'q', id => 'x')", '{"name": "Zo\u00eb"}')
        assert await inside.fetchval("select payload->>'name' from streamworker.jobs") == "Zo\u00eb"
        await inside.close()
    finally:
        await connection.execute("drop database bytes")
        await connection.close()


async def test_an_older_ledger_in_a_database_that_is_not_in_utf8_says_so_to_whoever_enqueues(empty_database):
    """It was made before that was refused; what it can hold it still takes."""
    connection = await asyncpg.connect(empty_database)
    await connection.execute("create database latin encoding 'LATIN1' locale 'C' template template0")
    latin = await asyncpg.connect(re.sub("/test_[0-9a-f]+", "/latin", empty_database))
    try:
        for migration in shipped():
            for statement in migration.statements:
                await latin.execute(statement)

        class Text(Payload, kind="text", queue="q"):
            words: str

        app = App(settings=Settings())
        async with latin.transaction():
            await app.enqueue(Text(words="na\u00efve"), connection=latin)
        with pytest.raises(ConfigurationError, match="cannot hold what the job says .* encoded in UTF8"):
            async with latin.transaction():
                await app.enqueue(Text(words="\u20ac 7"), connection=latin)
    finally:
        await latin.close()
        await connection.execute("drop database latin")
        await connection.close()


def test_files_are_found_sorted_and_read_alike_with_any_line_ends(tmp_path):
    (tmp_path / "0002_b.sql").write_bytes(b"select 2;\r\n")
    (tmp_path / "0001_a.sql").write_bytes(b"-- transaction: off\nselect 1;\n")
    (tmp_path / "README.md").write_text("no migration")
    first, second = load(tmp_path)
    assert (first.version, first.name, first.atomic) == (1, "0001_a", False)
    assert second.checksum == Migration(2, "0002_b", "select 2;\n").checksum
    assert [each.version for each in shipped()] == list(range(1, len(shipped()) + 1))


async def test_print_is_sql_that_leaves_the_same_database(empty_database):
    psql = [find_binaries().postgres.with_name("psql"), "-q", "-v", "ON_ERROR_STOP=1", "-d", empty_database, "-f", "-"]
    subprocess.run(psql, input=printed(shipped()), text=True, check=True, timeout=60)
    assert {state.state for state in await Migrator(empty_database).status()} == {"applied"}
    assert await Migrator(empty_database).up() == []


def test_the_command_line(empty_database):
    env = {"DATABASE_URL": empty_database}
    missing = run("status", "--json", **env)
    assert missing.returncode == 1
    assert {json.loads(line)["state"] for line in missing.stdout.splitlines()} == {"missing"}
    assert "applied 0001_ledger" in run("up", **env).stdout
    assert (
        run(
            "up", DATABASE_URL="postgresql://nobody@nowhere.invalid/x", STREAMWORKER_DATABASE_DIRECT_URL=empty_database
        ).stdout
        == "the schema is up to date\n"
    )
    assert run("status", **env).returncode == 0
    assert run("print").stdout == printed(shipped())
    none = run("up")
    assert none.returncode == 78
    assert "set DATABASE_URL" in none.stderr
    assert len(none.stderr.splitlines()) == 1


async def test_waiting_for_another_migration_is_said_and_names_it(empty_database):
    """It waited for five minutes and said nothing: a forgotten session of somebody held the lock."""
    other = await asyncpg.connect(empty_database, server_settings={"application_name": "forgotten"})
    await other.execute("select pg_advisory_lock($1::bigint)", LOCK)
    pid = other.get_server_pid()
    process = forkserver.forked(["migrate", "up"], cwd=ROOT, env={**bare(), "DATABASE_URL": empty_database})
    try:
        assert process.stderr is not None
        with process.stderr as said:
            line = await asyncio.to_thread(next, (each for each in said if "migration_waits" in each))
            assert f"PID {pid}, forgotten at" in line
            assert "gives_up_in" in line
            await other.close()
            assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        process.kill()


async def test_it_gives_up_and_names_the_other(empty_database, monkeypatch):
    monkeypatch.setattr(migrate, "LOCK_WAIT", 0.2)
    other = await asyncpg.connect(empty_database)
    async with other.transaction():
        await other.execute("select pg_advisory_xact_lock($1::bigint)", LOCK)
        with pytest.raises(
            StreamworkerError, match=rf"PID {other.get_server_pid()}, .*idle in transaction.*pg_terminate"
        ):
            await Migrator(empty_database).up()
    await other.close()
