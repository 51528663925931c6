"""What a handler sees of its job and its worker."""

import json
import time
from datetime import UTC, datetime

import pytest

from streamworker import Context, codec
from streamworker.codec import State, sealed
from streamworker.context import Shared
from streamworker.errors import ConfigurationError
from streamworker.job import Claim
from streamworker.policy import Limits


def context(document=None, *, count=1, max_attempts=3, **shared):
    body = json.dumps({"payload": {"a": 1}, **(document or {})}).encode()
    claim = Claim("billing", "high", "stream:{billing}:high", b"5-0", count, body, b"epoch", secret=b"5ec2e7 0")
    return Context(
        Shared("worker-x", shared.pop("services", None), **shared), claim, codec.read(body), Limits(max_attempts)
    )


def test_the_job():
    ctx = context(
        {"id": "i", "kind": "k", "attempt_count": 1, "hop": 2, "headers": {"t": 1}, "run_at": "2026-01-01T00:00:00Z"}
    )
    job = ctx.job
    assert (job.id, job.queue, job.kind, job.level, job.attempts, job.max_attempts, job.hop) == (
        "i",
        "billing",
        "k",
        "high",
        1,
        3,
        2,
    )
    assert json.loads(bytes(job.payload)) == {"a": 1}
    assert job.headers == {"t": 1}
    assert job.run_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert ctx.job is job
    assert context().job.id == codec.derived_id("stream:{billing}:high", b"epoch", b"5-0")


@pytest.mark.parametrize(
    ("failed", "attempt", "last"), [(None, 1, False), (0, 1, False), (1, 2, False), (2, 3, True), (9, 10, True)]
)
def test_attempts_count_from_one(failed, attempt, last):
    ctx = context({"attempt_count": failed})
    assert (ctx.attempt, ctx.last_attempt) == (attempt, last)


def test_deliveries_include_those_on_earlier_entries():
    assert context(count=1).delivery == 1
    state = {"streamworker_state": sealed(State(2), "i", b"5ec2e7 0")}
    assert context({"id": "i", **state}, count=2).delivery == 4
    assert context({"id": "j", **state}, count=2).delivery == 2  # of another job


def test_the_worker():
    ctx = context(services="svc", database="db")
    assert (ctx.services, ctx.database, ctx.worker_id, ctx.stopping, ctx.cancelled) == (
        "svc",
        "db",
        "worker-x",
        False,
        False,
    )
    ctx.cancel("TimedOut")
    assert ctx.cancelled
    ctx._shared.stopping = True
    assert ctx.stopping


def test_what_is_not_there_says_what_to_do():
    ctx = context()
    with pytest.raises(ConfigurationError, match=r"testing\.context"):
        _ = ctx.redis


def test_the_deadline_is_a_moment():
    ctx = context()
    assert ctx.deadline is None
    ctx.deadline_at = time.monotonic() + 30
    assert ctx.deadline is not None
    assert 29 < (ctx.deadline - datetime.now(UTC)).total_seconds() <= 30


def test_the_log_is_bound_once():
    ctx = context({"id": "i", "kind": "k"})
    assert ctx.log is ctx.log
    assert ctx.log._context == {"job_id": "i", "kind": "k", "queue": "billing", "worker_id": "worker-x", "attempt": 1}


def test_nothing_can_be_hung_on_it():
    with pytest.raises(AttributeError):
        context().anything = 1
