"""A worker dies in the middle of a batch: each of its jobs runs again or is done, none is lost, none is charged."""

from __future__ import annotations

import asyncio

import pytest

from tests.crash.app import Gathered
from tests.crash.history import read
from tests.crash.rig import Rig, fine

pytestmark = [pytest.mark.crash, pytest.mark.timeout(150)]


async def test_killed_halfway(tmp_path):
    """Four of eight have had their effect when it dies; all eight run again, with their attempts as they were."""
    async with Rig(tmp_path, seed=41) as rig:
        victim = await rig.fleet.start()
        await rig.all_ready()
        jobs = await rig.put(*(Gathered(gate="g") for _ in range(8)))
        await rig.until(lambda: rig.done_lines() >= 4, 30, "half of the batch is done")
        rig.kill(victim)
        rig.open_gate("g")
        fine(await rig.finish(), rig.seed)
        for job in jobs:
            runs = rig.runs(job)
            assert {run["attempt"] for run in runs} == {1}
            assert runs[-1]["delivery"] == 2


async def test_killed_at_random_with_failures_among_them(tmp_path):
    async with Rig(tmp_path, seed=42, MAX_DELIVERIES=20) as rig:
        for _ in range(2):
            await rig.fleet.start()
        await rig.all_ready()
        for _ in range(5):
            await rig.put(*(Gathered(seconds=0.02, fails=rig.random.choice((0, 0, 1))) for _ in range(12)))
            rig.kill(await rig.until(rig.amid, 60, "a worker amid its jobs"))
            await rig.fleet.start()
            await asyncio.sleep(rig.random.uniform(0.1, 0.4))
        verdict = fine(await rig.finish(timeout=120), rig.seed)
    assert verdict.duplicates["kill"]
    ended = [line["what"] for line in read(tmp_path / "runs")]
    assert ended.count("ValueError") > 0
