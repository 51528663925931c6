"""What is listed is what is there: for programs exactly, for people readably."""

import json
import os
import re
import signal
import subprocess
import time
from datetime import UTC, datetime

import pytest

from streamworker.redact import printable
from streamworker.views.listing import Pace
from streamworker.views.rows import age
from tests.cli.conftest import Terminal, both_modes, forget
from tests.conftest import eventually_blocking
from tests.contract.ground import out_of_memory

PENDING = ["queue", "level", "entry_id", "job_id", "kind", "worker_id", "idle_ms", "deliveries", "alive"]
QUEUES = ["queue", "ready", "running", "delayed", "dead", "oldest_age_s", "paused", "waiting"]


@both_modes
def test_queues(sw, raw, ground):
    assert sw.ok("queues").sentence == "no queues"
    assert sw.ok("queues", "--json").stdout == ""
    for index in range(3):
        sw.ok("enqueue", "x", "--queue", "b", "--count", index + 1, "--priority", ("high", "normal", "low")[index])
    sw.ok("enqueue", "x", "--queue", "b", "--delay", "60", "--count", 2)
    ground.push("{}", queue="a")  # of a producer that never heard of groups
    raw.hset("stream:{paused}:meta", "paused", "1")
    raw.set("stream:{b}:key:stream:{nobody}", "1")
    rows = sw.ok("queues", "list", "--json").rows
    assert [list(row) for row in rows] == [QUEUES] * 3
    assert [[row["queue"], *list(row.values())[1:5], row["paused"]] for row in rows] == [
        ["a", 1, 0, 0, 0, False],
        ["b", 6, 0, 2, 0, False],
        ["paused", 0, 0, 0, 0, True],
    ]
    assert rows[2]["oldest_age_s"] is None
    assert 0 <= rows[1]["oldest_age_s"] < 60
    table = sw.ok("queues").stdout.splitlines()
    assert table[0].split() == ["queue", "ready", "running", "delayed", "dead", "oldest"]
    assert table[2].split()[:5] == ["b", "6", "0", "2", "0"]
    assert table[3].split()[-1] == "paused"
    assert [row["queue"] for row in sw.ok("queues", "b", "--json").rows] == ["b"]
    assert [row["queue"] for row in sw.ok("queues", "--queue=b", "--json").rows] == ["b"]


@both_modes
def test_pending_is_what_workers_hold(sw, ground, held):
    worker = held(7)
    rows = sw.ok("pending", "--json").rows
    assert [list(row) for row in rows] == [PENDING] * 7
    truth = list(ground.claims("holds"))
    assert [(row["entry_id"], row["worker_id"], row["deliveries"]) for row in rows] == [
        (entry.decode(), owner.decode(), count) for entry, owner, count in truth
    ]
    assert {row["worker_id"] for row in rows} == {worker.worker_id}
    documents = [row["document"] for row in sw.ok("pending", "--json", "--payload").rows]
    assert [row["job_id"] for row in rows] == [document["id"] for document in documents]
    assert {(row["queue"], row["level"], row["kind"], row["alive"]) for row in rows} == {
        ("holds", "normal", "hold", True)
    }
    assert all(0 <= row["idle_ms"] < 15_000 for row in rows)
    assert len(sw.ok("pending", "list", "--json", "--limit", 3).rows) == 3
    for none in (["other"], ["--worker", "nobody"], ["--min-idle", "3600"], ["--kind", "x"]):
        assert sw.ok("pending", *none, "--json").rows == []
    all_of_them = ["holds", "--worker", worker.worker_id, "--kind", "hold", "--min-idle", "0"]
    assert len(sw.ok("pending", *all_of_them, "--json").rows) == 7
    table = sw.ok("pending", "--limit", "2")
    assert len(table.stdout.splitlines()) == 3
    assert worker.worker_id in table.stdout
    assert table.sentence == "there are more pending jobs: --limit shows more, --json shows all"
    assert worker.stop() == 0  # a listing has consumed nothing, and the worker hands all of them back
    assert sw.ok("pending", "--json").rows == []


def test_pending_reads_every_page_and_every_level(sw, raw):
    for stream in ("stream:{q}:high", "stream:{q}", "stream:{q}:low"):
        raw.xgroup_create(stream, "workers", "0", mkstream=True)
        for index in range(250):
            raw.xadd(stream, {"job": json.dumps({"id": f"{stream}-{index}", "kind": "k", "payload": {}})})
        raw.xreadgroup("workers", "w", {stream: ">"}, count=1000)
    rows = sw.ok("pending", "--json").rows
    assert [row["job_id"] for row in rows] == [
        f"{stream}-{index}" for stream in ("stream:{q}:high", "stream:{q}", "stream:{q}:low") for index in range(250)
    ]
    assert not any(row["alive"] for row in rows)


@pytest.mark.parametrize("ground", ["list"], indirect=True)
def test_pending_of_lists_reads_every_page_and_every_level(sw, raw, ground):
    for level in ("high", "normal", "low"):
        for index in range(250):
            entry = f"0198-{level}-{index:03}"
            body = json.dumps({"kind": "k", "payload": {}})
            raw.rpush("queue:q:claimed:w x", f"{entry} 2 {level} {body}")
            raw.zadd("stream:{q}:leases", {f"{entry} 2 w x": 5})
    raw.rpush("queue:q:claimed:w x", "not of ours")
    rows = sw.ok("pending", "--json").rows
    assert [row["job_id"] for row in rows] == [
        f"0198-{level}-{index:03}" for level in ("high", "normal", "low") for index in range(250)
    ]
    assert {(row["worker_id"], row["alive"], row["deliveries"]) for row in rows} == {("w x", False, 2)}
    assert min(row["idle_ms"] for row in rows) > 1e12
    assert raw.llen("queue:q:claimed:w x") == 751  # nothing was taken


def test_jobs_without_id_and_without_sense(sw, raw):
    """A job without an id has the one that its worker logs; what cannot be read is listed all the same."""
    raw.xadd("stream:{notes}", {"job": '{"payload": {"text": "x"}}'})
    raw.xadd("stream:{notes}", {"job": "nonsense\x1b[2J"})
    raw.xadd("stream:{notes}", {"other": "field"})
    gone = raw.xadd("stream:{notes}", {"job": "{}"})
    raw.xgroup_create("stream:{notes}", "workers", "0")
    raw.hset("stream:{notes}:meta", "epoch", "e1")
    raw.xreadgroup("workers", "bad\x1b[31mname", {"stream:{notes}": ">"})
    raw.xdel("stream:{notes}", gone)
    rows = sw.ok("pending", "--json").rows
    assert len(rows) == 4
    assert re.fullmatch(r"[0-9a-f-]{36}", rows[0]["job_id"])
    assert [row["job_id"] for row in rows[1:]] == [None] * 3
    table = sw.ok("pending")
    assert "\x1b" not in table.stdout
    assert "bad\\x1b[31mname" in table.stdout
    shown = sw.ok("pending", "show", rows[1]["entry_id"], "--payload")
    assert "nonsense\\x1b[2J" in shown.stdout
    assert "no job" in shown.stdout


def test_delayed(sw, raw):
    for delay in (300, 100, 200):
        sw.ok("enqueue", "x", json.dumps({"n": delay}), "--queue", "q", "--delay", delay, "--priority", "low")
    rows = sw.ok("delayed", "--json").rows
    assert [list(row) for row in rows] == [["queue", "level", "entry_id", "job_id", "kind", "due_at", "due_in_s"]] * 3
    assert [round(row["due_in_s"], -2) for row in rows] == [100, 200, 300]
    assert {(row["queue"], row["level"], row["kind"]) for row in rows} == {("q", "low", "x")}
    assert raw.zscore("stream:{q}:due", rows[0]["entry_id"]) is not None
    assert "document" not in rows[0]
    shown = sw.ok("delayed", "--json", "--payload", "--limit", "1").rows
    assert [row["document"]["payload"] for row in shown] == [{"n": 100}]
    assert sw.ok("delayed", "list", "other", "--json").rows == []
    # Many that are due at the same millisecond, more than fit on a page.
    raw.delete("stream:{q}:due", "stream:{q}:bodies")
    raw.zadd("stream:{q}:due", {f"normal/j{index}/0": 1_000 + index // 150 for index in range(300)})
    assert [row["job_id"] for row in sw.ok("delayed", "--json").rows] == sorted(
        (f"j{index}" for index in range(300)), key=lambda name: (int(name[1:]) // 150, name)
    )


def test_dead(sw, doomed):
    doomed("first", "second\x9b31m")
    rows = sw.ok("dead", "--json").rows
    assert [list(row) for row in rows] == [
        ["queue", "level", "entry_id", "job_id", "kind", "reason", "error", "attempts", "deliveries", "worker_id",
         "failed_at", "age_s"]
    ] * 2  # fmt: skip
    assert [row["error"] for row in rows] == [r"second\x9b31m", "first"]  # cleaned where it was stored
    assert {(row["queue"], row["reason"], row["kind"]) for row in rows} == {("dooms", "discarded", "doomed")}
    assert "\x9b" not in sw.ok("dead").stdout + sw.ok("dead", "--json").stdout
    assert "why" not in sw.ok("dead", "show", rows[1]["job_id"]).stdout  # payloads are shown when asked for
    shown = sw.ok("dead", "show", rows[1]["job_id"], "--payload", "--json").rows
    assert [row["document"]["payload"] for row in shown] == [{"why": "first"}]
    assert len(sw.ok("dead", "--reason", "disc", "--kind", "doomed", "--json").rows) == 2
    assert sw.ok("dead", "--reason", "timed out", "--json").rows == []
    assert sw("dead", "show", "nobody").sentence == "there is no dead letter nobody"


@both_modes
def test_workers(sw, held):
    worker = held(2, "--lease", "2")
    (row,) = sw.ok("workers", "--json").rows
    assert (row["worker_id"], row["alive"], row["pending"], row["pid"]) == (
        worker.worker_id, True, 2, worker.process.pid,
    )  # fmt: skip
    eventually_blocking(lambda: sw.ok("workers", "--json").rows[0]["running"] == 2, 20)
    assert worker.worker_id in sw.ok("workers").stdout
    assert sw.ok("workers", "nothing", "--json").rows == []


@pytest.mark.parametrize("words", [["pending"], ["queues"]])
def test_watch_fits_a_small_terminal(sw, held, words):
    held(40)
    terminal = Terminal(sw, *words, "--watch", "--interval", "0.2")
    terminal.until("holds")
    shown = len(terminal.text)
    terminal.until("q or Ctrl-C ends")
    deadline = time.monotonic() + 10
    while len(terminal.text) < 2 * shown:  # it is drawn again
        assert terminal.read(deadline)
    if words == ["pending"]:
        terminal.type("xq")
    else:
        terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait() == 0
    lines = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip("\r")
        for line in terminal.text.replace("\x1b[H", "\n").split("\n")  # each picture begins at the top left
    ]
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert ("jobs/s" in terminal.text) is (words == ["queues"])
    if words == ["pending"]:
        assert "and more" in terminal.text
        row = next(line for line in lines if "holds" in line and "hold " in line)
        assert re.search(r"holds +normal +\d{13}-\d+ +hold +\S+…\S+ ", row), row


def test_watch_tells_first_what_needs_attention(sw, raw, held):
    worker = held(2, "--lease", "1")
    worker.kill()
    forget(raw, worker)
    sw.env["STREAMWORKER_LEASE"] = "1"
    sw.ok("enqueue", "x", "--queue", "lonely")
    sw.ok("queues", "pause", "sleepy")
    for words in (["queues"], ["dead"]):
        terminal = Terminal(sw, *words, "--watch", "--interval", "0.2")
        terminal.until("no worker serves it")
        terminal.until("vanished and still holds 2 jobs")
        terminal.until("and 1 more to look at")
        assert "1 ready" in terminal.text
        assert "2 running" in terminal.text
        terminal.type("q")
        assert terminal.wait() == 0
    written = sw.start("queues", "--watch", "--interval", "0.1")
    eventually_blocking(lambda: written.saw("is no terminal"))
    written.signal(signal.SIGINT)
    assert written.wait() == 0


def test_watch_waits_for_the_server(bare, own_server):
    bare.env["REDIS_URL"] = own_server.url
    assert bare("queues", "--watch", "--json").returncode == 2
    bare.ok("enqueue", "x", "--queue", "some")
    terminal = Terminal(bare, "queues", "--watch", "--interval", "0.1")
    terminal.until("some")
    own_server.kill()
    terminal.until("does not answer")
    own_server.start()
    terminal.text = ""
    terminal.until("some")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait() == 0
    own_server.kill()
    assert bare("queues", "--watch").returncode == 69  # at its start there is nothing to wait for


def test_words():
    assert [age(seconds) for seconds in (None, 0, 0.31, 9.94, 42, 303, 12_000, 187_200, -3)] == [
        "", "0.0s", "0.3s", "9.9s", "42s", "5m 03s", "3h 20m", "2d 04h", "-3.0s",
    ]  # fmt: skip
    assert printable("a\x1b[1mb\nc\u202ed\x9be\ud800ü") == "a\\x1b[1mb\\nc\\u202ed\\x9be\\ud800ü"


def test_pace():
    pace = Pace()
    assert pace.rate("q", None, 0) is None
    assert pace.rate("q", 100, 1) is None
    assert pace.rate("q", 150, 3) == 25
    assert pace.rate("q", 10, 4) == 0  # the streams were deleted and made again
    assert pace.rate("other", 10, 4) is None


@pytest.mark.parametrize(
    "words",
    [
        ["queues", "bad name"],
        ["queues", "q:high"],
        ["queues", "--queue", "a}:x{b"],
        ["pending", "bad name"],
        ["pending", "show", "x", "--queue", "bad name"],
        ["pending", "drop", "--all", "--yes", "--queue", ""],
        ["delayed", "run", "--all", "--yes", "--queue", "bad name"],
        ["dead", "list", "bad name"],
        ["workers", "bad name"],
        ["enqueue", "k", "--queue", "bad name"],
        ["pending", "--min-idle", "inf"],
        ["pending", "--min-idle", "1e30"],
        ["pending", "--worker", "\udcff"],
    ],
)
def test_words_that_mean_nothing(bare, words):
    bare.env["REDIS_URL"] = "redis://127.0.0.1:1/0"  # nobody is asked
    done = bare(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "(unexpected" not in done.sentence


@pytest.mark.parametrize("words", [["pending"], ["pending", "--json"], ["queues", "--json"], ["queues"]])
def test_listings_end_quietly_when_nobody_reads(sw, raw, words):
    raw.xgroup_create("stream:{q}", "workers", "0", mkstream=True)
    with raw.pipeline(transaction=False) as pipe:
        for index in range(300):  # ours is a buffer of 8 KiB
            pipe.xadd("stream:{q}", {"job": json.dumps({"id": f"{index:0100}", "kind": "k", "payload": {}})})
        pipe.xreadgroup("workers", "w", {"stream:{q}": ">"}, count=300)
        pipe.execute()
    reading, writing = os.pipe()
    os.close(reading)
    limit = ["--limit", "100000"] if words == ["pending"] else []
    with os.fdopen(writing, "w") as nobody:
        command = sw.piped(*words, *limit, stdout=nobody)
    assert command.stderr.read() == ""
    assert command.wait(30) == 0


@both_modes
@pytest.mark.parametrize("ahead", [3600, pytest.param(-3600, marks=pytest.mark.all)])
def test_ages_are_by_the_servers_clock(sw, raw, doomed, ground, monkeypatch, ahead):
    """The clock of the machine where the command runs is an hour wrong."""
    worker = sw.worker("--queues", "notes")
    doomed("x")
    raw.zadd("stream:{q}:due", {"normal/later/0": (time.time() + 600) * 1000})
    raw.hset("stream:{q}:bodies", "normal/later/0", '{"id": "later", "payload": {}}')
    ground.push(json.dumps({"id": "old", "created_at": datetime.now(UTC).isoformat(), "payload": {}}), queue="q")
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + ahead)
    assert 500 < sw.ok("delayed", "--json").rows[0]["due_in_s"] <= 600
    assert 0 <= sw.ok("dead", "--json").rows[0]["age_s"] < 60
    assert 0 <= sw.ok("dead", "show", "--json", sw.ok("dead", "--json").rows[0]["entry_id"]).rows[0]["age_s"] < 60
    assert 0 <= sw.ok("workers", "notes", "--json").rows[0]["uptime_s"] < 60
    assert 0 <= sw.ok("queues", "q", "--json").rows[0]["oldest_age_s"] < 60
    sw.ok("queues", "pause", "q")
    note = raw.hget("stream:{q}:meta", "paused").decode()
    assert abs(datetime.fromisoformat(note.split()[-1]).timestamp() - true()) < 60, note
    assert worker.stop() == 0


def test_a_server_that_refuses_writes_is_said_beside_the_workers(sw, raw, held):
    held(1)
    with out_of_memory(raw):
        eventually_blocking(lambda: "refuses writes (OOM)" in sw.ok("workers").stderr, 20)
        terminal = Terminal(sw, "queues", "--watch", "--interval", "0.2")
        terminal.until("refuses writes (OOM)")
        terminal.type("q")
        assert terminal.wait() == 0
    assert sw.ok("workers").stderr == ""


@both_modes
def test_a_queue_that_is_not_there_is_no_row_of_zeros(sw, ground):
    ground.push("{}", queue="mails")
    done = sw("queues", "mailz", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.sentence == "there is no queue mailz: did you mean mails?"
    assert sw("queues", "list", "nope").sentence.startswith("there is no queue nope: its first job makes it")
    sw.ok("queues", "pause", "early")
    assert sw.ok("queues", "early", "--json").rows[0]["paused"] is True


def test_what_a_terminal_cannot_show_is_spelled_out(sw, raw, doomed):
    doomed("\u4ed8 \xe9")
    for encoding, shown in (("latin-1", b"\\u4ed8 \xe9"), ("ascii", b"\\u4ed8 \\xe9")):
        done = subprocess.run(
            sw.command("dead"), cwd=sw.directory, env={**sw.env, "PYTHONIOENCODING": encoding}, capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert shown in done.stdout


def test_watch_on_a_terminal_that_cannot_be_redrawn(sw, raw):
    """TERM=dumb: the shell of an editor, the console of a CI."""
    sw.ok("enqueue", "x", "--queue", "lonely")
    sw.env["TERM"] = "dumb"
    terminal = Terminal(sw, "queues", "--watch", "--interval", "0.2")
    terminal.until("cannot be redrawn")
    for _ in range(2):
        terminal.until("no worker serves it")
        terminal.text = ""
    terminal.type("q")
    assert terminal.wait() == 0
    assert "\x1b" not in terminal.text
