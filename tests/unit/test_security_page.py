"""docs/security.md: each sentence of the threat model names the tests that hold it, and these exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
MODEL = PAGE.partition("\n## Threat model\n")[2].partition("\n### What a producer can reach\n")[0]
REFERENCE = re.compile(r"(tests/\w+/test_\w+\.py)::(\w+)")
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
ITEM = re.compile(r"^- (.*?)(?=^- |^\n)", re.MULTILINE | re.DOTALL)


def attackers() -> dict[str, str]:
    """Heading to what stands below it."""
    return {text.partition("\n")[0]: text for text in re.split(r"^### ", MODEL, flags=re.MULTILINE)[1:]}


def test_there_are_five_attackers_and_each_can_and_cannot_do_something():
    assert list(attackers()) == [
        "The producer of one queue", "The operator", "The reader of the dashboard", "The network neighbour",
        "The thief of a dump",
    ]  # fmt: skip
    for name, text in attackers().items():
        can, between, cannot = text.partition("\nIt cannot\n")
        assert between and "\nIt can\n" in can, name
        assert ITEM.findall(can + "\n\n") and ITEM.findall(cannot + "\n\n"), name


@pytest.mark.parametrize("name", attackers())
def test_every_sentence_ends_with_its_tests(name):
    for item in ITEM.findall(attackers()[name] + "\n\n"):
        sentence, _, reference = item.strip().rpartition("<!--")
        assert sentence.rstrip().endswith((";", ".")), item
        assert reference.endswith("-->"), item
        assert REFERENCE.findall(reference), item


def test_every_test_that_is_named_exists():
    named = [each for comment in COMMENT.findall(MODEL) for each in comment.split()]
    assert len(named) > 50
    for each in named:
        found = REFERENCE.fullmatch(each)
        assert found is not None, each
        tree = ast.parse((ROOT / found[1]).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert found[2] in functions, each
