"""docs/comparison.md: each project that is named has a source, with its version, a commit or a date, and a file or a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/comparison.md").read_text(encoding="utf-8")
CLAIMS, _, SOURCES = PAGE.partition("\n## Sources\n")
ROWS = [row for row in re.findall(r"^\| (.*?) \| (.*?) \| .* \|$", SOURCES, re.MULTILINE) if row != ("---", "---")][1:]
OTHERS = [
    "ardiq", "arq", "asynq", "blitzq", "bullmq", "celery", "chasquimq", "dbos", "docket", "dramatiq", "faststream", "hatchet",
    "mayu", "oban", "pgqueuer", "procrastinate", "river", "saq", "sidekiq", "streaq", "taskiq", "temporal",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_each_project_has_a_source(name: str):
    assert re.search(rf"\b{name}\b", CLAIMS, re.IGNORECASE), "no longer compared"
    assert any(name in project.lower() for project, _ in ROWS)


def test_no_other_project_is_named_by_its_address():
    linked = re.findall(r"\[([\w -]+)\]\(https://(?!github\.com/[\w-]+/[\w-]+/(?:issues|pull)/)", CLAIMS)
    assert {name.lower().split()[0].removesuffix("-redis") for name in linked} <= set(OTHERS)


def test_each_source_says_which_version_and_where_it_was_read():
    project = ""
    for named, where in ROWS:
        project = named or project
        assert re.search(r"`.+`|README|https://|source up to", where), (project, where)
        released = re.search(r"\d", project) or project == "all Python packages"
        assert released or re.search(r"\([0-9a-f]{7}\)", where), (project, where)
