"""Every code block of README and docs does what it says: run, parsed by the real thing, or excused and counted."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import asyncpg
import pytest
import yaml

from streamworker import codec, embedded
from streamworker.postgres.migrate import Migrator
from tests import mypy
from tests.docs import commands, snippets
from tests.docs.blocks import ROOT, Block, blocks, pages, walked

# Blocks that say <!-- not run: why --> above them, page by page. A new one has to be counted here, where it is seen.
EXCUSED = {
    "CONTRIBUTING.md": 1,
    "README.md": 1,
    "docs/deploy.md": 6,
    "docs/from-arq.md": 1,
    "docs/from-celery.md": 1,
    "docs/from-rq.md": 1,
    "docs/integrations.md": 3,
    "docs/tutorial.md": 1,
    "examples/producers/README.md": 2,
    "examples/shop/README.md": 1,
}
LANGUAGES = {"", "console", "dockerfile", "ini", "json", "lua", "python", "sh", "sql", "text", "toml", "yaml"}


def of(*languages: str) -> list[Block]:
    return [block for block in blocks() if block.language in languages and not block.excuse]


def test_every_block_says_what_it_is():
    odd = [f"{block.where}: {block.language}" for block in blocks() if block.language not in LANGUAGES]
    assert not odd, f"languages nobody checks: {odd}"
    # Without a word for the language nothing is checked: commands and Python must not hide there.
    hidden = [
        block.where
        for block in blocks()
        if block.language in ("", "text")
        and not walked(block.page)
        and re.search(
            r"^(\$ |\./dev|pip|docker|kubectl|import|from \w+ import|async def|def|class)\b", block.body, re.MULTILINE
        )
    ]
    assert not hidden, f"blocks of code that do not say so: {hidden}"


def test_walked_pages_hide_no_python():
    """What they show of Python is a file, so that something uses it."""
    assert not [block.where for block in of("python") if walked(block.page) and not block.word]


def test_excused_blocks_are_counted():
    assert Counter(block.page for block in blocks() if block.excuse) == EXCUSED


def test_excused_blocks_are_at_least_well_formed():
    for block in blocks():
        if block.excuse and block.language == "python":
            ast.parse(block.body)


@pytest.mark.parametrize("page", pages())
def test_commands_exist(page: str):
    found: list[str] = []
    for block in blocks():
        if block.page != page or block.language != "sh":
            continue
        if block.excuse:  # what is ours in it is checked all the same
            ours = [words for words in commands.commands(block.body) if words[0] in ("streamworker", "./dev")]
            found += [f"{block.where}: {words}" for words in ours if commands.judge(words, ROOT)]
        elif block.word not in ("run", "fails", "setting"):
            found += [f"{block.where}: {text}" for text in commands.problems(block.body, (ROOT / page).parent)]
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Python blocks as packages, one a page."""
    folder = tmp_path_factory.mktemp("pages")
    packages: list[str] = []
    for page in pages():
        found = [block for block in of("python") if block.page == page and not walked(page)]
        if found:
            package = "page_" + re.sub(r"\W", "_", page.removesuffix(".md")).lower()
            snippets.write(found, folder / package)
            packages.append(package)
    assert packages
    return folder, packages


LENIENT = """
disallow_untyped_defs = false
disallow_untyped_calls = false
disallow_incomplete_defs = false
disallow_any_generics = false
implicit_reexport = true
warn_return_any = false
warn_unused_ignores = false
"""
"""What mypy lets pass on pages: they show what matters there."""


@pytest.mark.all
@pytest.mark.timeout(300)
def test_python_has_the_types_it_shows(modules: tuple[Path, list[str]], tmp_path: Path):
    folder, packages = modules
    config = tmp_path / "pyproject.toml"
    names = json.dumps(["tests.docs.names", *(f"{package}.*" for package in packages)])
    project = (ROOT / "pyproject.toml").read_text()
    config.write_text(f"{project}\n[[tool.mypy.overrides]]\nmodule = {names}{LENIENT}")
    mypy.run(["."], cwd=folder, config=config)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory):
    with embedded.acquire(tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture(scope="module")
def database(servers) -> str:
    asyncio.run(Migrator(servers.database_url).up())
    return servers.database_url


@pytest.mark.all
@pytest.mark.timeout(300)
async def test_python_runs(modules: tuple[Path, list[str]], servers, database):
    folder, packages = modules
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")}
    environment["JOBS_KEY_2026_11"] = base64.b64encode(bytes(32)).decode()  # docs/encryption.md reads a key there
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.running", str(folder), database, *packages],
        cwd=ROOT, env={**environment, "REDIS_URL": servers.redis_url, "DATABASE_URL": database},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


async def test_sql_runs(database):
    connection = await asyncpg.connect(database)
    for block in of("sql"):
        if block.word:  # a file of a page that is walked through
            continue
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute(block.body)
        except asyncpg.PostgresError as error:
            raise AssertionError(f"{block.where}: {error}") from error
        finally:
            await transaction.rollback()
    await connection.close()


def test_documents_are_jobs():
    for block in of("json"):
        for document in json_values(block.body):
            if "payload" in document:
                codec.read(json.dumps(document).encode())


def json_values(text: str) -> list[dict[str, object]]:
    """One document, or one a line."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]


def test_configuration_parses():
    for block in of("yaml"):
        assert list(yaml.safe_load_all(block.body)), block.where
    for block in of("toml"):
        assert tomllib.loads(block.body), block.where


def test_the_harness_finds_what_is_wrong(tmp_path: Path):
    where = ROOT / "docs"
    assert commands.problems("streamworker queues list --limit 3 | grep x; ./dev test", where) == []
    for wrong in (
        "streamworker queue",
        "streamworker dead retry --al",
        "./dev tset",
        "pip install 'streamworker[dmo]'",
        "docker run x",
    ):
        assert len(commands.problems(wrong, where)) == 1, wrong
    nobody = Block("a.md", 1, "python", "", "print(somebody)", "")
    with pytest.raises(AssertionError, match="uses somebody"):
        snippets.module(nobody, {}, "page")
    text, binds = snippets.module(
        Block("a.md", 1, "python", "", "x = await app.enqueue(SendInvoice(i))", ""), {}, "page"
    )
    assert "async def" in text and "from tests.docs.names import app" in text and binds == set()
