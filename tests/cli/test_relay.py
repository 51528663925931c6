"""``streamworker relay`` with no worker anywhere: what is due becomes ready, and the calendar goes on, without PostgreSQL."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import anyio
import pytest

from streamworker import App, Payload, Settings
from tests.cli.conftest import both_modes
from tests.conftest import eventually_blocking


class Flood(Payload, kind="flood", queue="floods", fair_by="tenant"):
    tenant: str


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


@both_modes
def test_schedules_tick_without_a_worker(sw, ground, project):
    (project / "scheduled.py").write_text(SCHEDULED)
    by_name = sw.start("relay", "scheduled:app")
    eventually_blocking(lambda: ground.ready(queue="ticks") >= 1, 30)
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


@both_modes
def test_a_relay_tells_autoscalers_the_load_of_each_queue(sw, ground, raw):
    """What waits in tenants' lines counts, and of a paused queue what runs alone."""
    sw.constants |= {"streamworker.worker.metrics.FRESH": 0.05, "streamworker.worker.metrics.WALK": 0.05}
    relay = sw.start("relay", STREAMWORKER_HTTP="127.0.0.1:0")
    eventually_blocking(lambda: relay.saw("http_listening"))
    address = next(json.loads(line)["address"] for line in relay.lines if "http_listening" in line)

    def load() -> dict[str, int]:
        with urllib.request.urlopen(f"http://{address}/scale", timeout=10) as answer:
            return {name: each["load"] for name, each in json.load(answer)["queues"].items()}

    app = App(settings=Settings(redis_url=sw.env["REDIS_URL"], mode=ground.mode))

    async def fill() -> None:
        async with app:
            await app.enqueue_many([Flood(tenant="large") for _ in range(30)])
            await app.enqueue(Flood(tenant="small"), queue="other")

    anyio.run(fill)
    eventually_blocking(lambda: load() == {"floods": 30, "other": 1}, 30)
    sw.ok("queues", "pause", "floods")
    eventually_blocking(lambda: load() == {"floods": 0, "other": 1}, 30)
    assert relay.stop() == 0


@both_modes
def test_a_relay_tells_how_many_slots_clear_a_queue_in_time(sw, ground, raw):
    """The contract of /scale: slots by what waits and the wait, no fewer than run, none when all is done."""
    sw.constants |= {"streamworker.worker.metrics.FRESH": 0.1, "streamworker.worker.metrics.WALK": 0.1}
    sw.constants["streamworker.worker.scale.CALM"] = 2.0
    relay = sw.start("relay", STREAMWORKER_HTTP="127.0.0.1:0", STREAMWORKER_TARGET_WAIT="30")
    eventually_blocking(lambda: relay.saw("http_listening"))
    address = next(json.loads(line)["address"] for line in relay.lines if "http_listening" in line)

    def told(query: str = "", path: str = "scale") -> Any:
        with urllib.request.urlopen(f"http://{address}/{path}{query}", timeout=10) as answer:
            return answer.read().decode() if path == "metrics" else json.load(answer)["queues"]

    app = App(settings=Settings(redis_url=sw.env["REDIS_URL"], mode=ground.mode))

    async def add(*jobs: Any) -> None:
        async with app:
            await app.enqueue_many(jobs)

    anyio.run(add, *[app.job(Flood(tenant="one"), queue="later", delay=3600)])
    eventually_blocking(lambda: "later" in told(), 30)
    assert told()["later"] == {"load": 0, "slots": 0, "arrivals": 0.0, "run_time": 1.0}
    anyio.run(add, *[app.job(Flood(tenant="one"), queue="later", delay=30)])
    eventually_blocking(lambda: told()["later"]["slots"] == 1, 30)  # it is due soon

    anyio.run(add, *[Flood(tenant=str(n % 3)) for n in range(600)])
    eventually_blocking(lambda: told().get("floods", {"load": 0})["load"] == 600, 30)
    found = told()["floods"]
    assert 20 <= found["slots"] <= 41  # 600 jobs of a guessed second in 30 s, and in half of it when they are late
    eventually_blocking(lambda: told("?wait=600")["floods"]["slots"] <= 3, 30)
    assert told("?wait=1")["floods"]["slots"] >= 600
    lines = told(path="metrics").splitlines()
    assert 'streamworker_queue_load_jobs{queue="floods"} 600' in lines
    assert any(line.startswith('streamworker_queue_wanted_slots{queue="floods"} ') for line in lines)
    for wrong in ("?wait=0", "?wait=soon"):
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            told(wrong)
        assert b"wait" in refused.value.read()

    sw.ok("queues", "purge", "floods", "--ready", "--yes")
    eventually_blocking(lambda: told()["floods"] == {**told()["floods"], "load": 0, "slots": 0}, 30)
    assert relay.stop() == 0


@both_modes
def test_a_running_job_keeps_a_slot_and_run_times_are_learned(sw, ground, held):
    """What a worker runs is never below the answer, even in a paused queue; jobs that ended tell their run time."""
    sw.constants |= {"streamworker.worker.metrics.FRESH": 0.1, "streamworker.worker.metrics.WALK": 0.1}
    sw.constants["streamworker.worker.scale.CALM"] = 0.5
    relay = sw.start("relay", STREAMWORKER_HTTP="127.0.0.1:0")
    eventually_blocking(lambda: relay.saw("http_listening"))
    address = next(json.loads(line)["address"] for line in relay.lines if "http_listening" in line)

    def told(queue: str) -> Any:
        with urllib.request.urlopen(f"http://{address}/scale", timeout=10) as answer:
            return json.load(answer)["queues"].get(queue, {"load": 0})

    worker = held(3)
    sw.ok("queues", "pause", "holds")
    eventually_blocking(lambda: (told("holds")["load"], told("holds")["slots"]) == (3, 3), 30)
    sw.ok("enqueue", "note.write", "--queue", "notes", '{"text": "x"}', "--count", "200")
    eventually_blocking(lambda: told("notes")["load"] == 200, 30)
    sw.ok("worker", "jobs:app", "--burst", "--queues", "notes")
    eventually_blocking(lambda: told("notes").get("run_time", 1.0) < 0.9, 30)  # less than the guess
    worker.kill()
    assert relay.stop() == 0


def test_an_app_that_is_named_and_not_there_is_not_passed_over(bare, redis_url):
    """A relay that started without the schedules would lose their ticks in silence."""
    bare.env["REDIS_URL"] = redis_url
    done = bare("relay", "nothing:app")
    assert done.returncode == 78
    assert "There is no module 'nothing'" in done.sentence
