"""Several workers under one supervisor: each a consumer, restarted when it dies, all drained by one signal."""

import json
import os
import signal

import pytest

from streamworker.cli.worker import addresses
from streamworker.settings import Address
from tests.conftest import eventually_blocking


def ready(supervisor):
    """(worker id, pid) of every worker that said it is ready, in order."""
    ids = [json.loads(line)["worker_id"] for line in supervisor.lines if "worker_ready" in line]
    return [(name, int(name.split("-")[-2])) for name in ids]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_signal_drains_all(sw, raw, tmp_path):
    sw.forks = False
    supervisor = sw.worker("--processes", 2, "--concurrency", 1, "--queues", "holds")
    eventually_blocking(lambda: len(ready(supervisor)) == 2)
    names = {name for name, _ in ready(supervisor)}
    assert len(names) == 2
    sw.ok("enqueue", "hold", json.dumps({"gate": str(tmp_path / "gate")}), "--app", "jobs:app", "--count", 2)
    eventually_blocking(lambda: raw.xpending("stream:{holds}", "workers")["pending"] == 2)
    held = {entry["name"].decode() for entry in raw.xpending("stream:{holds}", "workers")["consumers"]}
    assert held == names
    supervisor.signal(signal.SIGTERM)
    eventually_blocking(lambda: supervisor.saw("worker_stopping", 2))
    (tmp_path / "gate").touch()
    assert supervisor.wait() == 0
    assert raw.xlen("stream:{holds}") == 0
    assert raw.xinfo_consumers("stream:{holds}", "workers") == []


def test_a_second_signal_hurries_all(sw, raw, tmp_path):
    supervisor = sw.worker("--processes", 2, "--concurrency", 1, "--queues", "holds")
    sw.ok("enqueue", "hold", json.dumps({"gate": str(tmp_path / "gate")}), "--app", "jobs:app", "--count", 2)
    eventually_blocking(lambda: raw.xpending("stream:{holds}", "workers")["pending"] == 2)
    supervisor.signal(signal.SIGTERM)
    eventually_blocking(lambda: supervisor.saw("worker_stopping", 2))
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait(10) == 143
    assert raw.xlen("stream:{holds}") == 2
    assert raw.xpending("stream:{holds}", "workers")["pending"] == 0


def test_a_killed_worker_is_started_again(sw, raw):
    sw.constants["streamworker.loops.FIRST"] = 0.1
    supervisor = sw.worker("--processes", 2, "--lease", "1")
    eventually_blocking(lambda: len(ready(supervisor)) == 2)
    (_, victim), (survivor, _) = ready(supervisor)
    os.kill(victim, signal.SIGKILL)
    eventually_blocking(lambda: len(ready(supervisor)) == 3)
    newcomer, pid = ready(supervisor)[2]
    assert pid != victim
    assert newcomer != survivor
    assert supervisor.saw("worker_ended")
    assert supervisor.stop() == 0


@pytest.mark.all  # as test_workers_whose_supervisor_is_killed_finish_what_runs says of those that run jobs
def test_no_worker_outlives_its_supervisor(sw, raw):
    supervisor = sw.worker("--processes", 2)
    eventually_blocking(lambda: len(ready(supervisor)) == 2)
    supervisor.kill()
    eventually_blocking(lambda: not any(alive(pid) for _, pid in ready(supervisor)))
    assert raw.xinfo_consumers("stream:{notes}", "workers") == []


def test_burst_ends_when_nothing_is_left(sw, raw):
    sw.ok("enqueue", "note.write", '{"text": "x"}', "--app", "jobs:app", "--count", 500)
    done = sw.ok("worker", "jobs:app", "--burst", "--processes", 2)
    counts = [json.loads(line)["done"] for line in done.stderr.splitlines() if "worker_stopped" in line]
    assert sum(counts) == 500
    assert raw.xlen("stream:{notes}") == 0


@pytest.mark.parametrize("app", ["jobs:nothing", pytest.param("nowhere:app", marks=pytest.mark.all)])
def test_what_cannot_start_is_not_tried_for_ever(sw, app):
    done = sw("worker", app, "--processes", 2)
    assert done.returncode == 78
    assert "Traceback" not in done.stderr
    assert "worker_ended" not in done.stderr  # which is said before one is started again


def test_every_worker_has_its_own_address():
    assert addresses(None, 3) == []
    assert addresses(Address("127.0.0.1", 8000), 3) == ["127.0.0.1:8000", "127.0.0.1:8001", "127.0.0.1:8002"]
    assert addresses(Address("::1", 0), 2) == ["[::1]:0", "[::1]:0"]
