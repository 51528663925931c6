"""docs/architecture.md is true: files are there, names are in them, and each hand-off on the way of a job is a call."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()

STEPS = {
    int(number): (path, names, int(caller) if caller else None, call)
    for number, path, names, _, caller, call in re.findall(
        r"^(\d+)\. `(streamworker/\S+\.py)` ((?:`[\w.]+`,? ?)+)(.*?)(?: From (\d+): `(\w+)`)?$", PAGE, re.MULTILINE
    )
}
FILES = sorted(set(re.findall(r"`((?:streamworker|migrations)/[\w/]*(?:\.py)?)`", PAGE)))
NAMED = sorted(
    {
        (path, name)
        for path, names in re.findall(r"`(streamworker/[\w/]+\.py)`((?:,? `[A-Za-z_][\w.]*`)+)", PAGE)
        for name in re.findall(r"`([\w.]+)`", names)
    }
)


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@cache
def defined(path: str) -> set[str]:
    """Classes, functions, their members as ``Class.member``, and names of the module."""
    found: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = [each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}.{member}" for member in members}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@cache
def used(path: str) -> set[str]:
    """Names and attributes that a file loads."""
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Name | ast.Attribute)]
    return {node.id if isinstance(node, ast.Name) else node.attr for node in nodes if isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("path", FILES)
def test_files_are_there(path: str):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_names_are_in_their_files(path: str, name: str):
    assert name in defined(path)


def test_the_way_of_a_job_is_a_list_of_at_most_twenty_files():
    assert list(STEPS) == list(range(1, len(STEPS) + 1)) and 15 <= len(STEPS) <= 20
    assert len({path for path, *_ in STEPS.values()}) == len(STEPS)
    assert len(STEPS) == len(re.findall(r"^\d+\. ", PAGE, re.MULTILINE)), "a step is not written like the others"


@pytest.mark.parametrize("number", [number for number, step in STEPS.items() if step[2] is not None])
def test_each_hand_off_is_a_call_of_what_the_next_file_has(number: int):
    path, _, caller, call = STEPS[number]
    assert caller is not None and caller < number
    assert call in used(STEPS[caller][0]), f"{STEPS[caller][0]} does not use {call}"
    assert call in {name.rpartition(".")[2] for name in defined(path)}, f"{path} does not define {call}"


def test_only_the_two_ends_are_called_by_nothing_on_the_list():
    """`enqueue` is called by users, the fetcher's loop by the worker."""
    first = [path for path, _, caller, _ in STEPS.values() if caller is None]
    assert first == ["streamworker/producer.py", "streamworker/worker/fetcher.py"]


def test_the_picture_shows_files_of_the_package():
    picture = PAGE.partition("```text\n")[2].partition("```")[0]
    files = re.findall(r"[\w/]+\.(?:py|lua)", picture)
    assert len(files) > 12
    for file in files:
        folder = "streamworker/broker" if file.startswith("lua/") else "streamworker"
        assert (ROOT / folder / file).exists(), file


def test_scripts_on_the_way_are_there():
    for script in re.findall(r"`lua/(\w+\.lua)`", PAGE):
        assert (ROOT / "streamworker/broker/lua" / script).exists(), script
