"""Workers as processes of their own: killed, stopped, frozen, blocked, poisoned. Nothing may be lost, nothing charged twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from streamworker.job import LEVELS, Level
from streamworker.policy import half_of
from tests import forkserver
from tests.conftest import Server, eventually_blocking
from tests.contract.ground import Ground
from tests.contract.helpers import list_only, stream_only

ROOT = Path(__file__).parents[2]
Q = "stream:{q}"
DEAD = f"{Q}:dead"


class Process:
    """One worker process and what it says."""

    def __init__(
        self, url: str, log: Path, *arguments: str, constants: dict[str, float] | None = None, **settings: Any
    ) -> None:
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))
        }
        env |= {"REDIS_URL": url, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        defaults = {"LEASE": 1, "GRACE": 5, "CONCURRENCY": 10, "QUEUES": "q"}
        env |= {f"STREAMWORKER_{name}": str(value) for name, value in {**defaults, **settings}.items()}
        self.log = log
        with log.open("wb") as out:
            self._process = forkserver.forked(
                arguments, module="tests.lifecycle.apps", env=env, cwd=ROOT, stdout=out, stderr=out, constants=constants
            )

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, timeout: float = 15) -> int:
        return self._process.wait(timeout)

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def said(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each.get("event") == event]

    def ready(self) -> Process:
        eventually_blocking(lambda: self.ended or self.said("worker_ready"), 20)
        assert not self.ended, self.log.read_text()
        return self

    @property
    def worker_id(self) -> str:
        return str(self.said("worker_starting")[0]["worker_id"])


Start = Callable[..., Process]


@pytest.fixture
def start(redis_url: str, ground: Ground, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    processes: list[Process] = []

    def make(*arguments: str, url: str = redis_url, **settings: Any) -> Process:
        log = tmp_path / f"worker{len(processes)}.log"
        processes.append(Process(url, log, *arguments, **{"MODE": ground.mode, **settings}))
        return processes[-1]

    yield make
    for process in processes:
        process.kill()
        if getattr(request.node, "failed", True):
            print(f"--- {process.log.name}\n{process.log.read_text(errors='replace')[-3000:]}")
        assert "Traceback" not in process.log.read_text(errors="replace").replace('"exception":', "")


@pytest.fixture
def raw(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, protocol=2, decode_responses=True) as client:
        yield client


def put(ground: Ground, kind: str, name: str, level: Level = "normal", **fields: Any) -> None:
    document = {"id": name, "kind": kind, "payload": {"name": name, **fields}}
    ground.push(json.dumps(document), level)


def traces(client: redis.Redis, what: str) -> list[str]:
    return client.lrange(f"queue:trace:{what}", 0, -1)


def traced(client: redis.Redis, what: str, name: str) -> list[list[str]]:
    """[worker, attempt, delivery, hop] of each run."""
    return [line.split()[1:] for line in traces(client, what) if line.split()[0] == name]


def test_a_killed_workers_jobs_run_elsewhere_within_a_lease_and_a_second(start, raw, ground):
    first = start().ready()
    for n in range(5):
        put(ground, "wait", str(n), LEVELS[n % 3])
    eventually_blocking(lambda: len(traces(raw, "wait")) == 5)
    second = start().ready()
    time.sleep(1.5)  # more than a lease: the first renews, so that nothing moves
    assert len(traces(raw, "wait")) == 5
    first.kill()
    killed = time.monotonic()
    eventually_blocking(lambda: len(traces(raw, "wait")) == 10, 5)
    assert time.monotonic() - killed < 2.0
    for n in range(5):
        assert traced(raw, "wait", str(n)) == [[first.worker_id, "1", "1", "0"], [second.worker_id, "1", "2", "0"]]
    raw.sadd("queue:trace:go", *range(5))
    eventually_blocking(ground.empty)
    assert len(traces(raw, "waited")) == 5
    second.signal(signal.SIGTERM)
    assert second.wait() == 0


def test_a_graceful_stop_finishes_what_runs_and_takes_nothing_more(start, raw, ground):
    worker = start(CONCURRENCY=2).ready()
    for name in ("a", "b", "c"):
        put(ground, "wait", name)
    eventually_blocking(lambda: len(traces(raw, "wait")) == 2)
    worker.signal(signal.SIGTERM)
    eventually_blocking(lambda: worker.said("worker_stopping"))
    raw.sadd("queue:trace:go", "a", "b", "c")
    assert worker.wait() == 0
    assert sorted(line.split()[0] for line in traces(raw, "waited")) == ["a", "b"]
    assert ground.ready() == 1 and ground.held() == 0
    assert ground.names() == []
    assert raw.keys("streamworker:worker:*") == []
    assert worker.said("worker_stopped")


@stream_only
def test_an_idle_worker_stops_at_once(start, raw):
    worker = start().ready()
    eventually_blocking(lambda: raw.keys("streamworker:worker:*"))
    began = time.monotonic()
    worker.signal(signal.SIGINT)
    assert worker.wait() == 0
    assert time.monotonic() - began < 1.5
    assert raw.keys("streamworker:worker:*") == []


def test_beyond_its_grace_a_job_is_handed_back_uncharged(start, raw, ground):
    worker = start(GRACE=0.3).ready()
    put(ground, "wait", "x")
    eventually_blocking(lambda: traces(raw, "wait"))
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    (body,) = ground.waiting()
    document = json.loads(body)
    assert document["hop"] == 1 and document.get("attempt_count", 0) == 0 and document["id"] == "x"
    assert ground.held() == 0
    assert ground.names() == []
    assert raw.keys("streamworker:worker:*") == []
    second = start().ready()
    eventually_blocking(lambda: len(traces(raw, "wait")) == 2, 3)  # at once, no lease to wait for
    assert traced(raw, "wait", "x")[1] == [second.worker_id, "1", "1", "1"]


@stream_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_waits_no_longer(start, raw, number, code, ground):
    worker = start(GRACE=60).ready()
    put(ground, "wait", "x")
    eventually_blocking(lambda: traces(raw, "wait"))
    worker.signal(signal.SIGTERM)
    eventually_blocking(lambda: worker.said("worker_stopping"))
    worker.signal(number)
    assert worker.wait(5) == code
    assert ground.ready() == 1 and ground.held() == 0
    assert json.loads(ground.waiting()[0])["hop"] == 1


def test_a_handler_that_blocks_the_loop_keeps_its_lease_and_is_named(start, raw, ground):
    first, second = start().ready(), start().ready()
    put(ground, "block", "x", seconds=2.4)
    eventually_blocking(lambda: traces(raw, "blocked"), 10)
    eventually_blocking(ground.empty)
    assert len(traces(raw, "block")) == len(traces(raw, "blocked")) == 1
    warnings = first.said("event_loop_blocked") + second.said("event_loop_blocked")
    assert warnings and all(each["handler"].endswith(".block") and each["job_id"] == "x" for each in warnings)
    assert f"{Path('tests') / 'lifecycle' / 'apps.py'}" in warnings[0]["where"]
    assert not first.said("claim_lost") and not second.said("claim_lost")


def test_c_code_that_keeps_the_interpreter_lock_keeps_its_lease(start, raw, ground):
    """On the event loop of one worker, and in a thread of another; a third one would take over from either."""
    workers = [start(CONCURRENCY=1).ready() for _ in range(3)]
    put(ground, "lock", "loop", seconds=2.5)  # two leases and a half
    put(ground, "lock_thread", "thread", seconds=2.5)
    eventually_blocking(lambda: len(traces(raw, "locked")) == 2, 15)
    eventually_blocking(ground.empty)
    assert len(traces(raw, "lock")) == 2
    assert not any(worker.said("claim_lost") for worker in workers)


def test_c_code_that_keeps_the_interpreter_lock_keeps_its_place_of_a_limit(start, raw, ground):
    workers = [start().ready() for _ in range(2)]
    put(ground, "lock_limited", "x", seconds=2.5)  # two leases and a half
    eventually_blocking(lambda: traces(raw, "lock"), 15)
    for n in range(3):  # the blocked worker's pending read takes one of them
        put(ground, "lock_limited", f"y{n}", seconds=0.1)

    def all_ended() -> bool:
        ended, started = len(traces(raw, "locked")), len(traces(raw, "lock"))
        assert started <= ended + 1 or len(traces(raw, "locked")) > ended, "two run at once"
        return ended == 4

    eventually_blocking(all_ended, 20)
    eventually_blocking(ground.empty)
    assert len(traces(raw, "lock")) == 4
    assert not any(worker.said("claim_lost") for worker in workers)


def test_the_renewing_process_ends_with_its_worker(start, raw, ground):
    def children(pid: int) -> list[int]:
        asked = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
        )
        rows = [line.split(None, 2) for line in asked.stdout.splitlines()]
        return [int(row[0]) for row in rows if row[2].endswith(f"renewer.py {pid}")]

    killed, stopped = start().ready(), start().ready()
    pids = [int(each.worker_id.rsplit("-", 2)[1]) for each in (killed, stopped)]
    eventually_blocking(lambda: all(len(children(pid)) == 1 for pid in pids), 10)
    killed.signal(signal.SIGKILL)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == 0
    assert children(pids[1]) == []
    eventually_blocking(lambda: children(pids[0]) == [], 10)


@stream_only
@pytest.mark.parametrize("kind", ["fail"])
def test_failures_are_tried_again_and_end_dead(start, raw, kind, ground):
    start().ready()
    put(ground, kind, "x")
    eventually_blocking(lambda: raw.xlen(DEAD) == 1, 15)
    assert [run[1:] for run in traced(raw, kind, "x")] == [["1", "1", "0"], ["2", "1", "1"], ["3", "1", "2"]]
    ((_, letter),) = raw.xrange(DEAD)
    assert (letter["reason"], letter["error"], letter["attempts"]) == ("failed 3 of 3 attempts", "ValueError: no", "3")
    assert ground.empty()


@stream_only
def test_snoozing_charges_nothing(start, raw, ground):
    start().ready()
    put(ground, "nap", "x")
    eventually_blocking(lambda: len(traces(raw, "nap")) == 3 and ground.empty(), 15)
    assert [run[1:] for run in traced(raw, "nap", "x")] == [["1", "1", "0"], ["1", "1", "1"], ["1", "1", "2"]]


def test_a_thread_that_never_returns_costs_the_process(start, raw, ground):
    worker = start(GRACE=0.5).ready()
    put(ground, "thread", "x")
    eventually_blocking(lambda: traces(raw, "thread"))
    assert worker.wait(8) == 70
    assert "StuckThread" in worker.log.read_text()
    (body,) = raw.hvals(f"{Q}:bodies")  # a timeout like any other: charged, or it would take every worker for ever
    assert json.loads(body)["attempt_count"] == 1 and raw.zcard(f"{Q}:due") == 1
    assert ground.left() == 0
    assert ground.names() == []


def test_a_handler_past_its_deadline_is_rescued(start, raw, ground):
    """`hang` swallows its timeout: nobody can stop it, but its lease is renewed no more."""
    first, second = start().ready(), start().ready()
    put(ground, "hang", "x")
    eventually_blocking(lambda: len(traces(raw, "hang")) == 2, 10)
    eventually_blocking(ground.empty)
    one, two = traced(raw, "hang", "x")
    assert {one[0], two[0]} == {first.worker_id, second.worker_id}
    assert (one[1:], two[1:]) == (["1", "1", "0"], ["1", "2", "0"])


def test_a_frozen_worker_settles_nothing_when_it_thaws(start, raw, ground):
    zombie = start(CONCURRENCY=2).ready()
    put(ground, "wait", "x")
    eventually_blocking(lambda: traces(raw, "wait"))
    zombie.signal(signal.SIGSTOP)
    second = start().ready()
    eventually_blocking(lambda: len(traces(raw, "wait")) == 2, 5)
    raw.sadd("queue:trace:go", "x")
    eventually_blocking(ground.empty)
    # Now one whose successor still runs it when the zombie finishes: the successor alone may settle.
    raw.delete("queue:trace:go")
    zombie.signal(signal.SIGCONT)
    eventually_blocking(lambda: zombie.said("claim_lost") or zombie.said("settle_lost"))
    third = [each for each in (second, zombie) if not each.ended]
    assert len(third) == 2
    assert raw.xlen(DEAD) == 0 and ground.empty()


def test_a_zombie_that_finishes_first_does_not_end_its_successors_run(start, raw, ground):
    zombie = start().ready()
    put(ground, "block", "x", seconds=0.5)
    eventually_blocking(lambda: traces(raw, "block"))
    zombie.signal(signal.SIGSTOP)
    second = start().ready()
    put(ground, "wait", "other")
    eventually_blocking(lambda: len(traces(raw, "block")) == 2, 5)
    second.signal(signal.SIGSTOP)
    pending = {each for each in ground.claims() if each[1] == second.worker_id.encode() and each[2] == 2}
    assert len(pending) == 1
    zombie.signal(signal.SIGCONT)
    eventually_blocking(lambda: zombie.said("settle_lost") or zombie.said("claim_lost"))
    assert pending <= set(ground.claims())
    second.signal(signal.SIGCONT)


def test_a_job_that_kills_its_workers_dies_alone(start, raw, ground):
    """500 innocents, one poison: it takes MAX_DELIVERIES workers with it and nobody else's attempts or lives."""
    deliveries = 3
    names = [f"i{n}" for n in range(500)]
    for n, name in enumerate(names):
        put(ground, "quick", name)
        if n == 250:
            put(ground, "poison", "poison")
    deaths = 0
    worker = start(CONCURRENCY=100, MAX_DELIVERIES=deliveries, LEASE=0.5)
    deadline = time.monotonic() + 45
    while not (raw.xlen(DEAD) and ground.empty()):
        assert time.monotonic() < deadline, (ground.left(), raw.xlen(DEAD), deaths)
        if worker.ended:
            assert worker.wait() == 9
            deaths += 1
            worker = start(CONCURRENCY=100, MAX_DELIVERIES=deliveries, LEASE=0.5)
        time.sleep(0.02)
    assert deaths == deliveries
    ((_, letter),) = raw.xrange(DEAD)
    assert (letter["id"], letter["reason"], letter["attempts"]) == ("poison", f"worker died {deliveries} times", "0")
    assert [run[1:] for run in traced(raw, "poison", "poison")] == [["1", str(n + 1), "0"] for n in range(deliveries)]
    counts = Counter(traces(raw, "quick"))
    assert counts.keys() == set(names)
    assert max(counts.values()) <= deliveries  # the last of which is alone: none is charged to death


def test_a_poison_job_among_forty_is_found_by_halving_while_fresh_jobs_go_on(start, raw, ground):
    """It kills MAX_DELIVERIES workers, fewer of its neighbours with each, and nothing else is charged to death."""
    names = [f"i{n}" for n in range(40)]
    for n, name in enumerate(names):
        put(ground, "wait", name)
        if n == 20:
            put(ground, "poison", "poison")
    worker = start(CONCURRENCY=100, LEASE=0.5)
    deaths, runs, logs = 0, [0], []
    deadline = time.monotonic() + 45
    while not raw.xlen(DEAD):
        assert time.monotonic() < deadline, (ground.left(), deaths)
        if worker.ended:
            assert worker.wait() == 9
            deaths += 1
            runs.append(len(traces(raw, "wait")))
            logs.append(worker)
            worker = start(CONCURRENCY=100, LEASE=0.5)
        if deaths == 3:
            raw.sadd("queue:trace:go", *names)
        time.sleep(0.02)
    assert deaths == 5
    put(ground, "quick", "fresh")
    eventually_blocking(ground.empty, 20)
    ((_, letter),) = raw.xrange(DEAD)
    assert (letter["id"], letter["reason"]) == ("poison", "worker died 5 times")
    counts = Counter(run.split()[0] for run in traces(raw, "wait"))
    assert counts.keys() == set(names) and max(counts.values()) <= 5
    assert runs[1] <= 40 and runs[3] - runs[2] < 40  # from the third on only one half is with it
    assert any(each.said("suspects_running") for each in logs) and any(each.said("suspects_apart") for each in logs)


def test_innocents_whose_workers_died_twice_go_on_beside_fresh_jobs_and_that_is_said(start, raw, ground):
    names = [f"i{n}" for n in range(8)]
    for name in names:
        put(ground, "wait", name)
    for death in (1, 2):
        worker = start().ready()
        eventually_blocking(lambda death=death: len(traces(raw, "wait")) == death * len(names), 15)
        worker.kill()
    waiting = [entry for entry, _, count in ground.claims() if count == 2]
    assert len(waiting) == len(names)
    sizes = Counter(half_of(entry, 3) for entry in waiting)
    third = start().ready()
    first = 2 * len(names)
    eventually_blocking(lambda: len(traces(raw, "wait")) - first in {min(5, size) for size in sizes.values()}, 15)
    for n in range(20):
        put(ground, "quick", f"fresh{n}")
    eventually_blocking(lambda: len(traces(raw, "quick")) == 20, 10)
    assert third.said("suspects_running")
    (heart,) = raw.keys("streamworker:worker:*")
    eventually_blocking(lambda: "two workers died" in (raw.hget(heart, "notice") or ""), 10)
    raw.sadd("queue:trace:go", *names)
    eventually_blocking(ground.empty)
    assert len(traces(raw, "wait")) == 3 * len(names)
    assert raw.xlen(DEAD) == 0


def test_a_restarted_server_finds_its_workers_again(start, ground, own_server: Server):
    with redis.Redis.from_url(own_server.url, decode_responses=True) as raw, own_server.client() as client:
        ground = type(ground)(client)
        worker = start(url=own_server.url).ready()
        put(ground, "wait", "running")
        put(ground, "quick", "before")
        eventually_blocking(lambda: traces(raw, "wait") and traces(raw, "quick"))
        own_server.kill()
        own_server.start()
        put(ground, "quick", "after")
        eventually_blocking(lambda: traces(raw, "quick") == ["before", "after"], 20)
        raw.sadd("queue:trace:go", "running")
        eventually_blocking(ground.empty, 20)
        assert len(traces(raw, "wait")) == 1  # it ran on, and nobody took it away
        assert len(worker.said("renewal_failed")) == len(worker.said("renewal_back")) <= 1  # once an outage
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


def flood(ground: Ground, count: int) -> tuple[int, int]:
    """Documents of every wrong kind among valid ones; (valid, wrong)."""
    wrong: list[bytes | None] = [
        b"", b"\xff\xfe", b"null", b"[]", b"{}", b'{"payload":', b'{"payload":[]}', b'{"payload":{"name":5},"kind":"quick"}',
        b'{"payload":{},"kind":7}', b'{"payload":{},"kind":"nobody"}', b'{"payload":{},"kind":"nobody","headers":null}',
        b'{"payload":{"name":"x"},"kind":"quick","attempt_count":-1}', b'{"payload":{"name":"\\ud800"},"kind":"quick"}',
        b'{"payload":' + b"[" * 5000 + b"]" * 5000 + b',"kind":"quick"}', b'{"payload":{"name":"' + b"x" * 3000 + b'"},"kind":"quick"}',
        b'{"payload":{"name":"x"},"kind":"quick","id":"' + b"x" * 201 + b'"}', None,
    ]  # fmt: skip
    valid = 0
    with ground.raw.pipeline(transaction=False) as pipe:
        for n in range(count):
            if n % 10 == 0:
                valid += 1
                ground.push(json.dumps({"kind": "quick", "payload": {"name": f"v{n}"}}), client=pipe)
                continue
            body = wrong[n % len(wrong)]
            if body is not None or ground.mode == "list":
                ground.push(body or b"no document at all", LEVELS[n % 3], client=pipe)
            else:
                pipe.xadd(ground.place(LEVELS[n % 3]), {"other": "x"})
            if n % 1000 == 999:
                pipe.execute()
        pipe.execute()
    return valid, count - valid


@pytest.mark.parametrize(
    "count",
    [
        2000,
        pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_a_flood_of_nonsense_ends_in_dead_letters_and_stops_nobody(start, raw, count, ground):
    valid, wrong = flood(ground, count)
    worker = start(CONCURRENCY=100, LEASE=5, UNKNOWN_KIND_TTL=1, MAX_JOB_BYTES=2000, LOG_LEVEL="critical")
    eventually_blocking(lambda: worker.ended or (raw.xlen(DEAD) == wrong and ground.empty()), 50 + count / 500, 0.1)
    assert not worker.ended
    assert Counter(traces(raw, "quick")) == {f"v{n}": 1 for n in range(0, count, 10)}
    assert len(traces(raw, "quick")) == valid
    with redis.Redis(
        connection_pool=redis.ConnectionPool(**{**raw.get_connection_kwargs(), "decode_responses": False})
    ) as client:
        reasons = Counter(fields[b"reason"] for _, fields in client.xrange(DEAD))
    assert set(reasons) == {b"undecodable", b"unknown kind"}


def test_burst_ends_when_nothing_is_ready(start, raw, ground):
    for n in range(200):
        put(ground, "quick", f"{n}", LEVELS[n % 3])
    raw.zadd(f"{Q}:due", {"normal/later/1": 9e12})
    raw.hset(f"{Q}:bodies", "normal/later/1", "{}")
    worker = start("burst")
    assert worker.wait(20) == 0
    assert sorted(traces(raw, "quick"), key=int) == [f"{n}" for n in range(200)]
    assert raw.zcard(f"{Q}:due") == 1
    assert ground.names() == []


@stream_only
def test_no_server_is_exit_69_in_one_sentence(start):
    worker = start(url="redis://:secret@127.0.0.1:1/0")
    assert worker.wait() == 69
    said = worker.log.read_text()
    assert "does not answer" in said and "secret" not in said


@list_only
def test_brpop_runs_one_job_at_a_time_says_its_risk_and_a_stop_loses_nothing(start, raw, ground):
    worker = start(LIST_POP="brpop", GRACE=5).ready()
    assert worker.said("list_pop_brpop")
    for name in ("a", "b"):
        put(ground, "wait", name)
    eventually_blocking(lambda: traces(raw, "wait"))
    for n in range(200):
        put(ground, "quick", f"{n}")
    assert len(traces(raw, "wait")) == 1
    raw.sadd("queue:trace:go", "a", "b")
    eventually_blocking(lambda: len(traces(raw, "quick")) > 20)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    ran, waiting = traces(raw, "quick"), [json.loads(body)["id"] for body in ground.waiting()]
    assert sorted(ran + waiting, key=int) == [f"{n}" for n in range(200)]
    assert ran == [f"{n}" for n in range(len(ran))]
    assert raw.keys("streamworker:worker:*") == [] and ground.names() == []
