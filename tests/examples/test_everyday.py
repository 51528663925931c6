"""The files of examples/everyday, each run as a program by itself, as its first lines say."""

import json
import os
from pathlib import Path

import pytest

from tests import forkserver

EXAMPLES = Path(__file__).parents[2] / "examples/everyday"
PRINTED = {
    "results": ["[{'sum': 0}, {'sum': 2}, {'sum': 4}]", "dead: discarded: no negative numbers"],
    "cron": ["one job a tick: True"],
    "progress": ["10000 of 10000 (100 %) loading"],
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
    done = forkserver.run([], module=name, cwd=EXAMPLES, env={**clean, "REDIS_URL": redis_url}, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    places = [lines.index(line) for line in PRINTED[name]]
    assert places == sorted(places), done.stdout


def test_the_schedules_are_listed(redis_url: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "DATABASE"))}
    env = {**clean, "REDIS_URL": redis_url, "STREAMWORKER_APP": "cron:app"}
    done = forkserver.run(["cron", "list", "--json"], cwd=EXAMPLES, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == ["every second", "at night"]
    assert list(rows[1]) == ["name", "queue", "kind", "expression", "tz", "missed", "last", "next",
                             "owner", "paused", "known", "by"]  # fmt: skip
    assert rows[1]["last"] is None
    assert len(rows[1]["next"]) == 3
    assert all("T03:00:00+0" in moment for moment in rows[1]["next"])
