"""Figures on pages are drawn from the files that the benchmarks wrote; none is typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tools import figures


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_was_measured(page: Path):
    text = page.read_text(encoding="utf-8")
    assert figures.BLOCK.search(text), "no table of figures on the page"
    assert text == figures.drawn(text), "./dev figures"


@pytest.mark.parametrize("name", figures.PICTURES)
def test_a_picture_shows_what_was_measured(name: str):
    assert (figures.IMAGES / f"{name}.svg").read_text(encoding="utf-8") == figures.picture(name), "./dev figures"


@pytest.mark.parametrize("name", list(figures.TABLES))
def test_each_table_names_its_command_version_machine_and_date(name: str):
    drawn = figures.table(name)
    for file in figures.measured(name):
        assert file.command.startswith(("./dev bench", "./dev soak"))
        assert all(file.rows)
        for field in (file.command, file.date, file.version, file.software, file.machine):
            assert field
            assert field in drawn


def test_another_measurement_changes_the_page(tmp_path: Path):
    folder = Path(shutil.copytree(figures.RESULTS, tmp_path / "results"))
    path = folder / "bench.json"
    document = json.loads(path.read_bytes())
    row = next(row for row in document["rows"] if (row["question"], row["what"]) == ("no-op jobs", "worker"))
    row["values"] = [123_456.0, 123_457.0, 123_458.0]
    path.write_text(json.dumps(document))
    page = figures.ROOT / "docs/benchmarks.md"
    assert "123,457/s" in figures.drawn(page.read_text(encoding="utf-8"), folder)
    assert "123,457" in figures.picture("throughput", folder)


def test_a_goal_that_is_missed_is_said(tmp_path: Path):
    folder = Path(shutil.copytree(figures.RESULTS, tmp_path / "results"))
    path = folder / "bench-memory.json"
    document = json.loads(path.read_bytes())
    document["rows"][-1]["values"] = [61.0]
    path.write_text(json.dumps(document))
    (line,) = (line for line in figures.table("bench", folder).splitlines() if "10,000,000 jobs" in line)
    assert line.endswith("| ≤ 60 MB: **missed** |")
