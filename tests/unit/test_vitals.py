"""From what a worker's parts tell to alive and ready, and why not."""

import msgspec
import pytest

from streamworker.worker.health import Vitals, not_alive, not_ready

WELL = Vitals(phase="working", lease=15, loop_silent=0.1, asking=4.9, renewed=5)


def of(**changes):
    return msgspec.structs.replace(WELL, **changes)


def test_a_worker_that_waits_for_jobs_is_alive_and_ready():
    assert not_alive(WELL) is None
    assert not_ready(WELL) is None


@pytest.mark.parametrize("phase", ["starting", "working", "draining"])
def test_a_loop_that_stands_still_is_not_alive_in_any_phase(phase):
    assert not_alive(of(phase=phase, loop_silent=14.9)) is None
    assert "event loop has not turned for 16 s" in not_alive(of(phase=phase, loop_silent=16))


def test_a_short_lease_makes_nobody_nervous():
    assert not_alive(of(lease=0.2, renewed=0.1, loop_silent=4.9, asking=29)) is None
    assert not_alive(of(lease=0.2, loop_silent=5.1)) is not None


def test_claims_that_fail_while_redis_answers_are_a_reason_to_restart():
    why = not_alive(of(asking=31, claim_trouble="the script is broken"))
    assert why == "no claim has succeeded for 31 s although Redis answers: the script is broken"
    assert not_alive(of(lease=60, asking=119)) is None
    assert not_alive(of(lease=60, asking=121)) is not None


def test_a_server_that_is_away_is_no_reason_to_restart_but_not_ready():
    gone = of(asking=3600, claim_trouble="Redis does not answer", renewal_trouble="Redis does not answer")
    assert not_alive(gone) is None
    assert not_ready(gone) == "Redis does not answer"
    hung = of(asking=3600, renewed=40.0)
    assert not_alive(hung) is None
    assert not_ready(hung) == "Redis has not answered for 40 s"


@pytest.mark.parametrize("phase", ["starting", "draining"])
def test_who_starts_or_drains_claims_nothing_and_is_alive(phase):
    assert not_alive(of(phase=phase, asking=3600)) is None
    assert not_ready(of(phase=phase)).startswith(phase)


def test_not_ready_before_the_first_renewal_and_while_another_server_is_away():
    assert not_ready(of(renewed=None)) is not None
    assert not_ready(of(away=("PostgreSQL does not answer",))) == "PostgreSQL does not answer"


def test_who_is_not_alive_is_not_ready():
    assert not_ready(of(loop_silent=60)) == not_alive(of(loop_silent=60))


@pytest.mark.parametrize("phase", ["working", "draining"])
def test_what_will_not_end_is_a_reason_to_restart(phase):
    assert not_alive(of(phase=phase, stuck="jobs.mail would not end")) == "jobs.mail would not end"
