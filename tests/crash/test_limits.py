"""Workers die while they hold places of a limit: the cap holds, the places come back, everybody has a turn."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.crash.app import LIMIT, Limited
from tests.crash.ground import PARTITIONS
from tests.crash.history import read
from tests.crash.rig import Rig, fine

pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(150),
    pytest.mark.skipif(PARTITIONS > 1, reason="limits hold for each partition"),
]


def at_once(rig: Rig) -> int:
    """Most runs that were under way at the same time; a killed worker's end with it."""
    killed = {line["worker"]: line["ended"] for line in read(rig.directory / "faults") if line["what"] == "kill"}
    ends: dict[tuple[Any, ...], float] = {}
    begins: dict[tuple[Any, ...], float] = {}
    for line in read(rig.directory / "runs"):
        key = (line["place"], line["entry"], line["worker"], line["count"])
        (begins if line["what"] == "started" else ends)[key] = line["mono"]
    steps = []
    for key, begun in begins.items():
        ended = ends.get(key, killed.get(key[2].rpartition("-")[0], float("inf")))
        steps += [(begun, 1), (ended, -1)]
    most = now = 0
    for _, step in sorted(steps):
        now += step
        most = max(most, now)
    return most


async def test_the_cap_holds_while_its_holders_are_killed(tmp_path):
    async with Rig(tmp_path, seed=31, MAX_DELIVERIES=20) as rig:
        for _ in range(3):
            await rig.fleet.start()
        await rig.all_ready()
        jobs = await rig.put(*(Limited(seconds=rig.random.uniform(0.02, 0.2)) for _ in range(60)))
        for _ in range(5):
            rig.kill(await rig.until(rig.holder, 60, "a worker that runs something"))
            await rig.fleet.start()
            await asyncio.sleep(rig.random.uniform(0.2, 0.6))
        fine(await rig.finish(timeout=120), rig.seed)
        assert at_once(rig) == LIMIT
        assert all(rig.runs_of(job) for job in jobs)


async def test_what_a_dead_worker_held_lapses_with_its_lease(tmp_path):
    """All places are held by one that dies; nobody tells the others, who wait for a turn."""
    async with Rig(tmp_path, seed=32, lease=2.0) as rig:
        victim = await rig.fleet.start()
        held = await rig.put(*(Limited(gate="g") for _ in range(LIMIT)))
        await rig.until(lambda: all(rig.runs_of(job) for job in held), 30, "the victim holds all places")
        await rig.fleet.start()
        waiting = await rig.put(*(Limited() for _ in range(2 * LIMIT)))
        await rig.until(lambda: rig.raw.zcard("stream:{q}:due") == len(waiting), 30, "the others wait")
        assert not any(rig.runs_of(job) for job in waiting)
        rig.kill(victim)
        killed = [line["ended"] for line in read(tmp_path / "faults")][-1]
        rig.open_gate("g")
        await rig.until(lambda: all(rig.runs_of(job) for job in [*held, *waiting]), 60, "everybody had a turn")
        first = min(rig.runs(job)[0]["mono"] for job in waiting)
        assert first - killed < 4 * rig.lease  # one lease and a second, on a quiet machine
        print(f"limits: the first one that waited ran {first - killed:.2f} s after the kill, lease {rig.lease} s")
        fine(await rig.finish(timeout=60), rig.seed)
