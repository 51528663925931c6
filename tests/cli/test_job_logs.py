"""``streamworker jobs logs``: what a job's handler logged, as people and programs read it."""

from __future__ import annotations

import json

from tests.cli.conftest import document

JOBS = """
import logging
from streamworker import App, Backoff, Context, Payload, Retry

class Talk(Payload, kind="talk", queue="q"):
    n: int = 0

app = App()

@app.handler(backoff=Backoff(base=0.01))
def talk(payload: Talk, ctx: Context) -> None:
    ctx.log.info("\\x1b[31mred", url="redis://u:hunter2@h/0")
    logging.getLogger("lib").info("by a library")
    if ctx.attempt == 1:
        raise Retry(after=0.01)
"""


def test_logs_are_printed_run_by_run_and_followed_to_the_end(sw, ground):
    (sw.directory / "talk.py").write_text(JOBS)
    body = document("talk")
    job_id = json.loads(body)["id"]
    none = sw.ok("jobs", "logs", job_id, "--queue", "q")
    assert none.stdout == ""
    assert "STREAMWORKER_JOB_LOG" in none.stderr
    following = sw.piped("jobs", "logs", job_id, "--queue", "q", "--follow")
    ground.push(body, queue="q")
    sw.env["STREAMWORKER_JOB_LOG"] = "all"
    worker = sw.start("worker", "talk:app")
    assert following.wait(30) == 0
    printed = sw.ok("jobs", "logs", job_id, "--queue", "q")
    lines = printed.stdout.splitlines()
    assert [line[24:] for line in lines] == [
        "info     \\x1b[31mred url=redis://u:***@h/0", "info     by a library logger_name=lib",
    ] * 2  # fmt: skip
    assert following.stdout.read() == printed.stdout
    assert "attempt 1, hop 0, delivery 1" in printed.stderr
    assert "attempt 2, hop 1, delivery 1" in printed.stderr
    rows = sw.ok("jobs", "logs", job_id, "--queue", "q", "--json").rows
    assert [(row["attempt"], row["level"]) for row in rows] == [(1, "info"), (1, "info"), (2, "info"), (2, "info")]
    assert worker.stop() == 0
