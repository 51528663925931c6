"""Workers that are replaced by new processes: after jobs, at an age, at a size; the successor is ready first."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import threading
from collections import Counter

import pytest

from streamworker.cli import worker
from streamworker.settings import Settings
from tests.cli.conftest import both_modes, document
from tests.cli.test_processes import alive, ready
from tests.conftest import eventually_blocking, free_port

APP = """
import os, time
from contextlib import asynccontextmanager
from pathlib import Path
import anyio
from streamworker import App, Context, Payload

if Path("slow").exists():
    Path("slow.up").touch()
    time.sleep(60)
if Path("broken").exists():
    raise RuntimeError("no licence today")

@asynccontextmanager
async def lifespan():
    while Path("waits").exists():
        Path("waits.up").touch()
        await anyio.sleep(0.01)
    yield None

app = App(lifespan=lifespan)
kept = []

def note(word: str) -> None:
    with open("ran", "a") as file:
        file.write(f"{word} {os.getpid()}\\n")

class Leak(Payload, kind="leak", queue="leaks"):
    n: int

class Hold(Payload, kind="hold", queue="holds"):
    gate: str

@app.handler
async def leak(payload: Leak) -> None:
    kept.append(os.urandom(1024) * 1024)
    await anyio.sleep(0.01)
    note(str(payload.n))

@app.handler
async def hold(payload: Hold, ctx: Context) -> None:
    note(f"{payload.gate}-begun")
    while not Path(payload.gate).exists():
        await anyio.sleep(0.01)
    note(f"{payload.gate}-attempt-{ctx.attempt}")
"""


@pytest.fixture
def recycled(sw, project, ground):
    """``recycled("--max-jobs", 1)``: a supervisor whose worker is ready."""
    (project / "recycled.py").write_text(APP)
    sw.constants["streamworker.loops.FIRST"] = 0.1

    def start(*flags, **env):
        supervisor = sw.start("worker", "recycled:app", *flags, **env)
        eventually_blocking(lambda: supervisor.saw("worker_ready"), 20)
        return supervisor

    return start


@pytest.fixture
def ran(project):
    """(word, pid) of every run so far."""

    def read():
        path = project / "ran"
        return (
            [(word, int(pid)) for word, pid in map(str.split, path.read_text().splitlines())] if path.exists() else []
        )

    return read


def leak(ground, *numbers):
    for n in numbers:
        ground.push(document("leak", n=n), queue="leaks")


def hold(ground, gate):
    ground.push(document("hold", gate=gate), queue="holds")


def replaced(supervisor, times=1):
    eventually_blocking(lambda: supervisor.saw("worker_replaced", times), 30)


def lines(supervisor, event):
    return [json.loads(line) for line in supervisor.lines if f'"{event}"' in line]


def order(supervisor, *events):
    """These events, as they came."""
    return [each for each in (json.loads(line)["event"] for line in list(supervisor.lines)) if each in events]


@both_modes
def test_a_worker_that_leaks_is_replaced_and_nothing_is_lost_or_run_twice(recycled, ground, ran):
    supervisor = recycled("--max-rss", 120, "--concurrency", 2)
    leak(ground, *range(300))
    eventually_blocking(lambda: len(ran()) >= 300 and ground.empty("leaks"), 60)
    replaced(supervisor)
    eventually_blocking(lambda: supervisor.saw("worker_stopped"), 20)
    assert supervisor.stop() == 0
    assert Counter(int(word) for word, _ in ran()) == Counter(range(300))
    assert "MB of memory" in lines(supervisor, "worker_recycling")[0]["reached"]
    assert order(supervisor, "worker_ready", "worker_retiring")[:3] == [
        "worker_ready",
        "worker_ready",
        "worker_retiring",
    ]
    ends = lines(supervisor, "worker_stopped")
    assert sum(each["done"] for each in ends) == 300
    assert len({pid for _, pid in ready(supervisor)}) == len(ends) >= 2


def test_every_process_is_replaced_after_its_jobs_one_at_a_time(recycled, ground, ran, raw):
    supervisor = recycled("--max-jobs", 3, "--processes", 2, "--concurrency", 1)
    eventually_blocking(lambda: len(ready(supervisor)) == 2, 20)
    leak(ground, *range(60))
    eventually_blocking(lambda: ground.empty("leaks"), 30)
    # Which of them has its three jobs first, and again, is chance.
    eventually_blocking(lambda: {each["worker"] for each in lines(supervisor, "worker_replaced")} == {0, 1}, 30)
    eventually_blocking(lambda: len(lines(supervisor, "worker_stopped")) >= 2, 20)
    assert supervisor.stop() == 0
    assert Counter(int(word) for word, _ in ran()) == Counter(range(60))
    assert raw.xinfo_consumers("stream:{leaks}", "workers") == []


def test_a_worker_is_replaced_at_its_age(recycled):
    supervisor = recycled("--max-age", 1)
    replaced(supervisor, 2)
    reached = lines(supervisor, "worker_recycling")[0]["reached"]
    assert re.fullmatch(r"\d+\.\d s old", reached)
    assert supervisor.stop() == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_during_a_replacement_drains_both_generations(recycled, ground, ran, project, signals):
    supervisor = recycled("--max-jobs", 1, "--concurrency", 2)
    hold(ground, "old")
    eventually_blocking(ran, 20)
    leak(ground, 1)
    eventually_blocking(lambda: supervisor.saw("worker_retiring"), 20)
    hold(ground, "new")
    eventually_blocking(lambda: len(ran()) == 3, 20)
    assert ran()[0][1] != ran()[2][1], "each generation holds a job"
    for turn in range(signals):
        supervisor.signal(signal.SIGTERM)
        eventually_blocking(lambda turn=turn: supervisor.saw(("worker_stopping", "worker_hurrying")[turn], 2), 20)
    if signals == 1:
        assert all(alive(pid) for _, pid in ready(supervisor))
        (project / "old").touch()
        (project / "new").touch()
    assert supervisor.wait() == (0 if signals == 1 else 143)
    assert ("worker_hurrying" in supervisor.text) == (signals == 2)
    assert ground.ready(queue="holds") == (0 if signals == 1 else 2)
    assert ground.held("holds") == 0


def test_a_supervisor_that_is_stopped_while_a_successor_starts_ends_both(recycled, ground, project):
    supervisor = recycled("--max-jobs", 1)
    (project / "slow").touch()
    leak(ground, 1)
    eventually_blocking((project / "slow.up").exists, 20)
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait(15) == 0
    assert "worker_replaced" not in supervisor.text


def test_without_a_successor_the_worker_goes_on_and_says_so(recycled, ground, ran, project):
    supervisor = recycled("--max-jobs", 1)
    (project / "broken").touch()
    leak(ground, 1)
    eventually_blocking(lambda: supervisor.saw("successor_failed"), 20)
    assert lines(supervisor, "successor_failed")[0]["code"] == 78
    assert "no licence today" in supervisor.text
    leak(ground, 2)
    eventually_blocking(lambda: len(ran()) == 2, 20)
    assert len({pid for _, pid in ran()}) == 1
    assert "worker_replaced" not in supervisor.text
    (project / "broken").unlink()
    replaced(supervisor)
    leak(ground, 3)
    eventually_blocking(lambda: len(ran()) == 3, 20)
    assert supervisor.stop() == 0


@both_modes
def test_a_job_that_outlasts_the_grace_is_handed_back_uncharged(recycled, ground, ran, project):
    supervisor = recycled("--max-jobs", 1, "--grace", "0.3", "--concurrency", 2)
    hold(ground, "gate")
    eventually_blocking(ran, 20)
    leak(ground, 1)
    replaced(supervisor)
    eventually_blocking(lambda: [word for word, _ in ran()].count("gate-begun") == 2, 20)
    (project / "gate").touch()
    eventually_blocking(lambda: ground.empty("holds"), 20)
    words = dict(ran())
    assert "gate-attempt-1" in words
    assert words["gate-attempt-1"] == ready(supervisor)[1][1] != ready(supervisor)[0][1]
    assert supervisor.stop() == 0


def ask(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_probes_at_one_address_see_no_gap(sw, recycled, ground, ran, project):
    sw.forks = False
    port = free_port()
    supervisor = recycled("--max-jobs", 1, "--concurrency", 2, "--http", f"127.0.0.1:{port}")
    eventually_blocking(lambda: ask(port, "/readyz")[0] == 200, 20)
    bad, over, seen = [], threading.Event(), set()

    def probe():
        while not over.is_set():
            for path in ("/readyz", "/healthz"):
                try:
                    status, text = ask(port, path)
                except OSError as error:
                    bad.append((path, repr(error)))
                    continue
                seen.add(json.loads(text)["worker_id"])
                if status != 200:
                    bad.append((path, text))

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        hold(ground, "gate")
        eventually_blocking(ran, 20)
        leak(ground, 1)
        replaced(supervisor)
        eventually_blocking(lambda: supervisor.saw("worker_retiring"), 20)
        names = [name for name, _ in ready(supervisor)]
        eventually_blocking(lambda: names[1] in seen, 20)
        assert json.loads(ask(port, "/readyz")[1])["worker_id"] == names[1], "while the one before drains"
        assert "streamworker_jobs_total{" not in ask(port, "/metrics")[1], "each generation counts its own"
        (project / "gate").touch()
        eventually_blocking(lambda: supervisor.saw("worker_stopped"), 20)
    finally:
        over.set()
        prober.join()
    assert not bad
    assert supervisor.stop() == 0


def test_a_successor_answers_probes_before_it_is_ready_if_the_worker_before_it_dies(recycled, ground, project):
    port = free_port()
    supervisor = recycled("--max-jobs", 1, "--http", f"127.0.0.1:{port}", "--lease", "1")
    (project / "waits").touch()
    leak(ground, 1)
    eventually_blocking((project / "waits.up").exists, 20)
    [(first, pid)] = ready(supervisor)
    assert json.loads(ask(port, "/readyz")[1])["worker_id"] == first
    os.kill(pid, signal.SIGKILL)
    status, text = ask(port, "/readyz")
    assert status == 503 and json.loads(text)["phase"] == "starting" and json.loads(text)["worker_id"] != first
    assert ask(port, "/healthz")[0] == 200
    (project / "waits").unlink()
    eventually_blocking(lambda: ask(port, "/readyz")[0] == 200, 20)
    assert "its successor, which was starting, takes its place" in supervisor.text
    assert supervisor.stop() == 0


@pytest.mark.parametrize("address", ["taken", "app"])
def test_what_cannot_start_ends_the_supervisor_of_one(sw, raw, address):
    if address == "taken":
        host, port = raw.connection_pool.connection_kwargs["host"], raw.connection_pool.connection_kwargs["port"]
        done = sw("worker", "jobs:app", "--max-jobs", 5, "--http", f"{host}:{port}")
        assert "cannot be listened on" in done.sentence
    else:
        done = sw("worker", "jobs:nothing", "--max-age", 5)
    assert done.returncode == 78
    assert "Traceback" not in done.stderr


def test_a_limit_below_what_a_worker_takes_is_said_and_replaces_none(recycled, ground, ran):
    supervisor = recycled("--max-rss", 1)
    eventually_blocking(lambda: supervisor.saw("max_rss_too_small"), 20)
    leak(ground, 1)
    eventually_blocking(ran, 20)
    assert supervisor.stop() == 0
    assert "worker_recycling" not in supervisor.text


def test_burst_ends_although_workers_are_replaced(sw, project, ground, ran):
    (project / "recycled.py").write_text(APP)
    leak(ground, *range(100))
    done = sw.ok("worker", "recycled:app", "--burst", "--max-jobs", 10, "--concurrency", 1)
    assert Counter(int(word) for word, _ in ran()) == Counter(range(100))
    assert ground.empty("leaks")
    assert "worker_recycling" in done.stderr


def test_limits_are_spread_so_that_a_fleet_is_not_replaced_at_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(worker, "monotonic", lambda: now[0])
    made = [worker.RecycleLimits(Settings(max_jobs=1000, max_age=100)) for _ in range(200)]
    firsts = [next(n for n in range(700, 1001) if each.reached(n)) for each in made]
    assert 800 <= min(firsts) < 850 and 950 < max(firsts) <= 1000
    now[0] = 79.9
    assert not any(each.reached(0) for each in made)
    now[0] = 90.0
    assert 0 < sum(each.reached(0) is not None for each in made) < 200
    now[0] = 100.0
    assert all(each.reached(0) for each in made)
    assert worker.RecycleLimits(Settings(max_jobs=1)).reached(1) == "1 jobs"
