"""Order under kills: of the jobs with one order key none overtakes another, none runs beside another, and none is forgotten."""

from __future__ import annotations

import asyncio

import pytest

from tests.crash.app import InLine
from tests.crash.rig import Rig, fine

pytestmark = [pytest.mark.crash, pytest.mark.timeout(400)]


async def test_workers_that_are_killed_keep_the_order_of_each_key(tmp_path):
    async with Rig(tmp_path, seed=31, MAX_DELIVERIES=20) as rig:
        for _ in range(3):
            await rig.fleet.start()
        jobs = [
            InLine(f"k{key}", number, f"t{number % 2}", seconds=0.03, fails=int(number == 3))
            for number in range(12)
            for key in range(6)
        ]
        for start in range(0, len(jobs), 6):
            await rig.put(*jobs[start : start + 6])
        for _ in range(6):
            await asyncio.sleep(rig.random.uniform(0.1, 0.4))
            if (holder := rig.holder()) is not None:
                rig.kill(holder)
                await rig.fleet.start()
        verdict = fine(await rig.finish(timeout=40), rig.seed)
    assert verdict.done == len(jobs)


async def test_a_frozen_worker_and_its_successor(tmp_path):
    async with Rig(tmp_path, seed=32) as rig:
        for _ in range(2):
            await rig.fleet.start()
        await rig.put(*(InLine("k", number, seconds=0.2) for number in range(8)))
        holder = await rig.until(rig.holder, 30, "a worker that runs something")
        await rig.freeze(holder, 3 * rig.lease)
        verdict = fine(await rig.finish(timeout=40), rig.seed)
    assert verdict.done == 8
