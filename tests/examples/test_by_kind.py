"""The small examples run as their first lines say, on a real server, in both modes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples/everyday"


def run(program: str, redis_url: str, mode: str, *arguments: str, **environment: str) -> str:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))
    }
    clean |= {"REDIS_URL": redis_url, "STREAMWORKER_MODE": mode, "STREAMWORKER_LOG_LEVEL": "warning", **environment}
    done = subprocess.run(
        [sys.executable, EXAMPLES / program, *arguments], env=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
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
