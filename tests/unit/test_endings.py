"""From a run's outcome to what the broker settles: the verdict and the job's next form."""

import json
from time import monotonic

import msgspec
import pytest

from streamworker import Backoff, codec
from streamworker.broker import SettleRequest
from streamworker.codec import State, sealed
from streamworker.errors import Discard, Snooze
from streamworker.execution import OK, Execution
from streamworker.job import (
    Abandoned,
    Claim,
    Dead,
    Deferred,
    Done,
    Interrupted,
    Ok,
    Raised,
    Recorded,
    ReleaseAt,
    RetryAt,
    Undecodable,
    UnknownKind,
)
from streamworker.policy import DONE, FREE_RETURNS, LONGEST_LEAST_WAIT, Facts, Limits
from streamworker.worker.settler import ending, judged

NOW = 1_000_000.0
SECRET = b"5ec2e7 0"


def run(outcome, document=None, *, count=1, suspect=False, body=None, attempts=None):
    body = json.dumps({"payload": {"a": 1}, "extra": [1], **(document or {})}).encode() if body is None else body
    made = Execution(Claim("q", "low", "stream:{q}:low", b"5-0", count, body, b"epoch", suspect, secret=SECRET))
    try:
        made.reading = codec.read(body)
        attempts = made.reading.attempt_count or 0
    except Exception:
        attempts = 0
    made.facts = Facts(attempts, Limits(max_attempts=3, backoff=Backoff()), 86_400)
    made.outcome = outcome
    return made


def end(*args, **kwargs):
    made = ending(run(*args, **kwargs), now=NOW, jitter=0.5)
    return made, None if made.body is None else json.loads(made.body)


def stated(deliveries=0, **state):
    """A document that a worker has put back."""
    return {"id": "i", "hop": 1, "streamworker_state": sealed(State(deliveries, **state), "i", SECRET)}


def remembered(made):
    return codec.state_of(codec.read(made.body), SECRET)


DERIVED = codec.derived_id("stream:{q}:low", b"epoch", b"5-0")


def test_done_carries_nothing():
    for outcome in (OK, Ok(5), Ok()):
        made, body = end(outcome)
        assert made.verdict == Done() and body is None


def test_a_failure_charges_an_attempt_and_raises_the_hop():
    made, body = end(Raised(ValueError("x")), {"id": "mine", "attempt_count": 1, "hop": 7, "kind": "k"})
    assert isinstance(made.verdict, RetryAt) and made.verdict.at == NOW + 4
    assert body == {"payload": {"a": 1}, "extra": [1], "id": "mine", "attempt_count": 2, "hop": 8, "kind": "k"}
    assert (made.job_id, made.kind, made.attempts) == ("mine", "k", 1)


def test_a_derived_id_is_written_at_the_first_rewrite():
    for outcome in (Raised(ValueError()), Raised(Snooze(1)), Interrupted("x"), UnknownKind("k")):
        made, body = end(outcome)
        assert body["id"] == made.job_id == DERIVED
        assert body["hop"] == 1


def test_a_release_charges_nothing_and_keeps_the_deaths():
    made, body = end(Interrupted("shutdown"), {"attempt_count": 1, "headers": {"trace": "00"}}, count=1)
    assert made.verdict == ReleaseAt(None, "shutdown")
    assert body["attempt_count"] == 1 and body["headers"] == {"trace": "00"}
    made, body = end(Interrupted("shutdown"), {"headers": {"trace": "00"}}, count=3)
    assert body["headers"] == {"trace": "00"} and remembered(made) == State(2)
    made, body = end(Interrupted("shutdown"), stated(2), count=2)
    assert remembered(made) == State(3) and "headers" not in body


def test_a_reserved_suspect_that_is_handed_back_keeps_all_its_deaths():
    made, _ = end(Interrupted("shutdown"), count=2, suspect=True)
    assert remembered(made) == State(2)


def test_a_charged_attempt_forgives_the_deaths():
    made, body = end(Raised(ValueError()), {**stated(2), "headers": {"other": 1}}, count=2)
    assert remembered(made) == State() and body["headers"] == {"other": 1}
    _, body = end(Raised(ValueError()), stated(2))
    assert "streamworker_state" not in body


def test_a_turn_lasts_until_the_job_has_run():
    waiting = stated(1, turn="1700000000000.001 0123abcd")
    for outcome in (Interrupted("shutdown"), UnknownKind("k")):
        made, _ = end(outcome, waiting)
        assert remembered(made).turn == "1700000000000.001 0123abcd"
    made, _ = end(Deferred(NOW + 1, "1700000000000.002 4567abcd", "normal/i/4567abcd"), waiting)
    assert remembered(made) == State(1, "1700000000000.002 4567abcd")
    ran = run(Raised(Snooze(1)), waiting)
    ran.started = 1.0
    assert remembered(ending(ran, now=NOW, jitter=0.5)) == State(1, returns=1)


@pytest.mark.parametrize("headers", [{}, {"headers": None}, {"headers": {}}, {"headers": {"a": 1}}])
def test_the_age_of_an_unknown_kind_is_remembered(headers):
    """Also where a producer wrote ``"headers": null``, or the kind would stay unknown for ever."""
    made, body = end(UnknownKind("k"), headers)
    assert made.verdict == ReleaseAt(NOW + 1, "unknown kind", unknown_since=NOW)
    assert remembered(made).unknown_since == NOW
    assert body["hop"] == 1


def test_the_dead_keep_their_bytes_and_count_their_attempts():
    made, body = end(Raised(Discard("no")), {"attempt_count": 1})
    assert made.verdict == Dead("discarded", "no") and body is None and made.attempts == 1
    made, body = end(Raised(ValueError("x")), {"attempt_count": 2})
    assert isinstance(made.verdict, Dead) and body is None and made.attempts == 3
    made, body = end(Abandoned(5), {"attempt_count": 2})
    assert made.verdict == Dead("worker died 5 times") and made.attempts == 2


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b'{"payload":{},"id":7}'])
def test_what_cannot_be_read_ends_with_its_reason(body):
    made, _ = end(Undecodable("at $.id"), body=body)
    assert made.verdict == Dead("undecodable", "at $.id")
    assert (made.job_id, made.kind, made.body) == ("", "", None)


def test_a_run_without_outcome_has_no_ending():
    with pytest.raises(AssertionError):
        ending(run(None), now=NOW, jitter=0.5)


# -- what charges nothing and never ends


def returned(made, outcome, ran):
    """The same job once more: ``ran`` seconds, then this outcome."""
    again = run(outcome, body=made.body)
    again.started = monotonic() - ran
    return ending(again, now=NOW, jitter=0.5)


def waits(outcomes, ran=0.0):
    made, found = SettleRequest(run(None).claim, Done(), run(None).claim.body), []
    for outcome in outcomes:
        made = returned(made, outcome, ran)
        found.append(round((NOW if made.verdict.at is None else made.verdict.at) - NOW, 3))
    return made, found


@pytest.mark.parametrize("outcome", [Raised(Snooze(0)), Raised(Snooze(0.05)), Interrupted("handed back")])
def test_a_job_that_comes_back_at_once_again_and_again_waits_longer_each_time(outcome):
    made, found = waits([outcome] * 40)
    asked = outcome.error.after if isinstance(outcome, Raised) else 0.0
    assert found[:FREE_RETURNS] == [asked] * FREE_RETURNS
    assert found[FREE_RETURNS : FREE_RETURNS + 4] == [0.2, 0.4, 0.8, 1.6]
    assert found[-1] == LONGEST_LEAST_WAIT
    assert remembered(made) == State(returns=40, rapid=40)
    assert made.verdict.turns == 40


@pytest.mark.parametrize(("wish", "ran"), [(1, 0.0), (60, 0.0), (0, 1.0), (0.5, 0.6), (86_400, 3.0)])
def test_one_that_waits_or_works_meanwhile_comes_back_when_it_said(wish, ran):
    made, found = waits([Raised(Snooze(wish))] * 40, ran)
    assert found == [wish] * 40
    assert remembered(made) == State(returns=40)
    assert made.verdict.turns == 0


def test_the_count_begins_anew_with_a_longer_snooze_and_ends_with_a_charge():
    spun, _ = waits([Raised(Snooze(0))] * 30)
    made = returned(spun, Raised(Snooze(60)), 0.0)
    assert made.verdict == ReleaseAt(NOW + 60, "snoozed")
    assert remembered(made) == State(returns=31)
    assert returned(made, Raised(Snooze(0)), 0.0).verdict.at == NOW
    assert remembered(returned(spun, Raised(ValueError("x")), 0.0)) == State()


def test_what_did_not_run_is_not_counted():
    spun, _ = waits([Raised(Snooze(0))] * 30)
    for outcome in (Interrupted("handed back"), Deferred(NOW + 1, "1 0123abcd", "m"), UnknownKind("k")):
        made = ending(run(outcome, body=spun.body), now=NOW, jitter=0.5)
        assert (remembered(made).returns, remembered(made).rapid) == (30, 30)
        assert made.verdict.turns == 0


@pytest.mark.parametrize(("ended", "order"), [(True, "o-1"), (False, "")])
def test_an_order_key_stays_with_the_later_hop_of_its_job(ended, order):
    made = run(Recorded(DONE, "superseded", ended=ended), {"id": "i", "order_key": "o-1"})
    made.facts = msgspec.structs.replace(made.facts, order="o-1")
    assert judged(made, NOW).order == order
