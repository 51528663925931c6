"""The suite many times (tools/steady.py, ./dev steady), on a folder of three tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import steady

pytestmark = pytest.mark.all

TESTS = """
import pytest

def test_now_and_then(pytestconfig):
    assert pytestconfig.option.order_seed % 2, "an even seed"

@pytest.fixture
def ends_badly(pytestconfig):
    yield
    if pytestconfig.option.order_seed == 8:
        raise RuntimeError("left behind")

def test_of_a_fixture(ends_badly): pass

@pytest.mark.all
def test_again(pytestconfig):
    assert pytestconfig.option.run_all
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(steady, "OUTPUT", tmp_path / "steady")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  all: x\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer to import than these tests to run
    return ["-p", "tests.plugin", "-p", "xdist", "-p", "no:cacheprovider", "-n", "0", str(tmp_path)]


def test_what_fails_now_and_then_is_in_the_table(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert steady.main(["--runs", "2", "--seed", "7", *words]) == 1
    none, two, *table, last = capsys.readouterr().out.splitlines()
    assert none.startswith("run 1 of 2, seed 7: none failed, ")
    assert two.startswith("run 2 of 2, seed 8: 2 failed, ")
    assert table[0].strip() == "1 of 2  test_it.py::test_now_and_then  (seeds 8)"
    assert "an even seed" in table[1]
    assert table[2].strip() == "1 of 2  test_it.py::test_of_a_fixture  (seeds 8)"
    assert "left behind" in table[3]
    assert last.startswith("steady: 2 tests failed in 2 runs")
    assert [file.name for file in (tmp_path / "steady").iterdir()] == ["8.txt"]


def test_a_run_that_tests_nothing_has_failed(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert steady.main(["--runs", "1", *words, "-k", "nothing_of_this_name"]) == 1
    assert "the run itself" in capsys.readouterr().out


def test_steady_under_load(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert steady.main(["--runs", "1", "--load", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "steady: no tests failed in 1 runs"
