"""docs/runbook.md, section by section, on the command line and in the dashboard."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tests.cli.conftest import bare, doomed, ground, held, project, sw
from tests.conftest import eventually, eventually_blocking
from tests.web.conftest import letter

__all__ = ["bare", "doomed", "ground", "held", "project", "sw"]

BOOK = Path(__file__).parents[2] / "docs" / "runbook.md"


def test_every_command_of_the_book_exists(bare):
    """Its flags too: each is asked for its help, or refused for want of a server and not for its words."""
    text = BOOK.read_text()
    lines = [
        line.partition("#")[0]
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    commands = {part.strip() for line in lines for part in re.split(r"[;|]", line) if "streamworker" in part}
    assert len(commands) > 15
    asked = [shlex.split(command)[1:] for command in sorted(commands)]
    # All in one process: starting Python for each takes longer than everything else.
    script = "import json, sys; from streamworker.cli import main; print(json.dumps([main(w) for w in json.load(sys.stdin)]))"
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(asked), capture_output=True, text=True, cwd=bare.directory,
        env={**bare.env, "REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://127.0.0.1:1/none"},
    )  # fmt: skip
    codes = dict(zip(map(" ".join, asked), json.loads(done.stdout.splitlines()[-1]), strict=True))
    assert codes == dict.fromkeys(codes, 69), done.stderr


async def test_find_the_job_that_blocks_a_queue_and_who_runs_it(sw, held, raw, browser):
    worker = held(1)
    (row,) = sw.ok("pending", "holds", "--json").rows
    assert (row["worker_id"], row["alive"], row["kind"]) == (worker.worker_id, True, "hold")
    assert row["job_id"] in sw.ok("pending", "show", row["job_id"]).stdout

    page = await browser.text("/pending?queue=holds")
    assert row["job_id"][:8] in page
    assert f"/workers?worker={worker.worker_id}" in page
    assert "hold" in await browser.text(f"/workers?worker={worker.worker_id}")


@pytest.mark.parametrize("by", ["command line", "web"])
async def test_free_a_dead_workers_jobs_now(sw, held, raw, browser, by):
    worker = held(2, "--lease", "60")
    worker.kill()
    raw.delete(f"streamworker:worker:{worker.worker_id}")  # its heartbeat would end by itself
    if by == "web":
        assert "vanished and still holds 2 jobs" in await browser.text("/pending")
        await browser.do("campaign", what="release", worker=worker.worker_id)
        await eventually(lambda: raw.xpending("stream:{holds}", "workers")["pending"] == 0)
    else:
        assert [row["alive"] for row in sw.ok("workers", "--json").rows] == [False]
        sw.ok("pending", "release", "--worker", worker.worker_id, "--yes")
    assert raw.xpending("stream:{holds}", "workers")["pending"] == 0
    assert raw.xlen("stream:{holds}") == 2


@pytest.mark.parametrize("by", ["command line", "web"])
async def test_see_why_a_job_failed_fix_it_and_replay_it(sw, doomed, raw, browser, project, by):
    doomed("the printer is on fire")
    (row,) = sw.ok("dead", "dooms", "--search", "FIRE", "--json").rows
    if by == "web":
        assert row["job_id"][:8] in await browser.text("/dead?search=FIRE")
        page = await browser.text(f"/show?place=dead&queue=dooms&id={row['entry_id']}")
        assert "the printer is on fire" in page
        assert "discarded" in page
    else:
        assert "the printer is on fire" in sw.ok("dead", "show", row["job_id"], "--payload").stdout
    fixed = (project / "jobs.py").read_text().replace("raise Discard(payload.why)", "pass")
    (project / "jobs.py").write_text(fixed)
    if by == "web":
        assert (await browser.do("replay", row=await browser.rows("/dead")))["ok"]
    else:
        sw.ok("dead", "retry", row["job_id"], "--yes")
    sw.ok("worker", "jobs:app", "--burst", "--queues", "dooms")
    assert (raw.xlen("stream:{dooms}"), raw.xlen("stream:{dooms}:dead")) == (0, 0)


def many(raw, count):
    document = json.dumps({"id": "x", "payload": {}})
    for start in range(0, count, 1000):
        pipe = raw.pipeline(transaction=False)
        for n in range(start, min(count, start + 1000)):
            pipe.xadd("stream:{q}:dead", {"job": document, "id": f"j{n}", "kind": "k", "reason": "timed out"})
        pipe.execute()


def pace(raw):
    """(jobs, the most that were replayed in any second of the server's clock)."""
    at = [int(entry.split(b"-")[0]) for entry, _ in raw.xrange("stream:{q}")]
    return len(at), max(sum(first <= each < first + 1000 for each in at) for first in at[:: max(1, len(at) // 50)])


@pytest.mark.parametrize("by", ["command line", "web"])
async def test_replay_dead_letters_at_a_rate(sw, raw, browser, by):
    """The book's 10,000 at 100/s takes 100 s: `test_replay_ten_thousand` is that."""
    many(raw, 200)
    if by == "web":
        await browser.text("/")
        await browser.do("campaign", what="replay", queue="q", rate="100")
        await eventually(lambda: raw.xlen("stream:{q}") == 200, 30)
    else:
        sw.ok("dead", "retry", "--all", "--queue", "q", "--rate", "100", "--yes", timeout=40)
    count, most = pace(raw)
    assert count == 200
    assert most <= 115  # a late turn is made up for, a tenth of a second at most
    assert raw.xlen("stream:{q}:dead") == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("by", ["command line", "web"])
async def test_replay_ten_thousand(sw, raw, browser, by):
    many(raw, 10_000)
    if by == "web":
        await browser.text("/")
        await browser.do("campaign", what="replay", queue="q", rate="100")
        await eventually(lambda: raw.xlen("stream:{q}") == 10_000, 200)
    else:
        sw.ok("dead", "retry", "--all", "--queue", "q", "--rate", "100", "--yes", timeout=200)
    assert pace(raw)[1] <= 115


@pytest.mark.parametrize("by", ["command line", "web"])
async def test_pause_a_queue(sw, raw, browser, by):
    worker = sw.worker("--queues", "notes")
    if by == "web":
        await browser.do("pause", queue="notes")
    else:
        sw.ok("queues", "pause", "notes")
    # A read that waits may still take a job, until the worker has heard of it.
    eventually_blocking(lambda: raw.info("clients")["blocked_clients"] == 0, 5)
    raw.xadd("stream:{notes}", {"job": json.dumps({"kind": "note.write", "payload": {"text": "x"}})})
    assert sw.ok("queues", "notes", "--json").rows[0]["paused"]
    assert raw.xlen("stream:{notes}") == 1
    for _ in range(100):  # the overview shows the last look, a moment ago
        page = await browser.text("/")
        if "is paused, 1 wait" in page:
            break
        await anyio.sleep(0.1)
    assert "is paused, 1 wait" in page
    if by == "web":
        await browser.do("resume", queue="notes")
    else:
        sw.ok("queues", "resume", "notes")
    eventually_blocking(lambda: raw.xlen("stream:{notes}") == 0, 5)
    assert worker.stop() == 0


async def test_where_a_job_id_lies(sw, raw, browser):
    letter(raw, id="lost-and-found")
    assert "lost-and-found" in sw.ok("dead", "show", "lost-and-found").stdout
    assert "Dead letters" in await browser.text("/jobs?id=lost-and-found")


@pytest.mark.parametrize("by", ["command line", "web"])
async def test_empty_a_queue(sw, raw, browser, by):
    raw.xadd("stream:{q}", {"job": "{}"})
    if by == "web":
        assert (await browser.do("purge", queue="q", place="ready"))["ok"]
    else:
        sw.ok("queues", "purge", "q", "--ready", "--yes")
    assert raw.xlen("stream:{q}") == 0
