"""Which tests run, in which order, and the line about the others (tests/plugin.py), on folders of a few tests."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.all
pytest_plugins = ["pytester"]

A = """
import pytest

@pytest.mark.all
@pytest.mark.parametrize("n", [1, 2])
def test_again(n): pass

def test_once(): pass

@pytest.mark.slow
def test_large(): pass

@pytest.mark.slow
@pytest.mark.all
def test_large_again(): pass

class TestIt:
    @pytest.mark.crash
    def test_killed(self): pass

@pytest.mark.skip(reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("n", [1, 2])
def test_browser(n): pass

def test_elsewhere(): pytest.skip("needs PgBouncer: apt-get install pgbouncer")
"""

B = """
import pytest

@pytest.mark.parametrize("n", range(6))
def test_other(n): pass
"""

MODES = """
import pytest

@pytest.fixture
def broker_factory(): pass

each = pytest.mark.parametrize("mode", ["stream", "list"])

@pytest.mark.parametrize("n", [1, 2])
@each
def test_above(mode, n): pass

@each
def test_broker(mode, broker_factory): pass

@pytest.mark.mode_free
@each
def test_free(mode, broker_factory): pass

@pytest.mark.parametrize(("mode", "n"), [("stream", 1), ("list", 2)])
def test_two(mode, n): pass
"""

EVERY_DAY = {
    "test_once",
    "test_browser[1]",
    "test_browser[2]",
    "test_elsewhere",
    *(f"test_other[{n}]" for n in range(6)),
}


@pytest.fixture
def folder(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\nmarkers =\n  all: x\n  slow: x\n  crash: x\n  mode_free: x\n")
    pytester.makepyfile(test_a=A, test_b=B)
    return pytester


def run(folder: pytest.Pytester, *arguments: str, own_process: bool = False) -> tuple[list[str], str]:
    """The tests that ran, in their order, and the line."""
    start = folder.runpytest_subprocess if own_process else folder.runpytest_inprocess
    result = start("-p", "tests.plugin", "-p", "no:valkey", "-v", *arguments)
    ran = [found for line in result.outlines for found in re.findall(r"test_\w\.py::(\S+)", line)]
    return list(dict.fromkeys(ran)), next((line for line in result.outlines if line.startswith("not run: ")), "")


def test_a_day_runs_what_is_not_marked_and_says_in_one_line_what_did_not_run(folder: pytest.Pytester):
    ran, line = run(folder)
    assert set(ran) == EVERY_DAY
    assert line == (
        "not run: 2 skipped (needs Chromium: apt-get install chromium), 1 skipped (needs PgBouncer: apt-get install pgbouncer), "
        "2 marked all (--all), 2 marked slow (-m slow), 1 marked crash (./dev crash)"
    )


def test_another_mode_is_tried_with_all_where_the_promise_is_the_same(folder: pytest.Pytester):
    folder.makepyfile(test_m=MODES)
    both = {"test_broker[stream]", "test_broker[list]", "test_two[stream-1]", "test_two[list-2]"}
    ran, line = run(folder, "test_m.py")
    assert set(ran) == both | {"test_above[stream-1]", "test_above[stream-2]", "test_free[stream]"}
    assert line == "not run: 3 marked all (--all)"
    more = {"test_above[list-1]", "test_above[list-2]", "test_free[list]"}
    assert set(run(folder, "test_m.py", "--all")[0]) == set(ran) | more
    assert run(folder, "test_m.py::test_above[list-2]")[0] == ["test_above[list-2]"]


def test_all_runs_all_but_what_is_slow(folder: pytest.Pytester):
    ran, line = run(folder, "--all")
    assert set(ran) == EVERY_DAY | {"test_again[1]", "test_again[2]"}
    assert "2 marked slow (-m slow), 1 marked crash (./dev crash)" in line
    assert "marked all" not in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["test_a.py::test_again"], {"test_again[1]", "test_again[2]"}),
        (["test_a.py::test_again[2]"], {"test_again[2]"}),
        (["test_a.py::test_large_again"], {"test_large_again"}),
        (["test_a.py::TestIt"], {"TestIt::test_killed"}),
        (["test_a.py::TestIt::test_killed"], {"TestIt::test_killed"}),
        (["test_a.py::test_large", "test_b.py"], {"test_large", *(f"test_other[{n}]" for n in range(6))}),
        (["-m", "slow"], {"test_large", "test_large_again"}),
        (["-m", "all and not slow"], {"test_again[1]", "test_again[2]"}),
        (["-m", "crash"], {"TestIt::test_killed"}),
        (["-m", "not slow"], EVERY_DAY),
        (["-k", "large"], {"test_large", "test_large_again"}),
        (["-k", "once or again"], {"test_once"}),
        (["-k", "again", "--all"], {"test_again[1]", "test_again[2]"}),
        (["test_b.py", "--all"], {f"test_other[{n}]" for n in range(6)}),
    ],
    # Sets have no order that processes agree on: names come from the arguments.
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_test_that_is_asked_for_runs(folder: pytest.Pytester, arguments: list[str], expected: set[str]):
    assert set(run(folder, *arguments)[0]) == expected


def test_what_failed_last_runs_again_whatever_its_markers(folder: pytest.Pytester):
    folder.makepyfile(test_c="import pytest\n@pytest.mark.all\ndef test_bad(): assert 0\ndef test_worse(): assert 0")
    run(folder, "--all")
    assert set(run(folder, "--last-failed")[0]) == {"test_bad", "test_worse"}


def test_an_order_of_chance_is_the_same_for_the_same_seed_and_whole(folder: pytest.Pytester):
    def order(*arguments: str) -> list[str]:
        return run(folder, "test_a.py::test_once", "test_b.py", *arguments)[0]

    plain = order()
    orders = {seed: order("--order-seed", str(seed)) for seed in range(6)}
    assert len({tuple(tests) for tests in orders.values()}) > 3
    assert all(sorted(tests) == sorted(plain) for tests in orders.values())
    assert order("--order-seed", "4") == orders[4]
    # Modules stay together: what they share is made once.
    assert all(tests[0] == "test_once" or tests[-1] == "test_once" for tests in orders.values())


def test_processes_that_share_the_work_choose_the_same_and_count_it_once(folder: pytest.Pytester):
    ran, line = run(folder, "-n", "2", "--order-seed", "1", own_process=True)
    assert set(ran) == EVERY_DAY
    assert line.endswith("2 marked all (--all), 2 marked slow (-m slow), 1 marked crash (./dev crash)")
