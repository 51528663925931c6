"""``streamworker bridge`` as people run it: real processes, killed and cut off, on a real server."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tests import forkserver
from tests.bridge.conftest import blocked, push, stored
from tests.bridge.nursery import Nursery
from tests.cli.conftest import Program, Running, Terminal
from tests.conftest import Server, eventually_blocking


@pytest.fixture
def bridge(sw: Program) -> Callable[..., Running]:
    """``bridge("--queue", "q")``: a bridge that is ready."""

    def start(*words: object, **env: str) -> Running:
        running = sw.start("bridge", *words, **env)
        eventually_blocking(lambda: running.saw("bridge_ready"))
        return running

    return start


def test_drain_moves_everything_tells_the_totals_and_ends(sw, raw):
    push(raw, "queue:q", *[b"%d" % n for n in range(3000)])
    push(raw, "queue:q:low", b"low")
    done = sw.ok("bridge", "--queue", "q", "--drain")
    assert "moved 3,001 jobs" in done.stdout
    assert stored(raw) == [b"%d" % n for n in range(3000)]
    assert not raw.exists("queue:q", "queue:q:low")
    assert "moved 0 jobs" in sw.ok("bridge", "--queue", "q", "--drain").stdout


def test_drain_leaves_what_cannot_be_moved_and_says_so(sw, raw):
    raw.set("stream:{q}", "no")
    push(raw, "queue:q", b"1", b"2")
    push(raw, "queue:other", b"x")
    done = sw("bridge", "--queue", "q", "--queue", "other", "--drain")
    assert (done.returncode, done.sentence) == (
        1,
        "2 jobs of q could not be moved and are where they were: the log says why",
    )
    assert raw.lrange("queue:q", 0, -1) == [b"2", b"1"]
    assert stored(raw, "stream:{other}") == [b"x"]


def test_json_tells_the_totals_to_programs(sw, raw):
    push(raw, "queue:q", b"abc", b"d")
    (last,) = sw.ok("bridge", "--queue", "q", "--drain", "--json").rows
    assert {"state": "ended", "moved": 2, "bytes": 4, "waiting": 0, "stuck": []}.items() <= last.items()
    assert last["seconds"] > 0


def moved(raw: redis.Redis) -> set[str]:
    """The queues that have a stream."""
    return {key.decode()[8:-1] for key in raw.keys("stream:{*}")}


def test_whose_lists_are_moved(sw, raw):
    for queue in ("flag", "env", "notes", "holds", "other"):
        push(raw, f"queue:{queue}", queue.encode())
    sw.ok("bridge", "--queue", "flag", "--drain", STREAMWORKER_QUEUES="env")
    assert moved(raw) == {"flag"}
    sw.ok("bridge", "--drain", STREAMWORKER_QUEUES="env=5", STREAMWORKER_APP="jobs:app")
    assert moved(raw) == {"flag", "env"}
    sw.ok("bridge", "jobs:app", "--drain")
    assert moved(raw) == {"flag", "env", "notes", "holds"}
    sw.ok("bridge", "--all", "--drain")
    assert stored(raw, "stream:{other}") == [b"other"]
    assert raw.keys("queue:*") == []


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "say whose lists to move"),
        (("--all", "--queue", "q"), 2, "contradict"),
        (("--queue", "a:high"), 2, "Invalid value"),
        (("jobs:nothing",), 78, "no attribute"),
        (("--queue", "q", "--redis-url", "redis+cluster://127.0.0.1:1"), 78, "not for a Redis Cluster"),
        (("--queue", "q", "--redis-url", "redis://127.0.0.1:1/0"), 69, "does not answer"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(sw, words, code, sentence):
    done = sw("bridge", *words)
    assert done.returncode == code
    assert sentence in done.sentence


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_busy_and_an_idle_bridge_in_order(bridge, raw, number):
    running = bridge("--queue", "q")
    eventually_blocking(lambda: blocked(raw) == 3)
    running.signal(number)
    assert running.wait() == 0
    push(raw, "queue:q", *[b"%d" % n for n in range(20_000)])
    running = bridge("--queue", "q")
    eventually_blocking(lambda: raw.xlen("stream:{q}") > 0)
    running.signal(number)
    assert running.wait() == 0
    there = stored(raw) + raw.lrange("queue:q", 0, -1)[::-1]
    assert there == [b"%d" % n for n in range(20_000)]
    eventually_blocking(lambda: blocked(raw) == 0)


def test_a_signal_ends_a_bridge_whose_server_is_silent(bare, own_server):
    bare.env["REDIS_URL"] = own_server.url
    bare.constants |= {
        "streamworker.broker.redis.client.COMMAND_TIMEOUT": 0.5,
        "streamworker.broker.list_bridge.SWEEP": 0.5,
    }
    running = bare.start("bridge", "--queue", "q")
    eventually_blocking(lambda: running.saw("bridge_ready"))
    with own_server.client() as raw:
        eventually_blocking(lambda: blocked(raw) == 3)
    own_server.pause()
    try:
        running.signal(signal.SIGTERM)
        assert running.wait(40) == 0
    finally:
        own_server.resume()


def test_progress_is_told_in_the_log(bridge, sw, raw):
    sw.constants["streamworker.cli.bridge.TELL"] = 0.2
    running = bridge("--queue", "q")
    push(raw, "queue:q", b"x")
    eventually_blocking(lambda: running.saw("bridge_progress"), 15)
    line = next(json.loads(line) for line in running.lines if "bridge_progress" in line)
    assert (line["moved"], line["waiting"]) == (1, 0)


def test_progress_is_shown_on_a_terminal(sw, raw):
    sw.constants["streamworker.broker.list_bridge.SWEEP"] = 0.5
    terminal = Terminal(sw, "bridge", "--queue", "q")
    terminal.until("0 waiting")
    push(raw, "queue:q", b"1234567", b"x")
    terminal.until("moved 2 jobs")
    raw.set("queue:q:low", "no list")
    terminal.until("bridge_stuck")
    terminal.until("stuck: q")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait() == 0
    assert "moved 2 jobs (0.0 MB) in" in terminal.text


# -- killed


def killed_again_and_again(server: Server, directory: Any, kills: int, *, each: int) -> None:
    """Producers push to three lists, two bridges are killed at random moments and replaced: then all is there, once."""
    random.seed(kills)
    raw = server.client()
    lists = {"queue:q:high": "stream:{q}:high", "queue:q": "stream:{q}", "queue:q:low": "stream:{q}:low"}
    expected = {list_: [b"%s %d %s" % (list_.encode(), n, os.urandom(n % 50)) for n in range(each)] for list_ in lists}
    stop = threading.Event()
    total = len(lists) * each

    def produce() -> None:
        with server.client() as client:
            for start in range(0, each, 20):
                for list_ in lists:
                    push(client, list_, *expected[list_][start : start + 20])
                if stop.wait(0.001):
                    return

    producing = threading.Thread(target=produce)
    with Nursery(REDIS_URL=server.url, STREAMWORKER_QUEUES="q") as nursery:
        producing.start()
        bridges = [nursery.start("bridge"), nursery.start("bridge")]
        for _ in range(kills):
            time.sleep(random.uniform(0.0, 0.08))
            victim = random.randrange(2)
            bridges[victim].kill()
            bridges[victim] = nursery.start("bridge")
        eventually_blocking(lambda: not producing.is_alive(), 60)
        eventually_blocking(lambda: sum(raw.xlen(stream) for stream in lists.values()) >= total, 60)
    for list_, stream in lists.items():
        assert stored(raw, stream) == expected[list_]
        assert not raw.exists(list_)


def test_a_bridge_that_is_killed_loses_nothing_and_moves_nothing_twice(server, redis_url, tmp_path):
    killed_again_and_again(server, tmp_path, 30, each=6_000)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hundred_kills(server, redis_url, tmp_path):
    killed_again_and_again(server, tmp_path, 200, each=30_000)


def test_a_bridge_outlives_its_server(own_server, tmp_path):
    """Whatever was acknowledged is there once; whose reply was lost may be there, once."""
    known: dict[bytes, bool] = {}
    stop = threading.Event()

    def produce() -> None:
        number = 0
        while not stop.is_set():
            try:
                with own_server.client() as client:
                    while not stop.wait(0.0005):
                        number += 1
                        known[b"%d" % number] = False
                        client.lpush("queue:q", b"%d" % number)
                        known[b"%d" % number] = True
            except redis.RedisError:
                stop.wait(0.05)

    producing = threading.Thread(target=produce)
    with Nursery(REDIS_URL=own_server.url, STREAMWORKER_QUEUES="q") as nursery:
        bridge = nursery.start("bridge")
        producing.start()
        for _ in range(3):
            before = len(known)
            eventually_blocking(lambda before=before: len(known) > before + 300, 20)
            own_server.kill()
            own_server.start()
        stop.set()
        producing.join(10)
        with own_server.client() as raw:
            eventually_blocking(lambda: raw.exists("stream:{q}") and not raw.exists("queue:q"), 40)
            there = stored(raw)
        assert bridge.poll() is None
    acknowledged = [job for job, sure in known.items() if sure]
    assert len(there) == len(set(there))
    assert [job for job in there if known[job]] == acknowledged
    assert set(there) <= set(known)


def test_a_reader_that_goes_away_does_not_end_the_bridge(sw, raw):
    push(raw, "queue:q", b"x")
    process = forkserver.forked(
        ["bridge", "--queue", "q", "--drain", "--json"], cwd=sw.directory, env=sw.env, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert stored(raw) == [b"x"]
