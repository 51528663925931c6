"""/metrics of a worker process: what it counts, while a handler blocks it, and when Redis is away."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamworker.worker.metrics import FAMILIES, OF_LEDGER, OF_QUEUES
from tests.conftest import eventually_blocking
from tests.contract.ground import out_of_memory
from tests.lifecycle.test_health import address, put, raw, start  # noqa: F401 - fixtures
from tests.lifecycle.test_worker import Process, traces

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

SOON = {"streamworker.worker.metrics.FRESH": 0.3}
"""Seconds after which depths are asked anew."""


def scrape(worker: Process) -> str:
    connection = http.client.HTTPConnection(address(worker), timeout=10)
    try:
        connection.request("GET", "/metrics")
        reply = connection.getresponse()
        assert reply.status == 200
        assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return reply.read().decode()
    finally:
        connection.close()


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, "a sample was told twice"
            found[key] = sample.value
    return found


def value(worker: Process, name: str, **labels: str) -> float | None:
    return samples(scrape(worker)).get((f"streamworker_{name}", tuple(sorted(labels.items()))))


def test_what_jobs_come_to_is_counted(start, redis_url, raw):  # noqa: F811
    worker = start(redis_url, constants=SOON).ready()
    for number in range(3):
        put(raw, "quick", f"q{number}")
    put(raw, "fail", "f")
    put(raw, "nobody knows this kind 17", "u")
    raw.xadd("stream:{q}", {"job": "no json"})
    late = {"kind": "quick", "payload": {}, "expires_at": "2020-01-01T00:00:00Z"}
    raw.xadd("stream:{q}", {"job": json.dumps(late)})
    eventually_blocking(lambda: value(worker, "expired_total", queue="q", kind="quick") == 1, 20)
    eventually_blocking(lambda: value(worker, "dead_letters_total", queue="q", kind="fail", outcome="raised") == 1, 20)
    eventually_blocking(lambda: value(worker, "jobs_total", queue="q", kind="unknown", outcome="unknown_kind"), 20)
    text = scrape(worker)
    found = samples(text)

    def of(name: str, **labels: str) -> float | None:
        return found.get((f"streamworker_{name}", tuple(sorted(labels.items()))))

    assert of("jobs_total", queue="q", kind="quick", outcome="ok") == 3
    assert of("jobs_total", queue="q", kind="fail", outcome="raised") == 3
    assert of("retries_total", queue="q", kind="fail") == 2
    assert of("expired_total", queue="q", kind="quick") == 1
    assert of("dead_letters_total", queue="q", kind="unknown", outcome="undecodable") == 1
    assert of("job_duration_seconds_count", queue="q", kind="quick") == 3
    assert of("queue_wait_seconds_count", queue="q", kind="fail") == 3
    assert of("queue_wait_seconds_bucket", queue="q", kind="quick", le="+Inf") == 3
    assert 0 < (of("settle_batch_size_count") or 0) <= 8
    assert (of("settle_batch_size_sum") or 0) >= 8
    assert of("slots") == 10
    assert "nobody knows" not in text
    assert worker.worker_id not in text
    told = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert told == {family.name for family in FAMILIES} - {family.name for family in OF_LEDGER.values()}  # it has none

    assert value(worker, "queue_dead_letters", queue="q") is not None
    eventually_blocking(lambda: value(worker, "queue_dead_letters", queue="q") == 2, 20)
    assert value(worker, "redis_up") == 1


def test_a_redis_that_refuses_writes_is_told(start, redis_url, raw):  # noqa: F811
    worker = start(redis_url, constants=SOON).ready()
    assert value(worker, "redis_writable") == 1
    with out_of_memory(raw):
        eventually_blocking(lambda: value(worker, "redis_writable") == 0, 20)
        assert value(worker, "redis_up") == 1
    eventually_blocking(lambda: value(worker, "redis_writable") == 1, 20)


def test_it_answers_while_a_handler_blocks_the_loop(start, redis_url, raw):  # noqa: F811
    worker = start(redis_url, constants=SOON, CONCURRENCY=2).ready()
    put(raw, "block", "b", seconds=12.0)
    eventually_blocking(lambda: traces(raw, "block"), 20)
    put(raw, "quick", "waits")
    put(raw, "quick", "waits too")
    eventually_blocking(lambda: (value(worker, "event_loop_lag_seconds") or 0) > 1.5, 20)
    assert value(worker, "running_jobs", queue="q") is not None
    eventually_blocking(lambda: value(worker, "queue_running_jobs", queue="q") is not None, 20)  # asked of Redis
    assert not traces(raw, "blocked"), "it was still blocked"


def test_without_redis_depths_are_missing_and_the_rest_is_told(start, own_server):  # noqa: F811
    worker = start(own_server.url, constants=SOON).ready()
    eventually_blocking(lambda: value(worker, "queue_ready_jobs", queue="q") == 0, 20)
    own_server.kill()
    eventually_blocking(lambda: value(worker, "redis_up") == 0, 30)
    found = samples(scrape(worker))
    names = {name for name, _ in found}
    assert not names & {family.name for family in OF_QUEUES}
    assert "streamworker_slots" in names
    own_server.start()
    eventually_blocking(lambda: value(worker, "queue_ready_jobs", queue="q") == 0, 30)
    eventually_blocking(lambda: (value(worker, "reconnects_total") or 0) >= 1, 30)


def test_scrapes_do_not_ask_redis_more_often_than_every_few_seconds(start, redis_url, raw):  # noqa: F811
    worker = start(redis_url).ready()
    eventually_blocking(lambda: value(worker, "queue_ready_jobs", queue="q") == 0, 20)

    def asked() -> int:
        return sum(
            int(told["calls"]) for name, told in raw.info("commandstats").items() if name == "cmdstat_xinfo|groups"
        )

    before = asked()
    for _ in range(50):
        scrape(worker)
    assert asked() - before <= 3 * 3  # three streams, and not one look a scrape


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")
def test_promtool_finds_nothing_to_complain_about(start, redis_url, raw):  # noqa: F811
    worker = start(redis_url).ready()
    put(raw, "quick", "q")
    put(raw, "fail", "f")
    eventually_blocking(lambda: value(worker, "dead_letters_total", queue="q", kind="fail", outcome="raised") == 1, 20)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=scrape(worker), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_http_nothing_is_counted(redis_url):
    from streamworker import App, QueueWorker, Settings

    app: Any = App(settings=Settings(redis_url=redis_url))
    assert QueueWorker(app, redis=None, database=None, services=None)._health.observers == ()
