"""Workers whose clocks are an hour wrong: what is due is decided by the server alone, so jobs are neither late nor early."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta

import pytest

from tests.conftest import eventually_blocking
from tests.crash.clock import Clock

HOUR = 3600
APP = """
from pathlib import Path
from streamworker import App, Payload, Snooze

class Mark(Payload, kind="mark", queue="marks"):
    path: str
    snooze: float = 0

app = App()

@app.handler
async def mark(payload: Mark) -> None:
    if payload.snooze and not Path(payload.path + ".began").exists():
        Path(payload.path + ".began").touch()
        raise Snooze(payload.snooze)
    with Path(payload.path).open("a") as file:
        file.write("x")
"""


@pytest.mark.parametrize(
    ("ground", "ahead"),
    [
        pytest.param("stream", HOUR, id="fast-stream"),
        pytest.param("list", -HOUR, id="slow-list"),
        pytest.param("stream", -HOUR, id="slow-stream", marks=pytest.mark.all),
        pytest.param("list", HOUR, id="fast-list", marks=pytest.mark.all),
    ],
    indirect=["ground"],
)
def test_no_job_is_late_or_early(sw, ground, project, tmp_path, ahead):
    """A producer of another language writes run_at into the queue itself; ours says run_at, delay, or snoozes."""
    (project / "marking.py").write_text(APP)
    clock = Clock(tmp_path)
    clock.show(ahead)
    worker = sw.start("worker", "marking:app", **clock.environment)
    eventually_blocking(lambda: worker.saw("worker_ready"))
    now = time.time()
    moment = datetime.fromtimestamp(now, UTC)
    due = {
        name: moment + timedelta(seconds=seconds) for name, seconds in (("past", -5), ("raw", 1.5), ("later", HOUR / 2))
    }
    for name, at in due.items():
        ground.push(_document(tmp_path / name, run_at=at.isoformat()), queue="marks")
    ground.push(_document(tmp_path / "snoozed", snooze=1.5), queue="marks")
    sw.ok("enqueue", "mark", json.dumps({"path": str(tmp_path / "delayed")}), "--queue", "marks", "--delay", "1.5")
    eventually_blocking((tmp_path / "past").exists, 30)
    early = False
    while time.time() < now + 1.2:
        assert not early, "it ran 0.3 s or more before its time"
        time.sleep(0.01)
        early = (tmp_path / "raw").exists()  # counts if it is still too early afterwards
    for name in ("raw", "delayed", "snoozed"):
        eventually_blocking((tmp_path / name).exists, 30)
    assert not (tmp_path / "later").exists()
    assert worker.stop() == 0
    assert [(tmp_path / name).read_text() for name in ("past", "raw", "delayed", "snoozed")] == ["x"] * 4
    assert ground.raw.zcard(ground.keys("marks").due) == 1


def _document(path, *, snooze=0.0, **fields) -> str:
    return json.dumps({"kind": "mark", "payload": {"path": str(path), "snooze": snooze}, **fields})
