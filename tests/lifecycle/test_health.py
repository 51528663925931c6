"""/healthz and /readyz of a worker process: while it works, is blocked, drains, and when Redis is away."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.conftest import Server, eventually_blocking
from tests.lifecycle.test_worker import Process, traces


@pytest.fixture
def raw(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, protocol=2, decode_responses=True) as client:
        yield client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    processes: list[Process] = []

    def make(url: str, *, http: str = "127.0.0.1:0", **settings: Any) -> Process:
        processes.append(Process(url, tmp_path / f"worker{len(processes)}.log", HTTP=http, **settings))
        return processes[-1]

    yield make
    for process in processes:
        process.kill()
        assert "Traceback" not in process.log.read_text(errors="replace").replace('"exception":', "")


def put(client: redis.Redis, kind: str, name: str, **fields: Any) -> None:
    client.xadd("stream:{q}", {"job": json.dumps({"id": name, "kind": kind, "payload": {"name": name, **fields}})})


def address(worker: Process) -> str:
    return str(eventually_blocking(lambda: worker.said("http_listening"))[0]["address"])


def ask(worker: Process, path: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(address(worker), timeout=5)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        body = reply.read()
    finally:
        connection.close()
    assert body.count(b"\n") == 1
    return reply.status, json.loads(body)


def status(worker: Process, path: str) -> int:
    code, told = ask(worker, path)
    assert told["ok"] == (code == 200) == (told["why"] is None)
    return code


def test_a_worker_with_nothing_to_do_is_alive_and_ready(start, redis_url):
    worker = start(redis_url).ready()
    eventually_blocking(lambda: status(worker, "/readyz") == 200)
    expected = {"ok": True, "phase": "working", "why": None, "worker_id": worker.worker_id}
    assert ask(worker, "/healthz") == (200, expected)


def test_the_probe_of_containers_says_it_too(start, redis_url):
    worker = start(redis_url).ready()
    command = [sys.executable, "-m", "streamworker.telemetry.probe", address(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] is True
    worker.kill()
    assert subprocess.run(command, capture_output=True, timeout=20).returncode == 1


def test_it_answers_while_a_handler_blocks_the_loop_and_says_so(start, redis_url, raw):
    # One blocking handler is enough for both answers.
    worker = start(redis_url, constants={"streamworker.worker.health.LEAST_SILENCE": 2.0}).ready()
    put(raw, "block", "one", seconds=4)
    eventually_blocking(lambda: traces(raw, "block"))
    assert status(worker, "/healthz") == 200  # slow is not dead
    _, told = eventually_blocking(lambda: (answer := ask(worker, "/healthz"))[0] == 503 and answer, 10)
    assert "the event loop has not turned for" in told["why"]
    assert ask(worker, "/readyz")[0] == 503
    assert not traces(raw, "blocked")  # all that was answered while it was blocked
    eventually_blocking(lambda: traces(raw, "blocked"))
    eventually_blocking(lambda: status(worker, "/healthz") == 200 and status(worker, "/readyz") == 200)


def test_redis_away_is_not_ready_and_alive_and_comes_back(start, own_server: Server):
    worker = start(own_server.url).ready()
    eventually_blocking(lambda: status(worker, "/readyz") == 200)
    own_server.kill()
    eventually_blocking(lambda: status(worker, "/readyz") == 503)
    assert status(worker, "/healthz") == 200
    own_server.start()
    eventually_blocking(lambda: status(worker, "/readyz") == 200, 20)


def test_a_redis_that_hangs_is_not_ready(start, own_server: Server):
    worker = start(own_server.url).ready()
    eventually_blocking(lambda: status(worker, "/readyz") == 200)
    own_server.pause()
    eventually_blocking(lambda: status(worker, "/readyz") == 503)
    assert status(worker, "/healthz") == 200
    own_server.resume()
    eventually_blocking(lambda: status(worker, "/readyz") == 200, 20)


def test_full_slots_claim_nothing_and_are_well(start, redis_url, raw):
    worker = start(redis_url, CONCURRENCY=1).ready()
    put(raw, "wait", "one")
    eventually_blocking(lambda: traces(raw, "wait"))
    eventually_blocking(lambda: status(worker, "/readyz") == 200)
    assert status(worker, "/healthz") == 200


def test_draining_is_alive_and_not_ready_to_the_end(start, redis_url, raw):
    worker = start(redis_url, GRACE=20).ready()
    put(raw, "wait", "one")
    eventually_blocking(lambda: traces(raw, "wait"))
    worker.signal(signal.SIGTERM)
    code, told = eventually_blocking(lambda: (answer := ask(worker, "/readyz"))[1]["phase"] == "draining" and answer)
    assert (code, told["why"]) == (503, "draining: it takes no more jobs")
    assert status(worker, "/healthz") == 200
    raw.sadd("queue:trace:go", "one")
    assert worker.wait() == 0


def test_an_address_in_use_is_one_sentence_and_exit_78(start, redis_url):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = start(redis_url, http=f"127.0.0.1:{port}")
        assert worker.wait() == 78
    text = worker.log.read_text()
    assert f"STREAMWORKER_HTTP=127.0.0.1:{port} cannot be listened on" in text.splitlines()[-1]
