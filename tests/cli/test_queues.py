"""Pausing, resuming and emptying queues by hand; replaying at a rate."""

import json

import pytest

from tests.cli.conftest import both_modes
from tests.conftest import eventually_blocking


def states(sw):
    return {row["queue"]: row["paused"] for row in sw.ok("queues", "--json").rows}


def test_pause_and_resume(sw, raw):
    worker = sw.worker("--queues", "notes")
    sw.ok("enqueue", "x", "--queue", "other")
    assert sw.ok("queues", "pause", "notes").stdout == "notes paused\n"
    assert sw.ok("queues", "pause", "notes").stdout == "notes had been paused already\n"
    assert states(sw) == {"notes": True, "other": False}
    assert " at 20" in raw.hget("stream:{notes}:meta", "paused").decode()
    listed = sw.ok("queues").stdout.splitlines()
    assert [line.split()[-1] for line in listed if line.startswith("notes")] == ["paused"]

    sw.ok("enqueue", "note.write", json.dumps({"text": "x"}), "--queue", "notes")
    assert raw.xlen("stream:{notes}") == 1
    assert sw.ok("queues", "resume", "--all").stdout == "notes resumed\nother was not paused\n"
    eventually_blocking(lambda: raw.xlen("stream:{notes}") == 0, timeout=3)
    assert worker.stop() == 0

    early = sw.ok("queues", "pause", "not-yet")
    assert "no queue not-yet yet" in early.sentence
    raw.hset("stream:{notes}:meta", "inactive", "1")
    assert "inactive in PostgreSQL" in sw.ok("queues", "resume", "notes").sentence


@pytest.mark.parametrize(
    "words", [["pause"], ["resume"], ["pause", "a", "--all"], ["purge", "a"], ["pause", "a", "b d"]]
)
def test_what_is_not_said_is_not_done(sw, raw, words):
    assert sw("queues", *words).returncode == 2
    assert raw.keys("*") == []


def test_purge(sw, raw):
    sw.ok("enqueue", "x", "--queue", "q", "--count", 5)
    sw.ok("enqueue", "x", "--queue", "q", "--count", 3, "--delay", 100)
    refused = sw("queues", "purge", "q", "--ready")
    assert refused.returncode == 2
    assert "delete 5 ready of q for good?" in refused.sentence
    assert sw.ok("queues", "purge", "q", "--ready", "--delayed", "--dry-run").stdout == (
        "would be deleted: 5 ready and 3 delayed of q\n"
    )
    assert raw.xlen("stream:{q}") == 5
    assert sw.ok("queues", "purge", "q", "--ready", "--yes").stdout == "deleted 5 ready of q\n"
    assert (raw.xlen("stream:{q}"), raw.zcard("stream:{q}:due")) == (0, 3)
    assert "nothing ready" in sw.ok("queues", "purge", "q", "--ready", "--yes").sentence


def test_replaying_at_a_rate(sw, raw, doomed):
    doomed(*(f"reason {n}" for n in range(6)))
    assert sw("dead", "retry", "--all", "--rate", "0", "--yes").returncode == 2
    sw.ok("dead", "retry", "--all", "--rate", "20", "--yes")
    added = [int(entry.split(b"-")[0]) for entry, _ in raw.xrange("stream:{dooms}")]
    assert len(added) == 6
    assert added[-1] - added[0] >= 100  # six at 20/s take 250 ms, of which 100 may be made up for


def test_searching_dead_letters(sw, doomed):
    doomed("Paper jam", "no toner")
    assert [row["error"] for row in sw.ok("dead", "--search", "paper JAM", "--json").rows] == ["Paper jam"]
    assert sw.ok("dead", "--search", "nothing like it", "--json").rows == []
    sw.ok("dead", "drop", "--search", "toner", "--yes")
    assert [row["error"] for row in sw.ok("dead", "--json").rows] == ["Paper jam"]


@both_modes
def test_what_waits_behind_order_keys_is_told(sw, ground, raw):
    ground.push('{"payload": {}}', queue="notes")
    assert "order key" not in sw.ok("queues").stdout
    raw.hset("stream:{notes}:meta", "waiting", 3)
    raw.hset("stream:{notes}:halted", "k", "job")
    (line,) = [line for line in sw.ok("queues").stdout.splitlines() if line.startswith("notes")]
    assert line.endswith("3 behind order keys, 1 order key halts at dead jobs")
