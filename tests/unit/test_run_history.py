"""Histograms of the history: buckets of equal ratio, percentiles, and how PostgreSQL holds them."""

import random

import pytest

from streamworker.postgres.ledger_history import packed, unpacked
from streamworker.telemetry.run_history import BUCKETS, RunTally, add_counts, bucket_of, percentiles, seconds_of


@pytest.mark.parametrize("seconds", [1.1e-4, 0.00099, 0.001, 0.0234, 1.0, 59.9, 3600.0, 86_400.0, 5e5])
def test_a_time_is_within_six_percent_of_its_bucket(seconds):
    assert seconds_of(bucket_of(seconds)) == pytest.approx(seconds, rel=0.065)


def test_what_is_shorter_or_longer_than_all_buckets_is_in_the_first_or_last():
    assert [bucket_of(seconds) for seconds in (-1.0, 0.0, 1e-9, 1e-4)] == [0] * 4
    assert [bucket_of(seconds) for seconds in (1e7, 1e12)] == [BUCKETS - 1] * 2


def test_percentiles_are_those_of_the_values():
    chance = random.Random(8)
    values = sorted(chance.lognormvariate(-3, 1.5) for _ in range(5000))
    counts: dict[int, int] = {}
    for value in values:
        add_counts(counts, {bucket_of(value): 1})
    for share, found in zip((0.5, 0.95, 0.99), percentiles(counts, (0.5, 0.95, 0.99)), strict=True):
        assert found == pytest.approx(values[int(share * 5000)], rel=0.13)
    assert percentiles({}, (0.5, 0.99)) == [None, None]
    assert percentiles({7: 1}, (0.0, 1.0)) == [seconds_of(7)] * 2 or percentiles({7: 1}, (1.0,)) == [seconds_of(7)]


def test_a_histogram_is_one_number_and_numbers_are_added():
    chance = random.Random(2)
    for _ in range(100):
        one, other = (
            {chance.randrange(BUCKETS): chance.randrange(1, 10**9) for _ in range(chance.randrange(8))}
            for _ in range(2)
        )
        assert unpacked(packed(one)) == one
        import decimal

        with decimal.localcontext(prec=3000):
            both = str(decimal.Decimal(packed(one)) + decimal.Decimal(packed(other)))
        add_counts(one, other)
        assert unpacked(both) == one


def test_an_empty_tally_is_no_row():
    assert not RunTally()
    assert RunTally(started=1)
