"""The rules of what happens to a job, one table, and what must hold for all numbers."""

import itertools
import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.errors import Discard, Parked, Retry, Snooze
from streamworker.job import (
    Abandoned,
    Cancelled,
    Dead,
    Deferred,
    Done,
    Expired,
    Interrupted,
    Ok,
    OutOfTurn,
    Postponed,
    Raised,
    Recorded,
    ReleaseAt,
    RetryAt,
    TimedOut,
    Undecodable,
    UnknownKind,
    Unopened,
)
from streamworker.policy import (
    Backoff,
    Facts,
    Limits,
    abandoned,
    apart_from,
    group_sizes,
    half_of,
    judge,
    least_wait,
    word_of,
)
from streamworker.redact import MAX_CHARS as MAX_ERROR_CHARS
from streamworker.redact import describe

NOW = 1_000_000.0
LIMITS = Limits(max_attempts=3, backoff=Backoff(base=1, cap=300, jitter=0.25))


def facts(attempts: int = 0, ttl: float = 86_400.0, limits: Limits = LIMITS) -> Facts:
    return Facts(attempts, limits, ttl)


@pytest.mark.parametrize(
    ("outcome", "attempts", "verdict"),
    [
        (Ok(), 0, Done()),
        (Ok("value"), 2, Done()),
        (Abandoned(5), 0, Dead("worker died 5 times")),
        (Raised(Discard("gone")), 0, Dead("discarded", "gone")),
        (Raised(Snooze(60)), 2, ReleaseAt(NOW + 60, "snoozed")),
        (Raised(Snooze(0)), 0, ReleaseAt(NOW, "snoozed")),
        (Raised(Retry(after=60)), 0, RetryAt(NOW + 60, "the handler asked for a retry")),
        (Raised(Retry(after=0, reason="busy")), 1, RetryAt(NOW, "busy")),
        (Raised(Retry()), 0, RetryAt(NOW + 2, "Retry: the handler asked for a retry")),
        (Raised(Retry(after=60)), 2, Dead("failed 3 of 3 attempts", "the handler asked for a retry", charged=True)),
        (Raised(ValueError("x")), 0, RetryAt(NOW + 2, "ValueError: x")),
        (Raised(ValueError("x")), 1, RetryAt(NOW + 4, "ValueError: x")),
        (Raised(ValueError("x")), 2, Dead("failed 3 of 3 attempts", "ValueError: x", charged=True)),
        (Raised(ValueError("x")), 99, Dead("failed 100 of 3 attempts", "ValueError: x", charged=True)),
        (Raised(SystemExit(1)), 0, RetryAt(NOW + 2, "SystemExit: 1")),
        (Raised(KeyboardInterrupt()), 0, RetryAt(NOW + 2, "KeyboardInterrupt: ")),
        (TimedOut(30.0), 0, RetryAt(NOW + 2, "timed out after 30 s")),
        (TimedOut(0.5), 2, Dead("failed 3 of 3 attempts", "timed out after 0.5 s", charged=True)),
        (Interrupted("shutdown"), 2, ReleaseAt(None, "shutdown")),
        (Postponed(NOW + 5), 2, ReleaseAt(NOW + 5, "not due yet")),
        (UnknownKind("k"), 0, ReleaseAt(NOW + 1, "unknown kind", unknown_since=NOW)),
        (UnknownKind("k", NOW - 100), 0, ReleaseAt(NOW + 50, "unknown kind", unknown_since=NOW - 100)),
        (UnknownKind("k", NOW - 9000), 0, ReleaseAt(NOW + 300, "unknown kind", unknown_since=NOW - 9000)),
        (UnknownKind("k", NOW - 86_399.5), 0, ReleaseAt(NOW + 0.5, "unknown kind", unknown_since=NOW - 86_399.5)),
        (UnknownKind("k", NOW + 500), 0, ReleaseAt(NOW + 1, "unknown kind", unknown_since=NOW)),
        (
            UnknownKind("k", NOW - 86_400),
            0,
            Dead("unknown kind", "no handler for 'k' appeared within 86400 s"),
        ),
        (Undecodable("at $.x"), 0, Dead("undecodable", "at $.x")),
    ],
)
def test_every_rule(outcome, attempts, verdict):
    assert judge(outcome, facts(attempts), now=NOW, jitter=0.5) == verdict


def test_the_default_waits_are_those_of_the_design():
    limits = Limits()
    waits = [judge(Raised(ValueError()), facts(n, limits=limits), now=0, jitter=0.5).at for n in range(10)]
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert (limits.max_attempts, limits.timeout) == (20, 300)
    last = judge(Raised(ValueError()), facts(19, limits=limits), now=0, jitter=0.5)
    assert isinstance(last, Dead) and last.charged


@pytest.mark.parametrize(("deliveries", "deaths"), [(1, None), (5, None), (6, 5), (7, 6)])
def test_a_job_may_be_delivered_five_times(deliveries, deaths):
    assert abandoned(deliveries, 5) == (None if deaths is None else Abandoned(deaths))


seconds = st.floats(0, 1e9, allow_nan=False)
unit = st.floats(0, 1, allow_nan=False)


@given(base=seconds, cap=seconds, jitter=unit, at=unit, failures=st.integers(0, 10**6))
def test_backoff_stays_in_its_band(base, cap, jitter, at, failures):
    wait = Backoff(base, cap, jitter).delay(failures, at)
    assert 0 <= wait <= cap * (1 + jitter) * (1 + 1e-9)
    assert math.isfinite(wait)


@given(base=seconds, cap=seconds, jitter=unit, at=unit, failures=st.integers(0, 2000))
def test_backoff_never_shrinks(base, cap, jitter, at, failures):
    backoff = Backoff(base, cap, jitter)
    assert backoff.delay(failures, at) <= backoff.delay(failures + 1, at)


@given(base=seconds, jitter=unit, failures=st.integers(1, 60))
def test_the_ends_of_the_band_are_reached(base, jitter, failures):
    backoff = Backoff(base, 300, jitter)
    middle = min(300, base * 2.0**failures)
    assert backoff.delay(failures, 0) == pytest.approx(middle * (1 - jitter))
    assert backoff.delay(failures, 1) == pytest.approx(middle * (1 + jitter))


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": -1},
        {"cap": -1},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"base": math.nan},
        {"cap": math.inf},
        {"jitter": math.nan},
        {"cap": 1e17},
    ],
)
def test_a_senseless_backoff_is_refused(wrong):
    with pytest.raises(ValueError):
        Backoff(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"max_attempts": 0}, {"timeout": 0}, {"timeout": -1}, {"timeout": math.inf}, {"timeout": math.nan}]
)
def test_senseless_limits_are_refused(wrong):
    with pytest.raises(ValueError):
        Limits(**wrong)


@pytest.mark.parametrize("wish", [Retry, Snooze])
@pytest.mark.parametrize("after", [-1, -1e-9, math.inf, math.nan, 1e17])
def test_wishes_for_senseless_waits_are_refused(wish, after):
    with pytest.raises(ValueError):
        wish(after)


@given(ttl=st.floats(0, 2e4, allow_nan=False), start=st.floats(0, 2e9))
def test_unknown_kinds_end_by_age_after_few_and_growing_waits(ttl, start):
    now, since, waits = start, None, []
    for _ in range(40 + int(ttl / 300)):
        verdict = judge(UnknownKind("k", since), facts(ttl=ttl), now=now, jitter=0.5)
        if isinstance(verdict, Dead):
            break
        assert verdict.at is not None and verdict.unknown_since is not None
        assert verdict.at >= now
        waits.append(verdict.at - now)
        now, since = verdict.at + 0.001, float(int(verdict.unknown_since))  # as it is written: whole seconds
    else:
        pytest.fail("it never ends")
    assert sum(waits) <= ttl + 1
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(waits[:-1]))


@given(
    outcome=st.one_of(
        st.builds(lambda a: Raised(Snooze(a)), seconds),
        st.builds(lambda a: Raised(Retry(a)), seconds),
        st.just(Raised(ValueError())),
        st.builds(TimedOut, seconds),
        st.builds(UnknownKind, st.text(), st.none() | st.floats(0, 4e9)),
    ),
    attempts=st.integers(0, 100),
    jitter=unit,
)
def test_nothing_is_ever_due_before_now(outcome, attempts, jitter):
    verdict = judge(outcome, facts(attempts), now=NOW, jitter=jitter)
    assert isinstance(verdict, Dead) or verdict.at >= NOW


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_errors_are_described_in_one_bounded_line():
    assert describe(ValueError("x")) == "ValueError: x"
    assert describe(Broken()) == "Broken: (its message cannot be shown)"
    assert len(describe(ValueError("x" * 100_000))) == MAX_ERROR_CHARS
    assert len(judge(Undecodable("x" * 100_000), facts(), now=0, jitter=0).error) == MAX_ERROR_CHARS


def test_a_discard_takes_the_exception_that_was_caught():
    assert judge(Raised(Discard(ValueError("x" * 9000))), facts(), now=0, jitter=0) == Dead(
        "discarded", "x" * MAX_ERROR_CHARS
    )  # type: ignore[arg-type]
    assert len(judge(Raised(Retry(1, "x" * 9000)), facts(2), now=0, jitter=0).error) == MAX_ERROR_CHARS


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (lambda: Snooze(timedelta(minutes=5)), "write 300, or .total_seconds"),
        (lambda: Retry(after=timedelta(minutes=5)), "write 300, or .total_seconds"),
        (lambda: Retry(after="60"), "needs seconds as a number, such as 60, and was given str"),
        (lambda: Snooze(None), "was given NoneType"),
        (lambda: Snooze(True), "was given bool"),
    ],
)
def test_wishes_take_seconds_and_say_so(wish, words):
    with pytest.raises(TypeError, match=words):
        wish()


@pytest.mark.parametrize(
    ("deliveries", "concurrency", "sizes"),
    [
        (1, 100, (1,)),
        (3, 100, (1,)),
        (4, 100, (50, 1)),
        (5, 100, (50, 8, 1)),
        (5, 1, (1, 1)),
        (10, 100, (50, 25, 13, 7, 4, 2, 1)),
        (100, 1000, (500, 250, 125, 63, 32, 16, 8, 4, 2, 1)),
    ],
)
def test_each_group_is_at_most_half_of_the_one_before_and_the_last_delivery_is_alone(deliveries, concurrency, sizes):
    assert group_sizes(deliveries, concurrency) == sizes
    assert apart_from(sizes) == (4 if deliveries > 3 else 3)
    assert [*sizes, *[1] * deliveries][max(0, deliveries - 3)] == 1


def test_each_delivery_splits_each_group_in_two():
    entries = [b"%d-%d" % (n, n % 7) for n in range(2000)]
    for delivery in (3, 4, 5):
        halves = {half_of(entry, delivery) for entry in entries}
        assert len(halves) == 2 ** (delivery - 2)
        assert all(half_of(entry, delivery + 1).startswith(half_of(entry, delivery)) for entry in entries)


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (Ok(), "ok"), (Raised(ValueError()), "raised"), (Raised(Snooze(1)), "snoozed"), (Raised(Discard("no")), "discarded"),
        (Raised(Parked("go", None)), "waiting"),
        (TimedOut(1.0), "timed_out"), (Interrupted("shutdown"), "interrupted"), (Cancelled(), "cancelled"),
        (Expired(), "expired"), (Deferred(NOW, "", ""), "deferred"), (OutOfTurn(), "out_of_turn"), (Undecodable("why"), "undecodable"),
        (UnknownKind("k"), "unknown_kind"), (Unopened("why"), "unopened"), (Postponed(NOW), "postponed"),
        (Abandoned(3), "abandoned"), (Recorded(Done(), "why"), "recorded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_outcome_has_the_word_that_metrics_and_the_ledger_use(outcome, word):
    assert word_of(outcome) == word


def test_the_least_wait_after_rapid_returns_doubles_from_the_eleventh_on():
    assert [least_wait(rapid) for rapid in (0, 10, 11, 12, 13, 19, 30, 10_000)] == [0, 0, 0.2, 0.4, 0.8, 51.2, 60, 60]
