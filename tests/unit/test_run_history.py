"""Histograms of the history: buckets of equal ratio, percentiles, and how PostgreSQL holds them."""

import random
from collections import Counter

import pytest

from streamworker.broker import SettleRequest
from streamworker.execution import Execution
from streamworker.handlers import Handlers
from streamworker.job import Claim, Dead, Done, Ok, ReleaseAt, RetryAt, Settled
from streamworker.payload import Payload
from streamworker.policy import DONE
from streamworker.postgres.ledger_history import packed, unpacked
from streamworker.telemetry.run_history import BUCKETS, RunTally, add_counts, bucket_of, percentiles, seconds_of
from streamworker.worker.history_recorder import EXACT, UNKNOWN, RunTallies


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


class One(Payload, kind="one", queue="q"):
    pass


class Two(Payload, kind="two", queue="q"):
    pass


def handlers():
    made = Handlers()
    for kind in (One, Two):

        @made.handler
        async def handle(payload: kind) -> None:
            pass

    return made.registrations


REGISTRATIONS = handlers()
NOW = 1_796_000_000.0


def run_of(
    registration, queue: str = "q", *, started: bool = True, ran: float = 0.01, waited: float = 1.0
) -> Execution:
    """A run that has its outcome; the monotonic clock shows seconds since `NOW`."""
    entry = b"%d-0" % round((NOW - waited) * 1000)
    run = Execution(Claim(queue, "normal", f"stream:{{{queue}}}", entry, 1, b"{}", b"e"))
    run.registration, run.outcome = registration, Ok()
    if started:
        run.started, run.ended = 0.0, ran
    return run


def tallies_of(*, durable: bool = False) -> RunTallies:
    tallies = RunTallies(durable=durable)
    tallies.offset = NOW
    return tallies


def settle(tallies: RunTallies, batch, verdicts, results) -> None:
    items = [SettleRequest(run.claim, verdict) for run, verdict in zip(batch, verdicts, strict=True)]
    plain = set(results) == {Settled.SETTLED} and all(verdict == DONE for verdict in verdicts)
    tallies.settled(batch, items, results, plain)


@pytest.mark.parametrize("durable", [False, True])
def test_counts_are_exact_whatever_is_in_a_batch(durable):
    chance = random.Random(11)
    verdicts = [DONE, DONE, DONE, RetryAt(NOW, "error"), Dead("raised", "error"), ReleaseAt(None, "shutdown")]
    for _ in range(200):
        tallies, wanted = tallies_of(durable=durable), {}
        plain = chance.random() < 0.5
        queues, kinds = chance.choice([["q"], ["q", "r"]]), chance.choice([REGISTRATIONS[:1], REGISTRATIONS])
        for _ in range(chance.randrange(1, 5)):
            batch, told, results = [], [], []
            for _ in range(chance.randrange(1, 30)):
                verdict = DONE if plain else chance.choice(verdicts)
                result = (
                    Settled.SETTLED if plain else chance.choice([Settled.SETTLED] * 6 + [Settled.LOST, Settled.REFUSED])
                )
                started = not (durable or verdict != DONE) or chance.random() < 0.8
                registration = None if verdict != DONE and not started else chance.choice(kinds)
                run = run_of(registration, chance.choice(queues), started=started)
                batch.append(run)
                told.append(verdict)
                results.append(result)
                kind = registration.kind if registration is not None else UNKNOWN
                counts = wanted.setdefault((run.claim.queue, kind), Counter())
                counts["started"] += started and result is not Settled.REFUSED
                if result is Settled.SETTLED:
                    counts["done"] += isinstance(verdict, Done)
                    counts["failed"] += isinstance(verdict, RetryAt | Dead)
                    counts["retried"] += isinstance(verdict, RetryAt)
                    counts["timed"] += started
            settle(tallies, batch, told, results)
        found = {
            place: Counter(
                started=tally.started, done=tally.done, failed=tally.failed, retried=tally.retried,
                timed=sum(tally.run.values()),
            )
            for place, tally in tallies.take().items()
            if tally
        }  # fmt: skip
        assert found == {place: counts for place, counts in wanted.items() if +counts}
        assert tallies.take() == {}


@pytest.mark.parametrize("batch", [1, 50, 1000])
def test_busy_kinds_are_timed_by_a_fair_sample_and_rare_ones_in_full(batch, monkeypatch):
    chance, tallies, timed, values = random.Random(3), tallies_of(), [], []
    time = RunTallies._time
    monkeypatch.setattr(RunTallies, "_time", lambda self, *args: (timed.append(args), time(self, *args)))
    random.seed(batch)
    jobs, rare = 40_000, 100
    for at in range(0, jobs, batch):
        runs = []
        for number in range(at, min(jobs, at + batch)):
            values.append(chance.lognormvariate(-3, 1.5))
            runs.append(run_of(REGISTRATIONS[0], ran=values[-1], waited=values[-1] * 3))
            if number % (jobs // rare) == 0:
                runs.insert(chance.randrange(len(runs)), run_of(REGISTRATIONS[1], ran=5.0))
        settle(tallies, runs, [DONE] * len(runs), [Settled.SETTLED] * len(runs))
    found = tallies.take()
    busy = found["q", "one"]
    assert (busy.started, busy.done) == (jobs, jobs)
    assert len(timed) < 10 * EXACT  # all but a few are only counted
    assert sum(busy.run.values()) == pytest.approx(jobs, rel=0.15)
    values.sort()
    for times, factor in ((busy.run, 1), (busy.wait, 3)):
        for share, seconds in zip((0.5, 0.95), percentiles(times, (0.5, 0.95)), strict=True):
            assert seconds == pytest.approx(values[int(share * jobs)] * factor, rel=0.25)
    assert found["q", "two"].run == {bucket_of(5.0): rare}
