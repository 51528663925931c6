"""Shares, expiry and held keys under kills: what decides when a job starts, and whether, survives the workers."""

from __future__ import annotations

import asyncio

import pytest

from tests.crash.app import Fleeting, Gated, Shared, Single
from tests.crash.checker import FOR_EVER
from tests.crash.rig import Rig, fine

pytestmark = [pytest.mark.crash, pytest.mark.timeout(400)]


async def _kill_some(rig: Rig, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(rig.random.uniform(0.1, 0.4))
        if (holder := rig.holder()) is not None:
            rig.kill(holder)
            await rig.fleet.start()


async def test_workers_that_are_killed_keep_to_the_shares(tmp_path):
    """One tenant floods, another one has as much, five have a little."""
    async with Rig(tmp_path, seed=51, MAX_DELIVERIES=20, CONCURRENCY=2) as rig:
        await rig.put(*(Shared("flood", 0.01) for _ in range(300)))
        await rig.put(*(Shared("other", 0.01) for _ in range(150)))
        await rig.put(*(Shared(f"q{number % 5}", 0.01) for number in range(50)))
        for _ in range(3):
            await rig.fleet.start()
        await rig.all_ready()
        await _kill_some(rig, 4)
        verdict = fine(await rig.finish(timeout=60, workers=3), rig.seed)
    assert verdict.done == 500


async def test_what_has_expired_while_workers_die_never_starts(tmp_path):
    async with Rig(tmp_path, seed=52, MAX_DELIVERIES=20, CONCURRENCY=2) as rig:
        for _ in range(2):
            await rig.fleet.start()
        await rig.put(*(Gated("open") for _ in range(4)))
        await rig.until(lambda: rig.running() == 4, 30, "full workers")
        await rig.put(*(Fleeting(0.02) for _ in range(20)), expires_in=0.1)
        await rig.put(*(Fleeting(0.02, fails=1) for _ in range(20)), expires_in=FOR_EVER)
        await asyncio.sleep(0.3)
        rig.open_gate("open")
        await _kill_some(rig, 3)
        verdict = fine(await rig.finish(timeout=40), rig.seed)
    assert verdict.done == 24
    assert verdict.expired == 20


async def test_keys_that_are_held_until_their_jobs_are_done(tmp_path):
    """One of a key at a time, whoever dies, and no key is left behind."""
    async with Rig(tmp_path, seed=53, MAX_DELIVERIES=20) as rig:
        for _ in range(3):
            await rig.fleet.start()
        killing = asyncio.create_task(_kill_some(rig, 5))
        for number in range(60):
            name = f"u{number % 3}"
            await rig.put(
                Single(name, 0.05, fails=int(number % 7 == 0)), key=name, unique="done", replace=number % 4 == 0
            )
            await asyncio.sleep(0.03)
        await killing
        await rig.at_rest(40)
        last = [await rig.put(Single(name), key=name, unique="done") for name in ("u0", "u1", "u2")]
        fine(await rig.finish(timeout=40), rig.seed)
        assert all(rig.runs_of(job) == 1 for (job,) in last), "their keys were free"
