"""The runbook's tasks of a week on call, each from cold: on the command line, and in Chromium."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import forkserver
from tests.cli.conftest import Running, bare, ground, project, sw
from tests.conftest import eventually_blocking
from tests.web.chromium import Chromium, program
from tests.web.conftest import LOOKS
from tests.web.test_browser import Served

__all__ = ["bare", "ground", "project", "sw"]

pytestmark = pytest.mark.timeout(180)

BY = [
    "command line",
    pytest.param("web", marks=pytest.mark.skipif(program() is None, reason="needs Chromium: apt-get install chromium")),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium | None]:
    chromium = Chromium() if program() is not None else None
    yield chromium
    if chromium is not None:
        chromium.close()


@pytest.fixture
def page(request: pytest.FixtureRequest, by: str, sw: Any, raw: Any, chromium: Chromium | None) -> Iterator[Any]:
    """The dashboard of the project's app in a browser; nothing on the command line."""
    if by != "web" or chromium is None:
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
    chromium.open(f"{url}/jobs")
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
