"""LIST_POP=brpop: each death costs at most the job in hand, and nothing runs twice after one. ``CRASH_LONG=1``: 200 deaths."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import pytest

from tests.crash.ground import MODE
from tests.crash.history import read
from tests.crash.rig import Rig

DEATHS, LIMIT = (200, 1200) if os.environ.get("CRASH_LONG") else (15, 400)

pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(LIMIT),
    pytest.mark.skipif(MODE != "list", reason="of list mode: CRASH_MODE=list, as ./dev crash runs it"),
]


async def test_a_death_costs_at_most_the_job_in_hand(tmp_path):
    async with Rig(tmp_path, seed=40, LIST_POP="brpop") as rig:
        for _ in range(4):
            await rig.fleet.start()
        await rig.all_ready()
        stop = asyncio.Event()
        producing = asyncio.create_task(rig.produce(stop, 40, flow=False))  # a death costs keys of jobs, too
        for _ in range(DEATHS):
            await asyncio.sleep(rig.random.uniform(0.1, 0.4))
            ready = await rig.until(lambda: [w for w in rig.fleet.alive if w.said("worker_ready")], 30, "a worker")
            rig.kill(rig.random.choice(ready))
            await rig.fleet.start()
        stop.set()
        await producing
        await wind_down(rig)
        lost, repeated, promised = judge(rig)
    print(f"deaths {DEATHS}, jobs {promised}, lost {len(lost)}, run again without a cause {len(repeated)}")
    assert len(lost) <= DEATHS
    assert not repeated
    assert not rig.unexpected


async def test_a_storm_of_terminations_costs_nothing(tmp_path):
    async with Rig(tmp_path, seed=41, LIST_POP="brpop", GRACE=0.5) as rig:
        for _ in range(3):
            await rig.fleet.start()
        stop = asyncio.Event()
        producing = asyncio.create_task(rig.produce(stop, 40, flow=False))  # a death costs keys of jobs, too
        for _ in range(10):
            await asyncio.sleep(rig.random.uniform(0.0, 0.4))
            rig.terminate(rig.random.choice(rig.fleet.alive))
            await rig.fleet.start()
        stop.set()
        await producing
        await wind_down(rig)
        lost, _, _ = judge(rig)
    assert lost == []
    assert not rig.unexpected


async def wind_down(rig: Rig) -> None:
    """Stop everybody, and wait until the heartbeats of the killed are over.

    The job in hand lies nowhere: whoever stops may put it back, for one who comes after and has the time to finish it.
    """
    while True:
        await rig.all_ready()
        await rig.at_rest(300)
        for worker in list(rig.fleet.alive):
            worker.terminate()
            assert await worker.wait() == 0
        if rig.ground.backlog() == 0:
            break
        await rig.fleet.start(GRACE=60)
    await rig.until(lambda: rig.ground.keys_left() == [], 10 * rig.lease + 20, "nothing being left")


def judge(rig: Rig) -> tuple[list[str], list[str], int]:
    """(lost, run again after a run that ended well or with nobody's word, promised)."""
    promised = [line["job"] for line in read(rig.directory / "enqueued") if line["what"] == "acknowledged"]
    runs = read(rig.directory / "runs")
    finished = Counter(line["job"] for line in runs if line["what"] == "finished")
    dead = set(rig.ground.dead_ids())
    lost = [job for job in promised if not finished[job] and job not in dead]
    # Each hop is a run of its own, asked for by the run before; the same hop twice would be a repetition.
    started = Counter((line["job"], line["hop"]) for line in runs if line["what"] == "started")
    repeated = [f"{job} hop {hop}" for (job, hop), times in started.items() if times > 1]
    return lost, repeated, len(promised)
