"""The walk over streams, played as the claim script plays it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.broker.claim import WEIGHTS, Order


def play(order: Order, queues: int, stock: dict[tuple[int, int], int], limit: int) -> list[tuple[int, int]]:
    """What claim.lua takes: (queue, level) of each entry, in order; ``stock`` shrinks."""
    budget, left, taken = order.budgets(limit), limit, []
    walk = order.walk()
    for at in range(0, len(walk), 3):
        stream, queue, which = walk[at : at + 3]
        place = divmod(stream - queues - 1, 3)
        assert place[0] == queue - 1
        count = min(left, budget[which - 1], stock[place])
        stock[place] -= count
        budget[which - 1] -= count
        left -= count
        taken += [place] * count
    return taken


def stocked(queues: int, *each: int) -> dict[tuple[int, int], int]:
    return {(queue, level): each[level] for queue in range(queues) for level in range(3)}


def test_strict_is_queues_as_listed_and_levels_inside():
    order, stock = Order("ab"[:2], weighted=False), stocked(2, 2, 2, 2)
    assert play(order, 2, stock, 100) == [(q, level) for q in range(2) for level in range(3) for _ in range(2)]


def test_weighted_goes_by_level_over_all_queues():
    order, stock = Order("ab"[:2], weighted=True), stocked(2, 50, 50, 50)
    taken = play(order, 2, stock, 10)
    assert taken == [(0, 0)] * 6 + [(0, 1)] * 3 + [(0, 2)]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 11, 50, 100])
def test_shares_are_6_3_1_over_many_claims(limit):
    order, stock, rounds = Order("ab"[:1], weighted=True), stocked(1, 10**6, 10**6, 10**6), 1000
    counts = Counter(level for _ in range(rounds) for _, level in play(order, 1, stock, limit))
    total = rounds * limit
    assert sum(counts.values()) == total
    for level, weight in enumerate(WEIGHTS):
        assert abs(counts[level] - total * weight / 10) <= 2


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_shares_hold_for_any_mix_of_limits(limits):
    order, stock = Order("ab"[:1], weighted=True), stocked(1, 10**6, 10**6, 10**6)
    counts = Counter(level for limit in limits for _, level in play(order, 1, stock, limit))
    for level, weight in enumerate(WEIGHTS):
        assert abs(counts[level] - sum(limits) * weight / 10) <= 2


@given(
    queues=st.integers(1, 4),
    weighted=st.booleans(),
    data=st.data(),
    limits=st.lists(st.integers(1, 40), min_size=1, max_size=10),
)
def test_never_more_than_asked_for_and_never_less_than_there_is(queues, weighted, data, limits):
    order = Order("abcd"[:queues], weighted=weighted)
    stock = {(q, level): data.draw(st.integers(0, 30)) for q in range(queues) for level in range(3)}
    for limit in limits:
        there = sum(stock.values())
        taken = play(order, queues, stock, limit)
        assert len(taken) == min(limit, there)  # what a level leaves over reaches the others


def test_partitions_rotate_level_by_level_and_queues_stay_in_order():
    order, stock = Order("aaab", weighted=False), stocked(4, 1, 1, 1)
    firsts = []
    for _ in range(3):
        taken = play(order, 4, dict(stock), 12)
        assert [level for _, level in taken] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2]
        assert {queue for queue, _ in taken[:9]} == {0, 1, 2}
        firsts.append(taken[0][0])
    assert sorted(firsts) == [0, 1, 2]


def test_low_is_reached_within_ten_claims_of_one():
    order, stock = Order("abc", weighted=True), stocked(3, 10**6, 10**6, 10**6)
    taken = [level for _ in range(10) for _, level in play(order, 3, stock, 1)]
    assert Counter(taken) == {0: 6, 1: 3, 2: 1}
