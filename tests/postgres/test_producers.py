"""Producers in other languages, by SQL: a row and its job in one transaction, and neither of one that is rolled back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples/producers"
COUNT = 7


def run(command: list[str], cwd: Path, database_url: str) -> None:
    env = {**os.environ, "DATABASE_URL": database_url}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout


def psql(directory: Path, database_url: str) -> str:
    program = shutil.which("psql")
    if program is None:
        pytest.skip("needs psql: install the client of PostgreSQL")
    words = [program, database_url, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-v", f"count={COUNT}"]
    run([*words, "-f", str(EXAMPLES / "sql/enqueue.sql")], directory, database_url)
    return "psql"


def node(directory: Path, database_url: str) -> str:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs node and npm: install Node 20 or newer")
    shutil.copytree(EXAMPLES / "node", directory / "node", ignore=shutil.ignore_patterns("node_modules"))
    run([npm, "install", "--no-audit", "--no-fund", "--prefer-offline"], directory / "node", database_url)
    # Node's URLs name a Unix socket in another way.
    parts, query = urlsplit(database_url), dict(parse_qsl(urlsplit(database_url).query))
    url = f"socket://{parts.username}@{query['host']}?db={parts.path.removeprefix('/')}&port={query['port']}"
    os.environ["PGPORT"] = query["port"]
    try:
        run(["node", "postgres.mjs", str(COUNT)], directory / "node", url)
    finally:
        del os.environ["PGPORT"]
    return "node-pg"


def golang(directory: Path, database_url: str) -> str:
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs Go: install Go 1.23 or newer")
    shutil.copytree(EXAMPLES / "sql/go", directory / "go")
    run([go, "mod", "tidy"], directory / "go", database_url)
    run([go, "run", ".", str(COUNT)], directory / "go", database_url)
    return "go"


@pytest.mark.parametrize(
    "produce", [psql, pytest.param(node, marks=pytest.mark.all), pytest.param(golang, marks=pytest.mark.all)]
)
async def test_a_row_and_its_job_are_stored_together(produce, tmp_path, database_url, pg):
    name = produce(tmp_path, database_url)
    orders = [row["id"] for row in await pg.fetch("select id from orders order by id")]
    jobs = await pg.fetch("select kind, queue_name, status, payload->>'to' as to from streamworker.jobs order by 4")
    assert orders == [f"{name}-{n}" for n in range(COUNT)]
    assert [tuple(row) for row in jobs] == [
        ("email.send", "email-sending", "queued", f"{name}-{n}@example.com") for n in range(COUNT)
    ]


def test_the_go_program_calls_the_function_as_it_is():
    """Where there is no Go: its statement names arguments that the function has."""
    text = (EXAMPLES / "sql/go/main.go").read_text()
    (statement,) = re.findall(r"`(select streamworker\.enqueue.*)`", text)
    assert set(re.findall(r"(\w+) =>", statement)) == {"kind", "payload", "queue", "key"}
