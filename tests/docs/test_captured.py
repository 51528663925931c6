"""Pages that are one story are followed from top to bottom; what they say that commands print is what those print."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import forkserver
from tools import walk
from tools.capture import capture

# The tutorial needs a mail server: tests/examples/test_tutorial.py.
PAGES = [page for page in walk.walked_pages() if page.name != "tutorial.md"]


@pytest.mark.all
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_page_does_what_it_says(page: Path, tmp_path: Path, pytestconfig: pytest.Config):
    text = page.read_text()
    env = walk.environment(tmp_path)
    # With --all each command is a Python of its own the first time; a second one shows no more than a fork.
    programs = forkserver.programs(tmp_path / "bin", fresh_first=pytestconfig.option.run_all)
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
    said = ""
    steps = 0
    folder = tmp_path / "hello"
    with walk.stage(folder):
        for step in walk.walk(text, folder, env):
            steps += 1
            said += step.printed
            if step.written is not None:
                assert walk.steady(step.printed) == walk.steady(step.written), f"./dev capture {page}\n{step.command}"
    assert steps
    for block in re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            assert line in said, f"{line!r} was not printed"


def test_capture_writes_what_was_printed_and_leaves_the_rest(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# P\n\n```text a.txt\nhello\n```\n\n```console\n$ cat a.txt\nbye\n"
        "$ echo 2026-01-01T00:00:00Z\n2020-02-02T02:02:02Z\n```\n\nend\n"
    )
    assert capture(page)
    assert "$ cat a.txt\nhello\n$ echo 2026-01-01T00:00:00Z\n2020-02-02T02:02:02Z\n```\n\nend\n" in page.read_text()
    assert not capture(page)


def test_a_page_that_says_otherwise_is_found(tmp_path: Path):
    with pytest.raises(AssertionError, match="exit 1"):
        list(walk.walk("```sh run\nfalse\n```\n", tmp_path, walk.environment(tmp_path)))
    with pytest.raises(AssertionError, match="exit 0"):
        list(walk.walk("```sh fails\ntrue\n```\n", tmp_path, walk.environment(tmp_path)))
