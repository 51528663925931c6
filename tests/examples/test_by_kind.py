"""The small examples run as their first lines say, on a real server, in both modes where those make a difference."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import forkserver

EXAMPLES = Path(__file__).parents[2] / "examples/everyday"
one_mode = pytest.mark.parametrize("ground", ["stream"], indirect=True)
"""For what runs around handlers alone, which no mode sees."""


def run(program: str, redis_url: str, mode: str, *, dies: bool = False) -> str:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))
    }
    clean |= {"REDIS_URL": redis_url, "STREAMWORKER_MODE": mode, "STREAMWORKER_LOG_LEVEL": "warning"}
    done = forkserver.run([], module=program.removesuffix(".py"), cwd=EXAMPLES, env=clean, timeout=120)
    assert done.returncode == 0, done.stderr
    assert dies or "Traceback" not in done.stderr  # a dead letter is logged with its traceback
    return done.stdout


def test_limits(ground, redis_url):
    said = run("limits.py", redis_url, ground.mode)
    match = re.fullmatch(r"10 calls in (\d+\.\d) s, 9 reports, one at a time for each tenant\n", said)
    assert match and float(match[1]) >= 0.8


def test_batches(ground, redis_url, raw):
    said = run("batches.py", redis_url, ground.mode)
    match = re.fullmatch(r"199 rows in (\d+) inserts\n", said)
    assert match and int(match[1]) < 50
    ((_, letter),) = raw.xrange("stream:{views}:dead")
    assert letter[b"reason"] == b"discarded"


@one_mode
def test_middleware(ground, redis_url):
    said = run("middleware.py", redis_url, ground.mode).splitlines()
    assert sorted(said[:3]) == ["HELLO Bob OF umbrella", "hello Ada of acme", "hello Eve of nobody"]
    assert said[3:] == ["greet took 0 s", "greet took 0 s", "shout took 0 s"]


@one_mode
def test_sentry(ground, redis_url):
    said = run("sentry.py", redis_url, ground.mode, dies=True).splitlines()
    assert sorted(said) == [
        "25.0",
        "error: ZeroDivisionError in divide, attempt 2, after ['dividing, attempt 2']",
        "warning: ZeroDivisionError in divide, attempt 1, after ['dividing, attempt 1']",
    ]


def test_pause(ground, redis_url):
    assert run("pause.py", redis_url, ground.mode).splitlines() == [
        "1 sent, 10 wait, paused by me: the printer is out of paper",
        "11 sent",
        "1 delayed deleted",
    ]
