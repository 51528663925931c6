"""`./dev bench guard`: what counts as slower."""

from __future__ import annotations

import pytest

from benchmarks import guard

RATE = ("no-op jobs", "worker", "/s")
COST = ("CPU a no-op job, Python", "stream", "us")
BARE = ("no-op jobs", "bare loop", "/s")
LESS = {RATE: False, COST: True, BARE: False}


def slower(before: list[float], now: list[float], key: guard.Key) -> float | None:
    return guard.compared({key: before}, {key: now}, LESS).get(key)


def test_worse_by_more_than_the_scatter_of_both_sides_is_slower():
    assert slower([100.0, 101.0, 99.0], [90.0, 91.0, 89.0], RATE) == 0.1
    assert slower([10.0, 10.1, 9.9], [12.0, 12.1, 11.9], COST) == 0.2


def test_within_the_scatter_nothing_is():
    assert slower([80.0, 100.0, 120.0], [70.0, 90.0, 110.0], RATE) is None
    assert slower([100.0], [98.0], RATE) is None, "three percent are never a difference"


def test_what_became_faster_is_not_slower():
    assert slower([100.0, 101.0, 99.0], [110.0, 111.0, 109.0], RATE) is None
    assert slower([10.0, 10.1, 9.9], [8.0, 8.1, 7.9], COST) is None


def test_the_bare_loop_is_not_ours_to_slow_down():
    assert slower([100.0], [50.0], BARE) is None


def test_the_table_names_each_figure_and_the_verdict():
    before, now = {RATE: [100.0], COST: [10.0]}, {RATE: [50.0], COST: [10.0]}
    lines = guard.table(before, now, guard.compared(before, now, LESS))
    assert any("SLOWER by 50%" in line and line.startswith("no-op jobs") for line in lines)
    assert lines[-1] == "guard: 1 figures became slower by more than noise"


def test_a_base_that_is_no_commit_is_said_in_a_sentence():
    with pytest.raises(SystemExit, match="^cost cannot be checked out .*: name a commit of this checkout$"):
        guard.main(["cost", "--pairs", "1"])
