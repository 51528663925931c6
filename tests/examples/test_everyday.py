"""The files of examples/everyday, each run as a program by itself, as its first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples/everyday"
PRINTED = {
    "results": ["[{'sum': 0}, {'sum': 2}, {'sum': 4}]", "dead: discarded: no negative numbers"],
    "cancel": [
        "later.csv: cancelled",
        "running.csv began",
        "running.csv tidied up, cancelled: True",
        "running.csv: asked",
    ],
}


@pytest.mark.parametrize("name", PRINTED)
def test_example(name: str, redis_url: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "DATABASE"))}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], env={**clean, "REDIS_URL": redis_url}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    places = [lines.index(line) for line in PRINTED[name]]
    assert places == sorted(places), done.stdout
