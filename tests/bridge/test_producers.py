"""Producers that know nothing of streamworker get their jobs run: in list mode, and through the bridge in stream mode."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Program
from tests.conftest import eventually_blocking

EXAMPLES = Path(__file__).parents[2] / "examples" / "producers"
COUNT = 25


@pytest.fixture
def project() -> Path:
    """The example's directory, where its worker is."""
    return EXAMPLES


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node producers with what npm brings them."""
    npm, program = shutil.which("npm"), shutil.which("node")
    if npm is None or program is None:
        pytest.skip("needs node and npm: install Node 20 or newer")
    directory = tmp_path_factory.mktemp("node") / "producers"
    shutil.copytree(EXAMPLES / "node", directory, ignore=shutil.ignore_patterns("node_modules"))
    done = subprocess.run([npm, "install", "--no-audit", "--no-fund"], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (directory / "package-lock.json").exists()  # it would name a registry's host
    return directory


@pytest.fixture(params=["plain", "raw", pytest.param("node", marks=pytest.mark.all)])
def produce(request: pytest.FixtureRequest, redis_url: str) -> Callable[[], list[str]]:
    """Runs a producer, or both of Node; returns their names, which all their addresses begin with."""
    if request.param == "node":
        folder = request.getfixturevalue("node")
        commands = {name: ["node", str(folder / f"{name}.mjs")] for name in ("ioredis", "node-redis")}
    else:
        program = EXAMPLES / {"plain": "plain.py", "raw": "raw_resp.py"}[request.param]
        commands = {request.param: [sys.executable, str(program)]}

    def run() -> list[str]:
        env = {**os.environ, "REDIS_URL": redis_url}
        for command in commands.values():
            done = subprocess.run([*command, str(COUNT)], env=env, capture_output=True, text=True, timeout=30)
            assert (done.returncode, done.stderr) == (0, "")
        return list(commands)

    return run


@pytest.fixture(params=["list", "stream"])
def working(request: pytest.FixtureRequest, sw: Program) -> Iterator[Callable[[], Counter[str]]]:
    """A worker in each mode, in stream mode with a bridge; the value tells how often it wrote to whom."""
    settings = {"STREAMWORKER_MODE": request.param, "STREAMWORKER_APP": "worker:app", "STREAMWORKER_LOG_FORMAT": "json"}
    worker = sw.start("worker", **settings)
    if request.param == "stream":
        sw.start("bridge", **settings)
    eventually_blocking(lambda: worker.saw("worker_ready"))
    yield lambda: Counter(json.loads(line)["to"] for line in list(worker.lines) if '"email_sent"' in line)
    assert worker.stop() == 0


def test_every_producers_jobs_run_once(produce, working, raw):
    expected = {f"{name}-{n}@example.com" for name in produce() for n in range(COUNT)}
    eventually_blocking(lambda: working().keys() >= expected)
    eventually_blocking(
        lambda: not raw.exists("queue:email-sending", "queue:email-sending:high", "queue:email-sending:low")
    )
    assert working() == Counter(expected)
    eventually_blocking(lambda: not raw.xlen("stream:{email-sending}"))


def test_no_lock_file_and_nothing_installed_is_tracked():
    done = subprocess.run(["git", "ls-files", str(EXAMPLES)], capture_output=True, text=True, cwd=EXAMPLES)
    assert not [path for path in done.stdout.splitlines() if "lock" in path or "node_modules" in path]
