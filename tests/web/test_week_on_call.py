"""The runbook's tasks of a week on call, each from cold: on the command line, and in Chromium."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver
from tests.cli.conftest import Running, bare, ground, project, sw
from tests.conftest import eventually_blocking
from tests.web import test_runbook
from tests.web.chromium import Chromium, program
from tests.web.conftest import LOOKS
from tests.web.test_browser import Served

__all__ = ["bare", "ground", "project", "sw"]

pytestmark = pytest.mark.timeout(180)

BY = [
    "command line",
    pytest.param(
        "web",
        marks=[
            pytest.mark.all,
            pytest.mark.skipif(program() is None, reason="needs Chromium: apt-get install chromium"),
        ],
    ),
]


@pytest.fixture
def page(request: pytest.FixtureRequest, by: str, sw: Any, raw: Any, chromium: Chromium | None) -> Iterator[Any]:
    """The dashboard of the project's app in a browser; nothing on the command line."""
    if by == "command line" or chromium is None:
        yield None
        return
    env = {**os.environ, **sw.env, "STREAMWORKER_APP": "jobs:app"}
    running = Running(
        forkserver.forked(["dashboard", "--listen", "127.0.0.1:0"], cwd=sw.directory, env=env, constants=LOOKS)
    )
    eventually_blocking(lambda: running.saw("dashboard_ready"), 30)
    url = next(json.loads(line)["url"] for line in running.lines if "dashboard_ready" in line).rstrip("/")
    chromium.size(1280, 800)
    chromium.complaints.clear()
    yield Served(url, chromium, raw)
    complaints = list(chromium.complaints)
    running.signal(signal.SIGTERM)
    assert running.wait(15) == 0
    chromium.leave()
    running.process.stderr.close()
    assert complaints == []


def said(page: Any, words: str) -> None:
    """Wait for what the dashboard answers."""
    page.page.until(f"[...document.querySelectorAll('.toast')].some((toast) => toast.innerText.includes({words!r}))")


@pytest.mark.parametrize("by", BY)
def test_a_schedule_that_does_not_tick(sw, ground, raw, by, page):
    """Paused by a colleague; its run of tonight is missing."""
    app = {"STREAMWORKER_APP": "jobs:app"}
    added = sw.ok("cron", "add", "nightly", "0 3 * * *", "note.write", '{"text": "night"}', **app).stdout
    assert "ticks next at" in added
    wrong = sw("cron", "add", "other", "@daily", "note.write", '{"text": 5}', **app)
    assert (wrong.returncode, "the payload is no Note" in wrong.sentence) == (1, True)
    sw.ok("cron", "pause", "nightly")
    if by == "web":
        page.open("/cron")
        assert "paused" in page.page.value("document.querySelector('tbody').innerText")
        page.page.click("[data-do=schedule-resume]")
        said(page, "nightly ticks again")
        page.page.until("!!document.querySelector('[data-do=schedule-pause]')")
        page.page.click("[data-do=schedule-run]")
        said(page, "is enqueued")
        page.page.value("document.querySelector('#edit-schedule [name=expression]').value = '30 4 * * *'")
        page.page.click("[data-do=schedule-edit]")
        said(page, "nightly is changed")
    else:
        (row,) = sw.ok("cron", "--json", **app).rows
        assert (row["owner"], bool(row["paused"]), row["next"], row["known"]) == ("data", True, [], True)
        assert "nightly resumed" in sw.ok("cron", "resume", "nightly").stdout
        sw.ok("cron", "run", "nightly")
        sw.ok("cron", "edit", "nightly", "--expression", "30 4 * * *")
    eventually_blocking(lambda: ground.ready(queue="notes") == 1, 10)
    (row,) = sw.ok("cron", "--json").rows
    assert (row["expression"], row["paused"], len(row["next"])) == ("30 4 * * *", "", 3)
    if by == "web":
        page.page.click("[data-do=schedule-remove]")
        page.yes()
        said(page, "nightly is removed")
    else:
        sw.ok("cron", "remove", "nightly")
    assert raw.zcard("stream:{notes}:schedules") == 0


@pytest.mark.parametrize("by", ["command line"])
def test_check_names_schedules_that_nothing_can_run(sw, by):
    sw.ok("cron", "add", "odd", "@daily", "strange", "{}", "--queue", "notes", STREAMWORKER_APP="jobs:app")
    (row,) = sw.ok("cron", "--json", STREAMWORKER_APP="jobs:app").rows
    assert row["known"] is False
    found = sw("check", "jobs:app", "--json").rows
    assert any(each["subject"] == "schedules" and "odd (strange)" in each["sentence"] for each in found)
    assert sw("cron", "pause", "nothing").sentence == "there is no schedule 'nothing' kept as data"


def died(raw: Any, count: int, error: str, queue: str = "notes", kind: str = "note.write") -> None:
    pipe = raw.pipeline(transaction=False)
    for n in range(count):
        trace = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\n' + error.replace("#", str(1000 + n))
        job = json.dumps({"id": f"{kind}-{n}", "kind": kind, "payload": {"text": "x"}})
        pipe.xadd(f"stream:{{{queue}}}:dead", {"job": job, "id": f"{kind}-{n}", "kind": kind, "level": "normal",
                                               "reason": "raised", "error": trace, "attempts": "3"})  # fmt: skip
    pipe.execute()


@pytest.mark.parametrize("by", BY)
async def test_which_error_is_new(sw, ground, raw, by, page):
    """An old one with many letters, and a new one with three: replay the new one's, mute the old one."""
    died(raw, 120, "KeyError: 'customer #'")
    died(raw, 3, "shop.errors.PrinterOnFire: printer # at 10.0.0.7:9100 burns")
    if by == "web":
        page.open("/")
        page.page.until("document.querySelector('.notices')?.innerText.includes('a new error')")
        page.open("/groups")
        text = page.page.value("document.querySelector('tbody').innerText")
        assert "PrinterOnFire: printer <n> at <n> burns" in text
        assert "120" in text
        page.page.click("tbody tr:has(a[title*=Printer]) [data-what=replay]")
        page.yes()
        eventually_blocking(lambda: ground.ready(queue="notes") == 3, 15)
        page.open("/groups")
        page.page.until("!document.querySelector('tbody a[title*=Printer]')")  # the row goes with the last replay
        page.page.click("[data-do=mute]")
        said(page, "is muted")
        page.page.until("!!document.querySelector('[data-do=unmute]')")
        page.page.click("[data-what=erase]")
        page.yes()
        eventually_blocking(lambda: raw.xlen("stream:{notes}:dead") == 0, 15)
    else:
        new, old = sorted(sw.ok("dead", "groups", "--json").rows, key=lambda row: row["count"])
        assert (new["count"], new["kind"], old["count"]) == (3, "note.write", 120)
        assert new["error"].startswith("shop.errors.PrinterOnFire: printer <n> at <n> burns")
        assert old["error"] == "KeyError: <text>"
        assert "PrinterOnFire: printer 1002" in new["traceback"]
        assert new["first_seen"] <= new["last_seen"]
        assert len(sw.ok("dead", "list", "--group", new["group"], "--json").rows) == 3
        assert "retried 3" in sw.ok("dead", "retry", "--group", new["group"], "--yes").stdout
        assert "is muted" in sw.ok("dead", "mute", old["group"]).stdout
        (row,) = sw.ok("dead", "groups", "--json").rows
        assert row["muted"].startswith("by ")
        sw.ok("dead", "unmute", old["group"])
        sw.ok("dead", "drop", "--group", old["group"], "--yes")
        assert sw("dead", "mute", "nothing").returncode == 2
    assert (ground.ready(queue="notes"), raw.xlen("stream:{notes}:dead")) == (3, 0)


@pytest.mark.parametrize("by", BY)
async def test_a_wrong_payload_in_a_thousand_delayed_jobs(sw, ground, raw, by, page):
    pipe = raw.pipeline(transaction=False)
    for n in range(1000):
        body = json.dumps(
            {"id": f"n{n}", "kind": "note.write", "payload": {"text": "wrong", "times": n + 1}, "mine": n}
        )
        pipe.zadd("stream:{notes}:due", {f"normal/n{n}/0": (time.time() + 3600) * 1000 + n})
        pipe.hset("stream:{notes}:bodies", f"normal/n{n}/0", body)
    pipe.execute()
    if by == "web":
        page.open("/delayed?queue=notes&kind=note.write")
        page.page.value("document.querySelector('#change-jobs [name=set]').value = '{\"text\": 5}'")
        page.page.click("[data-what=change]")
        page.yes()
        page.page.until("document.querySelector('.campaign')?.innerText.includes('refused')")  # no note has such a text
        page.page.until("document.querySelector('.campaign')?.innerText.includes('done')")
        page.open("/delayed?queue=notes&kind=note.write")
        page.page.value("document.querySelector('#change-jobs [name=set]').value = '{\"text\": \"right\"}'")
        page.page.click("[data-what=change]")
        page.page.until("document.querySelector('#confirm').open")
        page.page.value("document.querySelector('#confirm [name=rate]').value = 100000")
        page.yes()
        eventually_blocking(lambda: right(raw) == 1000, 30)
    else:
        words = ("delayed", "change", "--queue", "notes", "--kind", "note.write", "--app", "jobs:app")
        refused = sw(*words, "--set", '{"text": 5}', "--yes", "--limit", "2")
        assert (refused.returncode, "the payload is no Note" in refused.stderr) == (1, True)
        sentence = sw(*words[:-2], "--set", '{"text": "right"}', "--yes", "--limit", "1").stderr
        assert "name the app" in sentence
        assert "changed 1000 delayed jobs" in sw.ok(*words, "--set", '{"text": "right"}', "--yes").stdout
    assert right(raw) == 1000
    documents = [json.loads(body) for body in raw.hvals("stream:{notes}:bodies")]
    assert sorted(each["payload"]["times"] for each in documents) == list(range(1, 1001))
    assert all(each["payload"]["times"] == each["mine"] + 1 for each in documents)  # and nothing else changed
    assert raw.zcard("stream:{notes}:due") == 1000


def right(raw: Any) -> int:
    return sum(b'"right"' in body for body in raw.hvals("stream:{notes}:bodies"))


RUNAWAY = """
import os, re, time
from pathlib import Path
from streamworker import App, Payload

class Report(Payload, kind="report", queue="reports"):
    how: str

class Note(Payload, kind="note.write", queue="notes"):
    text: str
    how: str = "computing"

class Leak(Payload, kind="leak", queue="leaks"):
    n: int

app = App()
held = []

def note(line):
    with open("ran", "a") as file:
        file.write(f"{line} {os.getpid()}\\n")

def for_ever(how):
    if how == "asleep":
        time.sleep(1000)
    re.match(r"(a+)+$", "a" * 60 + "b")  # in C

@app.handler(process=True, timeout=None)
def report(payload: Report) -> None:
    note("report")
    for_ever(payload.how)

@app.handler
async def write(payload: Note) -> None:
    note(payload.text)
    while payload.text == "for ever":
        if payload.how == "asleep":
            time.sleep(1000)

@app.handler(timeout=None)
def leak(payload: Leak) -> None:
    held.append(b"x" * (1 << 20))
    note(f"leak-{payload.n}")
"""


@pytest.fixture
def ran(sw: Any, project: Path) -> Any:
    """(word, pid) of every run so far, in an app with jobs that run away and leak."""
    (project / "runaway.py").write_text(RUNAWAY)
    sw.env["STREAMWORKER_APP"] = "runaway:app"
    path = project / "ran"
    return lambda: [tuple(line.rsplit(" ", 1)) for line in path.read_text().splitlines()] if path.exists() else []


HOW = {"command line": "computing", "web": "asleep"}
"""What a job does that never ends: where nothing differs but how operators see it, the processor is left alone."""


def words(ran: Any) -> list[str]:
    return [word for word, _ in ran()]


def living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("by", BY)
def test_a_runaway_cpu_job(ran, sw, ground, raw, by, page):
    """It computes for ever in C, in a process of its own: found, ended, not run again; its neighbours notice nothing."""
    worker = sw.start("worker", "--queues", "reports,notes", "--lease", "2")
    eventually_blocking(lambda: worker.saw("worker_ready"), 30)
    ground.push(json.dumps({"id": "r1", "kind": "report", "payload": {"how": HOW[by]}}), queue="reports")
    eventually_blocking(lambda: "report" in words(ran), 30)
    ((_, pid),) = ran()
    assert living(int(pid))
    for n in range(20):
        ground.push(json.dumps({"id": f"n{n}", "kind": "note.write", "payload": {"text": f"n{n}"}}), queue="notes")
    if by == "web":
        page.open("/workers")
        page.page.until("document.querySelector('tbody').innerText.includes('report')")
        page.page.click("tbody a[href*=worker]")
        page.page.until("document.body.innerText.includes('The longest run: report r1')")
        page.page.click("a.id[href*=pending]")
        page.page.click("[data-do=cancel]")
        page.yes()
        said(page, "r1 is told to end")
    else:

        def longest() -> Any:
            return [row["longest"] for row in sw.ok("workers", "--json").rows if row["longest"]]

        (found,) = eventually_blocking(longest, 20, interval=0.1)
        assert (found["job_id"], found["kind"], found["queue"]) == ("r1", "report", "reports")
        assert found["running_s"] >= 1
        assert not found["blocks"]
        sw.ok("jobs", "cancel", found["job_id"], "--queue", found["queue"], "--yes")
    eventually_blocking(lambda: not living(int(pid)), 10)
    eventually_blocking(lambda: ground.empty("reports") and ground.empty("notes"), 20)
    assert sorted(words(ran)) == sorted(["report", *(f"n{n}" for n in range(20))])
    assert raw.xlen("stream:{reports}:dead") == 0
    assert worker.stop() == 0
    assert "lease_lost" not in worker.text


@pytest.mark.parametrize("by", BY)
def test_a_job_that_blocks_the_event_loop_for_ever(ran, sw, ground, raw, by, page):
    """The overview names it. It is buried and its worker killed; what else that held runs elsewhere, once."""
    first = sw.start("worker", "--queues", "notes", "--lease", "1")
    eventually_blocking(lambda: first.saw("worker_ready"), 30)
    bad = {"id": "bad", "kind": "note.write", "payload": {"text": "for ever", "how": HOW[by]}}
    ground.push(json.dumps(bad), queue="notes")
    eventually_blocking(lambda: words(ran) == ["for ever"], 30)
    second = sw.start("worker", "--queues", "notes", "--lease", "1")
    ground.push(json.dumps({"id": "good", "kind": "note.write", "payload": {"text": "good"}}), queue="notes")
    sentence = "the job bad (note.write) blocks its event loop"
    if by == "web":
        page.open("/")
        page.page.until(f"document.querySelector('.notices')?.innerText.includes({sentence!r})")
        page.open("/pending?queue=notes")
        page.page.click("a.id[href*=pending]")
        page.page.click("[data-do=bury]")
        page.page.until("document.querySelector('#confirm').open")
        page.page.value("document.querySelector('#confirm [name=force]').checked = true")
        page.page.click("#confirm-yes")
    else:
        rows = eventually_blocking(
            lambda: [row for row in sw.ok("workers", "--json").rows if (row["longest"] or {}).get("blocks")],
            20, interval=0.1,
        )  # fmt: skip
        assert rows[0]["longest"]["job_id"] == "bad"
        assert rows[0]["pid"] == first.process.pid
        refused = sw("pending", "bury", "bad", "--yes")
        assert "--force" in refused.stderr
        sw.ok("pending", "bury", "bad", "--force", "--reason", "computes for ever", "--yes")
    eventually_blocking(lambda: raw.xlen("stream:{notes}:dead") == 1, 10)
    first.kill()
    eventually_blocking(lambda: ground.empty("notes"), 20)
    assert sorted(words(ran)) == ["for ever", "good"]
    assert second.stop() == 0


@pytest.mark.all
@pytest.mark.parametrize("by", ["command line and web"])
def test_a_leaking_worker(ran, sw, ground, raw, by, page):
    """A megabyte a job: seen as memory of the worker; with --max-rss it is replaced, nothing is lost or run twice."""

    def memory() -> list[int]:
        return [row["rss_bytes"] >> 20 for row in sw.ok("workers", "--json").rows if row["alive"] and row["rss_bytes"]]

    def push(*numbers: int) -> None:
        for n in numbers:
            body = json.dumps({"id": f"l{n}", "kind": "leak", "payload": {"n": n}})
            ground.push(body, queue="leaks")

    def shown(comparison: str) -> None:
        """The page says so too, where there is a browser; the others that need one are skipped, and say so."""
        if page is not None:
            page.open("/workers")
            megabytes = "parseFloat([...document.querySelectorAll('tbody td')].map((cell) => cell.innerText).find((text) => / MB$/.test(text)))"
            page.page.until(f"{megabytes} {comparison}")

    flags = ("--queues", "leaks", "--concurrency", "2", "--lease", "1")
    worker = sw.fresh(sys.executable, "-m", "streamworker", "worker", *flags)
    eventually_blocking(lambda: worker.saw("worker_ready"), 30)
    push(*range(150))
    eventually_blocking(lambda: len(words(ran)) == 150 and max(memory(), default=0) > 180, 30, interval=0.1)
    shown("> 180")
    assert worker.stop() == 0
    supervisor = sw.fresh(sys.executable, "-m", "streamworker", "worker", *flags, "--max-rss", "130")
    eventually_blocking(lambda: supervisor.saw("worker_ready"), 30)
    push(*range(150, 250))
    eventually_blocking(lambda: supervisor.saw("worker_replaced"), 30)
    push(*range(250, 350))
    eventually_blocking(lambda: len(words(ran)) >= 350 and ground.empty("leaks"), 60, interval=0.05)
    eventually_blocking(lambda: 0 < max(memory(), default=0) < 180, 20, interval=0.1)
    shown("< 180")
    assert sorted(words(ran)) == sorted(f"leak-{n}" for n in range(350))
    assert len({pid for _, pid in ran()}) >= 3
    assert supervisor.stop() == 0


TASKS = {
    "Which job blocks a queue, and who runs it?": "test_find_the_job_that_blocks_a_queue_and_who_runs_it",
    "Free a dead worker's jobs now": "test_free_a_dead_workers_jobs_now",
    "Why did a job fail? Fix it, replay it": "test_see_why_a_job_failed_fix_it_and_replay_it",
    "Replay 10,000 dead letters without a flood": "test_replay_dead_letters_at_a_rate",
    "Pause a queue": "test_pause_a_queue",
    "Everything that happened to one job": "test_where_a_job_id_lies",
    "Empty a queue": "test_empty_a_queue",
    "Which error is new?": "test_which_error_is_new",
    "A job that computes for ever": "test_a_runaway_cpu_job",
    "A worker that leaks memory": "test_a_leaking_worker",
    "A schedule that does not tick": "test_a_schedule_that_does_not_tick",
    "A wrong payload in a thousand delayed jobs": "test_a_wrong_payload_in_a_thousand_delayed_jobs",
}
"""Section of the runbook to the test that solves it: on the command line and in the dashboard."""


def test_every_task_of_the_book_is_solved_by_a_test():
    """The seven of old, and the five of a week on call. Flows have tests of their own: tests/web/test_flows.py."""
    headings = [line[3:] for line in test_runbook.BOOK.read_text().splitlines() if line.startswith("## ")]
    assert [each for each in headings if each not in TASKS] == [
        "Is anything wrong?", "A flow does not go on", "Who did that?", "By keyboard",
    ]  # fmt: skip
    assert len(TASKS) == 12
    for heading, name in TASKS.items():
        assert heading in headings
        assert hasattr(test_runbook, name) or name in globals(), name
