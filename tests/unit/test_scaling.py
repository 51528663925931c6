"""How many slots a queue wants: rules of streamworker/worker/scale.py over samples alone."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.job import SOON
from streamworker.worker.scale import CALM, SPARED, QueueSample, ScalingSignal

EVERY = 5.0
WAIT = 30.0

COUNTS = st.integers(0, 10_000)
SAMPLES = st.lists(
    st.builds(dict, ready=COUNTS, running=COUNTS, soon=COUNTS, left=st.integers(0, 50_000), paused=st.booleans()),
    min_size=1,
    max_size=60,
)
WAITS = st.floats(0.1, 86_400)


def fed(samples: list[dict[str, Any]], *, counted: bool = True) -> tuple[ScalingSignal, list[QueueSample]]:
    signal, departed, given_ = ScalingSignal(SOON), 0, []
    for n, each in enumerate(samples):
        departed += each["left"]
        counts = {name: each[name] for name in ("ready", "running", "soon", "paused")}
        given_.append(QueueSample(at=n * EVERY, departed=departed if counted else None, **counts))
        signal.add(given_[-1])
    return signal, given_


def steady(signal: ScalingSignal, seconds: float, rate: float, run_time: float, **more: Any) -> list[int]:
    """Answers while jobs come at a rate and start at once."""
    answers, noise = [], more.pop("noise", None)
    at, departed = more.pop("at", 0.0), more.pop("departed", 0)
    for _ in range(round(seconds / EVERY)):
        at += EVERY
        came = rate * EVERY if noise is None else max(0.0, noise.gauss(rate * EVERY, math.sqrt(rate * EVERY)))
        departed += round(came)
        busy = rate * run_time if noise is None else max(0.0, noise.gauss(rate * run_time, math.sqrt(rate * run_time)))
        signal.add(QueueSample(at, 0, round(busy), departed=departed, **more))
        answers.append(signal.slots(WAIT))
    return answers


@given(SAMPLES, WAITS, st.booleans())
def test_never_zero_while_there_is_work_and_never_fewer_than_run(samples, wait, counted):
    signal, seen = fed(samples, counted=counted)
    last, slots = seen[-1], signal.slots(wait)
    assert slots >= last.running
    if last.running or (not last.paused and (last.ready or last.soon)):
        assert slots >= 1


@given(SAMPLES, WAITS)
def test_no_more_than_there_will_be_jobs(samples, wait):
    signal, seen = fed(samples)
    most = max(each.jobs + each.soon for each in seen)
    came = max((b.jobs - a.jobs + (b.departed or 0) - (a.departed or 0)) for a, b in pairwise([*seen, seen[-1]]))
    assert signal.slots(wait) <= 1 + (most + math.ceil(max(0, came) / EVERY * wait)) / SPARED


@given(SAMPLES, WAITS, WAITS)
def test_who_may_wait_longer_wants_no_more(samples, one, other):
    """But for the running jobs, which are the same, and the rule that spares a tenth."""
    signal, _ = fed(samples)
    short, long = sorted((one, other))
    assert signal.slots(long) * SPARED <= signal.slots(short) + 1 or signal.slots(long) <= most_needed(samples, signal)


def most_needed(samples, signal):
    """What jobs that come take: `most` (rule 2) grows with the wait until it does not bind."""
    return math.ceil(max(need.slots(86_400.0) for need in signal._needs) / SPARED) + 1


@given(SAMPLES, WAITS)
def test_the_same_samples_are_answered_alike_and_idle_queues_want_nothing(samples, wait):
    signal, seen = fed(samples)
    again, _ = fed(samples)
    assert signal.slots(wait) == again.slots(wait) == signal.slots(wait)
    at, departed = seen[-1].at, seen[-1].departed
    answers = []
    for n in range(1, 40):
        signal.add(QueueSample(at + n * EVERY, 0, 0, departed=departed))
        answers.append(signal.slots(wait))
    assert answers[-1] == 0
    assert answers == sorted(answers, reverse=True)  # it falls, and never rises
    last_busy = max((index for index, sample in enumerate(seen) if _busy(sample)), default=None)
    if last_busy is not None:
        calm = int(CALM / EVERY) - 1 - (len(seen) - 1 - last_busy)
        assert all(answer >= 1 for answer in answers[: max(0, calm)])


def _busy(sample: QueueSample) -> bool:
    return bool(sample.running or (not sample.paused and (sample.ready or sample.soon)))


@given(SAMPLES, WAITS)
def test_a_paused_queue_comes_down_to_what_it_runs(samples, wait):
    signal, seen = fed(samples)
    for n in range(1, 60):
        signal.add(QueueSample(seen[-1].at + n * EVERY, 500, 7, soon=9, departed=seen[-1].departed, paused=True))
    assert signal.slots(wait) == 7


@pytest.mark.parametrize(("rate", "run_time"), [(50, 2.0), (400, 0.05), (2, 30.0), (0.2, 1.0)])
def test_a_steady_load_wants_what_it_occupies_whatever_the_noise(rate, run_time):
    """Rate times run time, and at most a tenth and the peaks of the noise more, and it seldom changes."""
    answers = steady(ScalingSignal(SOON), 3600, rate, run_time, noise=random.Random(5))
    held, offered = answers[120:], rate * run_time
    assert min(held) >= math.floor(offered)
    assert max(held) <= math.ceil((offered + 4 * math.sqrt(offered) + 1) / SPARED)
    assert sum(a != b for a, b in pairwise(held)) <= 30  # of 600 answers; the load changes with each of them


def test_a_backlog_wants_to_be_gone_within_the_wait():
    signal = ScalingSignal(SOON)
    steady(signal, 600, 50, 2.0)
    signal.add(QueueSample(605, 3000, 100, departed=30_250))
    assert 300 <= signal.slots(30) <= 330  # 100 for those that come, 200 for the backlog
    assert 120 <= signal.slots(300) <= 140
    assert signal.slots(1) > 3000  # as many slots as jobs


def test_a_lump_is_a_backlog_and_no_rate():
    signal = ScalingSignal(SOON)
    for n in range(20):
        signal.add(QueueSample(n * EVERY, 0, 0, departed=0))
    signal.add(QueueSample(100, 6000, 0, departed=0))
    assert signal.rate == 0
    assert signal.slots(60) == 100  # at a guessed second each


def test_more_is_wanted_at_once_and_less_after_a_while():
    signal = ScalingSignal(SOON)
    steady(signal, 600, 10, 1.0)
    assert signal.slots(WAIT) == 10
    more = steady(signal, 300, 100, 1.0, at=600, departed=6000)
    assert more[0] >= 90  # they run already
    less = steady(signal, 600, 10, 1.0, at=900, departed=36_000)
    assert all(answer >= 90 for answer in less[: int(CALM / EVERY) - 1])
    assert less[-1] <= 12


def test_delayed_jobs_that_are_due_soon_want_a_worker_before_they_are_due():
    signal = ScalingSignal(SOON)
    signal.add(QueueSample(0, 0, 0, soon=0, departed=0))
    assert signal.slots(WAIT) == 0
    signal.add(QueueSample(5, 0, 0, soon=600, departed=0))
    assert signal.slots(WAIT) == 10
    signal.add(QueueSample(10, 0, 0, soon=1, departed=0))
    assert signal.slots(WAIT) >= 1


def test_a_backlog_that_has_waited_is_cleared_in_what_is_left_of_the_wait():
    signal = ScalingSignal(SOON)
    steady(signal, 600, 50, 2.0)
    signal.add(QueueSample(605, 3000, 100, departed=30_250, oldest=10))
    assert 400 <= signal.slots(30) <= 420  # 100 for those that come, 300 for a backlog that has 20 s left
    signal.add(QueueSample(610, 3000, 100, departed=30_500, oldest=86_400))
    assert signal.slots(30) <= 530  # half the wait, however late it is


def test_long_jobs_that_have_not_ended_are_known_to_be_long():
    """300 jobs of ten minutes: none has ended, and the run time is at least what they have run."""
    signal = ScalingSignal(SOON)
    for n in range(60):
        signal.add(QueueSample(n * EVERY, 200, 100, departed=0))
    assert signal.run_time > 60
    assert signal.slots(WAIT) == 300


def test_run_times_are_remembered_over_an_idle_night():
    signal = ScalingSignal(SOON)
    steady(signal, 600, 10, 4.0)
    for n in range(2000):
        signal.add(QueueSample(605 + n * EVERY, 0, 0, departed=6000))
    assert signal.run_time == pytest.approx(4.0, rel=0.1)


def test_without_a_count_of_jobs_that_left_it_is_the_load():
    signal = ScalingSignal(SOON)
    signal.add(QueueSample(0, 80, 20))
    assert signal.slots(WAIT) == 100


def test_a_stream_that_was_deleted_and_a_clock_that_stands_are_no_arrivals():
    signal = ScalingSignal(SOON)
    steady(signal, 100, 10, 1.0)
    signal.add(QueueSample(105, 0, 10, departed=0))
    signal.add(QueueSample(105, 0, 9_999, departed=0))
    assert signal.slots(WAIT) < 20
