"""The model of what a job costs over several Redis nodes: the fit finds prices, and rates follow from them."""

from __future__ import annotations

import pytest

from benchmarks.capacity import Prices, Producers, Sample, fit, least_squares, most, required

PRICES = Prices(stored=2.0, run=5.0, call=60.0, job=10.0, trip=200.0)


def sample(
    load: str, trips: float, *, stored: bool = True, run: bool = True, nodes: int = 1, noise: float = 0
) -> Sample:
    told = Sample(
        nodes=nodes, load=load, stored=stored, run=run, trips=trips, producer_trips=trips / 10, redis=1.0, worker=1.0
    )
    spent = {"redis": PRICES.redis(told) * (1 + noise), "worker": PRICES.worker(told) * (1 - noise)}
    return Sample(**{name: getattr(told, name) for name in told.__struct_fields__ if name not in spent}, **spent)


RUNS = [
    sample("in bulk", 0.006, stored=True, run=False),
    sample("backlog", 0.04, stored=False),
    *(sample(f"{rate}/s", nodes * 800 / rate, nodes=nodes) for rate in (500, 8000) for nodes in (1, 2, 4)),
]


def test_the_fit_finds_the_prices_that_made_the_samples():
    found = fit(RUNS)
    for name in PRICES.__struct_fields__:
        assert getattr(found, name) == pytest.approx(getattr(PRICES, name))


def test_errors_count_in_percent_so_that_dear_jobs_do_not_hide_cheap_ones():
    off = [
        sample(each.load, each.trips, stored=each.stored, run=each.run, noise=(-1) ** n * 0.1)
        for n, each in enumerate(RUNS)
    ]
    found = fit(off)
    for each in off:
        assert found.redis(each) == pytest.approx(each.redis, rel=0.25)
    assert found.redis(off[0]) < found.redis(off[1]) < 12, "a bulk of dear runs leaves the price of a cheap one alone"


def test_runs_that_do_not_tell_the_prices_apart_are_refused():
    with pytest.raises(ValueError, match="measure more numbers of nodes"):
        fit([sample("500/s", 1.5)] * 4)


def test_least_squares_of_a_line():
    assert least_squares([[1, 1], [1, 2], [1, 3]], [5, 7, 9]) == pytest.approx([3, 2])


def test_what_a_rate_takes():
    needs = required(PRICES, 1_000_000, 0.1, Producers(), used=0.5)
    # 2 + 5 + 60 * 0.1 and the producers' round trips, on half of a core; more nodes need more of those.
    assert needs.redis == pytest.approx(13 + 60 * needs.nodes / 1000)
    assert most(PRICES, needs.nodes, 0.1, Producers(), used=0.5) >= 1_000_000
    assert most(PRICES, needs.nodes - 1, 0.1, Producers(), used=0.5) < 1_000_000
    assert (needs.worker, needs.workers) == (pytest.approx(30), 60)


def test_a_single_enqueue_takes_a_round_trip_of_its_own_however_many_nodes_there_are():
    assert Producers(1).cost(PRICES, 4) == Producers(1).cost(PRICES, 1) == 62
    assert Producers(1, stored=25.0).cost(PRICES, 4) == 25, "as measured"
