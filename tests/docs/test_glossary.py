"""The glossary names things that are there: its keys are those of the design, its tables those of the migrations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/glossary.md").read_text()
ROWS = re.findall(r"^\| ([a-z ]+) \| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)[1:]
BEHIND = "\n".join(behind for _, _, behind in ROWS)


def test_words_are_in_order_and_explained_in_a_few_sentences():
    words = [word for word, _, _ in ROWS]
    assert words == sorted(set(words)) and len(words) >= 40
    assert all(1 <= len(re.findall(r"\.(?= |$)", meaning)) <= 3 for _, meaning, _ in ROWS)


def test_the_words_that_name_the_packages_are_there():
    needed = "job payload handler claim pending lease heartbeat reclaim settle verdict producer consumer group outbox relay ledger"
    assert {*needed.split(), "dead letter", "execution", "fence", "hop"} <= {word for word, _, _ in ROWS}


KEYS = sorted(set(re.findall(r"`((?:stream:\{Q\}|queue:Q|streamworker:worker)[^`*]*)`", BEHIND)))


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_those_of_the_design(key: str):
    assert f"`{key}`" in (ROOT / "docs/design.md").read_text()


TABLES = sorted(set(re.findall(r"`streamworker\.([a-z_]+)`", BEHIND)))


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_made_by_the_migrations(table: str):
    made = "\n".join(path.read_text() for path in (ROOT / "migrations").glob("*.sql"))
    assert f"create table streamworker.{table} " in made
