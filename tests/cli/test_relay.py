"""``streamworker relay`` with no worker anywhere: what is due becomes ready, and the calendar goes on, without PostgreSQL."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import both_modes
from tests.conftest import eventually_blocking

SCHEDULED = """
from streamworker import App, Payload

class Tick(Payload, kind="tick", queue="ticks"):
    pass

app = App()
app.cron("* * * * * *", Tick(), name="each second")

@app.handler
async def tick(payload: Tick) -> None:
    pass
"""


@both_modes
def test_delayed_jobs_become_ready_without_a_ledger_and_without_an_app(sw, ground):
    sw.constants["streamworker.worker.relay_process.NEW_QUEUES"] = 0.2
    relay = sw.start("relay")
    sw.ok("enqueue", "note.write", '{"text": "x"}', "--queue", "notes", "--delay", "0.5", STREAMWORKER_APP="jobs:app")
    eventually_blocking(lambda: ground.ready(queue="notes") == 1, 30)
    assert relay.stop() == 0
    assert relay.saw("relay_stopped")


@pytest.mark.parametrize("ground", ["stream", pytest.param("list", marks=pytest.mark.all)], indirect=True)
def test_schedules_tick_without_a_worker(sw, ground, project):
    (project / "scheduled.py").write_text(SCHEDULED)
    by_name = sw.start("relay", "scheduled:app")
    eventually_blocking(lambda: ground.ready(queue="ticks") >= 2, 30)
    other = sw.start(
        "relay", STREAMWORKER_APP="scheduled:app", STREAMWORKER_LEDGER="off", DATABASE_URL="postgresql://x/y"
    )
    eventually_blocking(lambda: other.saw("relay_ready"))
    before = ground.ready(queue="ticks")
    eventually_blocking(lambda: ground.ready(queue="ticks") >= before + 2, 30)
    assert (by_name.stop(), other.stop()) == (0, 0)
    ticks = [json.loads(body)["headers"]["tick"] for body in ground.waiting(queue="ticks")]
    assert len(set(ticks)) == len(ticks)  # two of them propose, and each tick comes once
    worker = sw.start("worker", "scheduled:app", "--queues", "ticks")
    eventually_blocking(lambda: ground.ready(queue="ticks") == 0, 30)
    assert worker.stop() == 0


def test_an_app_that_is_named_and_not_there_is_not_passed_over(bare, redis_url):
    """A relay that started without the schedules would lose their ticks in silence."""
    bare.env["REDIS_URL"] = redis_url
    done = bare("relay", "nothing:app")
    assert done.returncode == 78
    assert "There is no module 'nothing'" in done.sentence
