"""What operators are told first, judged from rows alone."""

import msgspec
import pytest

from streamworker.broker import WorkerInfo
from streamworker.views.fleet import History, Stuck, attention
from streamworker.views.rows import QueueRow, SpinningRow, WorkerRow, worker_row


def queue(name="q", ready=0, dead=0, oldest=None, **more):
    return QueueRow(name, ready, 0, 0, dead, oldest, **{"paused": False, **more})


def worker(name="w", alive=True, pending=0, lag=0.0, queues=("q",)):
    return WorkerRow(name, alive, "host", 1, list(queues), 0, pending, 0, 0, 1.0, 1, lag)


def said(queues, workers=(), stuck=None, died=None):
    return [(notice.severity, notice.place) for notice in attention(queues, workers, stuck or {}, died or {})]


def test_all_is_well():
    assert said([queue(ready=5, oldest=3.0)], [worker()]) == []
    assert said([queue("empty")]) == []  # nobody has to serve a queue without jobs


def test_what_is_wrong_comes_in_order():
    queues = [
        queue("nap", ready=1, oldest=900.0, paused=True),
        queue("late", ready=1, oldest=61.0),
        queue("alone", ready=2),
    ]
    workers = [worker(queues=("nap", "late")), worker("gone", alive=False, pending=3), worker("slow", lag=1.5)]
    stuck = {"late": Stuck(100, True, 75.0)}
    assert said(queues, workers, stuck, {"alone": 7}) == [
        ("bad", "pending"), ("bad", "dead"), ("bad", "queues"), ("warn", "pending"), ("warn", "workers"),
        ("warn", "queues"), ("note", "queues"),
    ]  # fmt: skip
    sentences = [notice.sentence for notice in attention(queues, workers, stuck, {"alone": 7})]
    assert "100+ pending jobs not renewed for 1m 15s" in sentences[0]
    assert "nap is paused, 1 wait" in sentences


def test_a_job_that_spins_is_named_once_whoever_saw_it():
    """It goes from worker to worker; each tells what it saw of it last."""
    seen = [SpinningRow("q", "poll", "j", turns, 60.0) for turns in (12, 14)]
    workers = [msgspec.structs.replace(worker(str(n)), spinning=each) for n, each in enumerate(seen)]
    (notice,) = attention([queue()], workers, {}, {})
    assert (notice.severity, notice.place, notice.queue) == ("warn", "queues", "q")
    assert "the job j (poll) came back 14 times in a row" in notice.sentence
    gone = msgspec.structs.replace(worker(alive=False), spinning=seen[0])
    assert attention([queue()], [gone], {}, {}) == []


@pytest.mark.parametrize("told", ["", "x", "[]", '["q","k","j",1e99,1]', "\ud800", None])
def test_a_heartbeat_that_anybody_may_have_written(told):
    report = {} if told is None else {"spinning": told}
    assert worker_row(WorkerInfo("w", True, 0, ["q"], report), 0.0).spinning is None
    report = {"spinning": '["q","k","j",12,1.5]'}
    assert worker_row(WorkerInfo("w", True, 0, ["q"], report), 0.0).spinning == SpinningRow("q", "k", "j", 12, 1.5)


def test_a_queue_that_postgresql_holds_back():
    (notice,) = attention([queue(paused=True, inactive=True)], [], {}, {})
    assert "inactive in PostgreSQL" in notice.sentence


def test_history_is_bounded_and_tells_growth():
    history = History()
    for at in range(2000):
        history.add(at, [(queue(dead=at // 10), 1.0), (queue("other"), None)])
    assert len(history.of("q")) == len(history.of()) == 900
    assert history.died("q") == 30  # within 300 s
    assert history.died("nobody") == 0
    history.add(2001, [(queue("other"), None)])
    assert history.of("q") == []  # gone from the server, gone from here
    many = [(queue(f"q{n}"), None) for n in range(500)]
    history.add(2002, many)
    assert sum(bool(history.of(f"q{n}")) for n in range(500)) <= 200


def test_no_worker_is_said_to_have_vanished_while_none_can_say_that_it_lives():
    """A server that refuses writes takes no heartbeats either."""
    workers, queues = [worker("w", alive=False, pending=3)], [queue(ready=1, oldest=1.0)]
    assert said(queues, workers) == [("bad", "queues"), ("warn", "pending")]
    assert attention(queues, workers, {}, {}, silent=True) == []
