"""Changing jobs by hand: asked for, fenced, and never a living worker's by accident."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from streamworker import codec
from tests.cli.conftest import Terminal, both_modes, document, forget
from tests.conftest import eventually_blocking

HOLDS = "stream:{holds}"


def results(done):
    return sorted((row["result"] for row in done.rows), key=str)


def pending(ground):
    """Entries of what is claimed."""
    return [entry.decode() for entry, _, _ in ground.claims("holds")]


@pytest.fixture
def lost(sw, raw, held):
    """``lost(3)``: three pending jobs of a worker that was killed."""

    def lose(count):
        worker = held(count, "--lease", "1")
        worker.kill()
        forget(raw, worker)
        return worker

    return lose


@pytest.mark.parametrize(
    ("ground", "verb"),
    [("stream", "release"), ("stream", "bury"), ("stream", "drop"), ("list", "release")],
    indirect=["ground"],
)
def test_living_workers_are_left_alone(sw, raw, held, tmp_path, verb, ground):
    worker = held(2)
    entry = pending(ground)[0]
    refused = sw("pending", verb, entry, "--yes")
    assert refused.returncode == 1
    assert "is alive" in refused.sentence
    assert "--force" in refused.sentence
    skipped = sw.ok("pending", verb, "--all", "--yes", "--json")
    assert results(skipped) == ["skipped", "skipped"]
    assert len(pending(ground)) == 2

    forced = sw.ok("pending", verb, entry, "--yes", "--force", "--json")
    assert results(forced) == [{"release": "released", "bury": "buried", "drop": "dropped"}[verb]]
    assert raw.xlen("stream:{holds}:dead") == (verb == "bury")
    if verb == "release":  # the worker may run it again, under another entry
        eventually_blocking(lambda: len(pending(ground)) == 2)
    assert entry not in pending(ground)
    # The worker's own ending of it is lost by the fence; nothing comes back.
    (tmp_path / "gate").touch()
    eventually_blocking(lambda: ground.left(queue="holds") == 0)
    assert worker.stop() == 0
    assert ground.left(queue="holds") == 0


@both_modes
def test_release_of_a_dead_workers_jobs(sw, raw, ground, lost):
    worker = lost(3)
    before = sw.ok("pending", "--json").rows
    assert [row["alive"] for row in before] == [False] * 3
    first, second, _ = before
    for nothing in (["release"], ["release", "--queue", "holds"], ["release", "--all", "--worker", "x"]):
        assert sw("pending", *nothing, "--yes").returncode == 2
    would = sw.ok("pending", "release", first["job_id"], "--dry-run")
    assert first["entry_id"] in would.stdout
    unasked = sw("pending", "release", first["entry_id"])
    assert unasked.returncode == 2
    assert "--yes" in unasked.sentence
    assert len(pending(ground)) == 3

    assert "released 1 pending job" in sw.ok("pending", "release", first["entry_id"], "--yes").stdout
    ids = sw.ok("pending", "release", "--id", second["job_id"], "--yes", "--json").rows
    assert ids == [
        {"queue": "holds", "entry_id": second["entry_id"], "job_id": second["job_id"], "kind": "hold", "result": "released"}
    ]  # fmt: skip
    again = sw("pending", "release", first["entry_id"], second["entry_id"], "--yes")
    assert again.returncode == 1
    assert again.stderr.count("there is no pending job") == 2
    done = sw.ok("pending", "release", "--worker", worker.worker_id, "--min-idle", "0.1", "--kind", "hold", "--yes")
    assert "released 1" in done.stdout
    assert pending(ground) == []
    bodies = [json.loads(body) for body in ground.waiting(queue="holds")]
    assert sorted(body["id"] for body in bodies) == sorted(row["job_id"] for row in before)
    # Back uncharged, one hop on, and the death of its worker is not forgotten.
    assert [(body["hop"], body.get("attempt_count"), "headers" in body) for body in bodies] == [(1, None, False)] * 3
    secret = raw.hget("stream:{holds}:meta", "secret")
    states = [codec.state_of(codec.read(body), secret) for body in ground.waiting(queue="holds")]
    assert [state.deliveries for state in states] == [1] * 3


@both_modes
def test_bury_and_drop(sw, ground, lost):
    lost(3)
    rows = sw.ok("pending", "--json").rows
    sw.ok("pending", "bury", rows[0]["entry_id"], "--reason", "looked wrong", "--yes")
    sw.ok("pending", "drop", rows[1]["entry_id"], "--yes")
    (letter,) = sw.ok("dead", "--json").rows
    assert (letter["job_id"], letter["reason"], letter["worker_id"], letter["kind"]) == (
        rows[0]["job_id"], "looked wrong", rows[0]["worker_id"], "hold",
    )  # fmt: skip
    assert [row["job_id"] for row in sw.ok("pending", "--json").rows] == [rows[2]["job_id"]]
    assert ground.left(queue="holds") == 1
    shown = sw.ok("pending", "show", rows[2]["job_id"], "--json").rows
    assert shown[0]["entry_id"] == rows[2]["entry_id"]
    assert "document" not in shown[0]
    assert sw("pending", "show", "nobody").sentence == "there is no pending job nobody"
    assert sw("pending", "show").returncode == 2


def test_what_cannot_go_back(sw, raw, ground):
    """Unreadable bytes go back as they are; an entry without a document is refused, and can be dropped."""
    entries = [raw.xadd(HOLDS, fields).decode() for fields in ({"job": "{nonsense"}, {"other": "x"}, {"job": "gone"})]
    raw.xgroup_create(HOLDS, "workers", "0")
    raw.xreadgroup("workers", "w", {HOLDS: ">"})
    raw.xdel(HOLDS, entries[2])
    done = sw("pending", "release", "--all", "--yes", "--json")
    assert done.returncode == 1
    assert {row["entry_id"]: row["result"] for row in done.rows} == dict(
        zip(entries, ("released", "refused", "refused"), strict=True)
    )
    assert raw.xrange(HOLDS)[-1][1] == {b"job": b"{nonsense"}
    assert len(pending(ground)) == 2
    sw.ok("pending", "drop", "--all", "--yes")
    assert pending(ground) == []
    assert [fields for _, fields in raw.xrange(HOLDS)] == [{b"job": b"{nonsense"}]


@pytest.mark.parametrize("answer", ["y\n", "n\n", "\n"])
def test_people_are_asked(sw, ground, lost, answer):
    lost(2)
    terminal = Terminal(sw, "pending", "drop", "--all")
    terminal.until("drop 2 pending jobs? [y/N]")
    terminal.type(answer)
    agreed = answer == "y\n"
    assert terminal.wait() == (0 if agreed else 1)
    assert ("dropped 2 pending jobs" in terminal.text) is agreed
    assert ("nothing was changed" in terminal.text) is not agreed
    assert len(pending(ground)) == (0 if agreed else 2)


@both_modes
def test_delayed(sw, raw, ground):
    ids = sw.ok("enqueue", "x", "--queue", "q", "--delay", 500, "--count", 4).stdout.split()
    assert sw("delayed", "run", "--yes").returncode == 2
    sw.ok("delayed", "run", ids[0], "--yes")
    assert [json.loads(body)["id"] for body in ground.waiting()] == [ids[0]]  # without any worker
    sw.ok("delayed", "drop", "--id", ids[1], "--yes")
    assert raw.zcard("stream:{q}:due") == raw.hlen("stream:{q}:bodies") == 2
    missing = sw("delayed", "drop", ids[1], "--yes")
    assert missing.returncode == 1
    assert missing.sentence == f"there is no delayed job {ids[1]}"
    assert results(sw.ok("delayed", "drop", "--all", "--limit", "1", "--json", "--yes")) == ["dropped"]
    assert "made ready 1 delayed job" in sw.ok("delayed", "run", "--kind", "x", "--yes").stdout
    assert ground.ready() == 2
    assert sw.ok("delayed", "run", "--all", "--yes").sentence == "no delayed job fits"


@both_modes
def test_dead_retry(sw, raw, doomed, ground):
    doomed("one", "two", "three")
    letters = raw.xrange("stream:{dooms}:dead")
    body = json.loads(letters[0][1][b"job"]) | {"attempt_count": 7, "hop": 3, "theirs": [1.50]}
    body["headers"] = {"streamworker-deliveries": "4", "streamworker-unknown-since": "5", "traceparent": "00"}
    body["streamworker_state"] = {"deliveries": 4, "seal": "0"}
    raw.xadd("stream:{dooms}:dead", {"job": json.dumps(body), "id": body["id"], "level": "high", "reason": "made up"})
    raw.xdel("stream:{dooms}:dead", letters[0][0])
    assert sw("dead", "retry", "--yes").returncode == 2

    assert results(sw.ok("dead", "retry", body["id"], "--yes", "--json")) == ["retried"]
    (body_again,) = ground.waiting("high", "dooms")
    again = json.loads(body_again)
    assert again.get("attempt_count") is None
    assert again["hop"] == 4
    assert again["headers"] == {"traceparent": "00"} and "streamworker_state" not in again
    assert again["theirs"] == [1.50]
    assert again["id"] == body["id"]
    assert sw("dead", "retry", body["id"], "--yes").returncode == 1

    sw.ok("dead", "drop", "--reason", "discarded", "--limit", "1", "--yes")
    assert raw.xlen("stream:{dooms}:dead") == 1
    sw.ok("dead", "retry", "--all", "--queue", "dooms", "--yes")
    assert raw.xlen("stream:{dooms}:dead") == 0
    assert ground.ready(queue="dooms") == 1


def test_dead_letters_that_cannot_be_read(sw, raw):
    raw.xadd("stream:{q}:dead", {"job": b"\xff{", "reason": "undecodable", "level": "low"})
    raw.xadd("stream:{q}:dead", {"field:other": "x", "reason": "undecodable"})
    done = sw("dead", "retry", "--all", "--yes")
    assert done.returncode == 1
    assert "has no field 'job'" in done.sentence
    assert "retried 1 dead letter" in done.stdout
    assert [fields for _, fields in raw.xrange("stream:{q}:low")] == [{b"job": b"\xff{"}]
    assert raw.xlen("stream:{q}:dead") == 1


def test_workers_prune(sw, raw, lost, ground):
    worker = lost(1)
    raw.xgroup_createconsumer(HOLDS, "workers", "idle-one")
    assert sw("workers", "prune").returncode == 2
    holds = sw("workers", "prune", worker.worker_id, "--yes")
    assert holds.returncode == 1
    assert "still holds 1 job" in holds.sentence
    raw.hset("streamworker:worker:busy", "queues", "holds")
    assert "it is alive" in sw("workers", "prune", "busy", "--yes").sentence
    assert results(sw.ok("workers", "prune", "--all", "--yes", "--json")) == ["pruned", "skipped"]
    assert [info["name"].decode() for info in raw.xinfo_consumers(HOLDS, "workers")] == [worker.worker_id]
    assert len(pending(ground)) == 1
    assert sw("workers", "prune", "nobody", "--yes").sentence == "there is no dead worker nobody"


@pytest.mark.parametrize("ground", ["list"], indirect=True)
def test_names_of_dead_workers_in_lists_are_what_they_hold(sw, ground, lost):
    worker = lost(1)
    holds = sw("workers", "prune", worker.worker_id, "--yes")
    assert holds.returncode == 1
    assert "still holds 1 job" in holds.sentence
    sw.ok("pending", "drop", "--worker", worker.worker_id, "--yes")
    assert ground.names("holds") == []
    assert sw.ok("workers", "--json").rows == []
    assert sw("workers", "prune", worker.worker_id, "--yes").sentence == f"there is no dead worker {worker.worker_id}"


def test_a_date_in_the_document_does_not_park_it_again(sw, raw):
    raw.zadd("stream:{q}:due", {"normal/a/1": 9e12})
    raw.hset("stream:{q}:bodies", "normal/a/1", '{"run_at": "2999-01-01T00:00:00Z", "payload": {}}')
    sw.ok("delayed", "run", "--all", "--yes")
    assert [fields for _, fields in raw.xrange("stream:{q}")] == [{b"job": b'{"payload":{}}'}]


def test_foreign_members_of_the_due_set(sw, raw):
    """Anybody can write there: what is no job of ours is shown as it is, and keeps nobody from the others."""
    ours = sw.ok("enqueue", "x", "--queue", "q", "--delay", 500).stdout.strip()
    foreign = {"weird": "inf", "x/y": "-inf", "never": 9e15, "//": 5}
    raw.zadd("stream:{q}:due", foreign)
    raw.hset("stream:{q}:bodies", "weird", '{"payload": {}}')
    raw.zadd("stream:{other}:due", {"normal/a/b": "inf"})
    rows = sw.ok("delayed", "--json").rows
    assert len(rows) == 6
    told = {row["entry_id"]: (row["level"], row["job_id"], row["due_in_s"], row["due_at"]) for row in rows}
    assert told["weird"] == ("normal", None, None, "")
    assert told["x/y"] == ("normal", None, None, "")
    assert told["never"][2] > 1e12
    table = sw.ok("delayed").stdout
    assert " inf " in table
    assert " -inf " in table
    done = sw("delayed", "run", "--all", "--yes", "--json")
    assert done.returncode == 1
    assert {row["entry_id"]: row["result"] for row in done.rows if row["queue"] == "q" and row["job_id"] != ours} == {
        "weird": "made ready", "x/y": "refused", "never": "refused", "//": "refused",
    }  # fmt: skip
    assert "has no document" in done.rows[0]["reason"]
    assert raw.xlen("stream:{q}") == 2
    # Members without a document vanish when their time comes, as they do without anybody's help.
    assert raw.zrange("stream:{q}:due", 0, -1) == [b"never"]
    assert results(sw.ok("delayed", "drop", "--all", "--yes", "--json")) == ["dropped"] * 2


@pytest.mark.parametrize("words", [["dead", "drop"], ["dead", "retry"], ["delayed", "run"], ["delayed", "drop"]])
def test_nobody_reads_what_is_done(sw, raw, words):
    """`... --json | head -1`: the work is finished all the same."""
    count = 500  # more than a pipe and our own buffer hold: 200 bytes each, of 64 and 8 KiB
    with raw.pipeline(transaction=False) as pipe:
        for index in range(count):
            if words[0] == "dead":
                pipe.xadd("stream:{q}:dead", {"job": document("x"), "id": f"{index:0100}", "reason": "made up"})
            else:
                pipe.zadd("stream:{q}:due", {f"normal/{index:0100}/r": 9e12})
                pipe.hset("stream:{q}:bodies", f"normal/{index:0100}/r", "{}")
        pipe.execute()
    command = sw.piped(*words, "--all", "--yes", "--json")
    json.loads(command.stdout.readline())
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait(30) == 0
    assert raw.xlen("stream:{q}:dead") == raw.zcard("stream:{q}:due") == 0
    assert raw.xlen("stream:{q}") == (0 if words[1] == "drop" else count)


def test_an_error_is_told_to_whoever_stopped_reading(sw, raw):
    raw.xadd("stream:{q}:dead", {"other": "x"})
    refused = subprocess.run(
        f"{shlex.join(sw.command('dead', 'retry', '--all', '--yes', '--json'))} >&-",
        shell=True, cwd=sw.directory, env=sw.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert (refused.returncode, refused.stderr) == (1, "")
    with Path("/dev/full").open("w") as full:
        command = sw.piped("dead", "drop", "--all", "--yes", stdout=full)
    said = command.stderr.read()
    assert command.wait(30) == 1
    assert "No space left on device; the work was done" in said
    assert "unexpected" not in said
    assert raw.xlen("stream:{q}:dead") == 0
