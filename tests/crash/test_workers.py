"""Workers are killed, frozen, stopped, blocked and poisoned. Nothing is lost, and no zombie wins."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from streamworker.results import OutputItem
from tests.crash.app import Block, Deaf, Gated, Hungry, Poison, Stuck, Talking, Thread, Work
from tests.crash.failpoints import POINTS
from tests.crash.rig import Rig, fine

LONG = (3.0, 60.0) if os.environ.get("CRASH_LONG") else (1.5, 6.0)
"""Lease and duration of the long jobs, in seconds; CRASH_LONG=1 takes a minute for each kind."""

pytestmark = [pytest.mark.crash, pytest.mark.timeout(400)]


async def test_killed_at_random(tmp_path):
    async with Rig(tmp_path, seed=1, MAX_DELIVERIES=20) as rig:
        for _ in range(3):
            await rig.fleet.start()
        stop = asyncio.Event()
        producing = asyncio.create_task(rig.produce(stop, 60))
        for number in range(20):
            await asyncio.sleep(rig.random.uniform(0.1, 0.5))
            # Half of them while they hold something, however slow this machine is.
            holder = await rig.until(rig.holder, 30, "a worker that runs something") if number % 2 else None
            rig.kill(holder or rig.random.choice(rig.fleet.alive))
            await rig.fleet.start()
        stop.set()
        await producing
        verdict = fine(await rig.finish(), rig.seed)
    assert verdict.duplicates["kill"] and set(verdict.duplicates) == {"kill"} and verdict.recovery


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at(tmp_path, point):
    async with Rig(tmp_path, seed=2, CONCURRENCY=4, GRACE=0.2) as rig:
        at_the_end = point in ("draining", "leaving")
        times = 1 if at_the_end or point == "renewing" else 2
        victim = await rig.fleet.start(at=f"{point}:{times}")
        await rig.put(*(Work(seconds=0.05 * (n % 5)) for n in range(20)))
        if point == "renewing":
            await rig.put(Work(seconds=1))
        if at_the_end:
            long = await rig.put(*(Work(seconds=2) for _ in range(4)), priority="high")
            await rig.until(lambda: any(map(rig.runs_of, long)), 20, "one that outlasts its grace")
            rig.terminate(victim)
        assert await victim.wait() == -signal.SIGKILL
        fine(await rig.finish(), rig.seed)


async def test_a_zombie_wakes_among_its_successors(tmp_path):
    """SIGSTOP for longer than the lease, again and again: what was taken over stays taken over."""
    async with Rig(tmp_path, seed=3, MAX_DELIVERIES=20) as rig:
        for _ in range(3):
            await rig.fleet.start()
        stop = asyncio.Event()
        producing = asyncio.create_task(rig.produce(stop, 60))
        await rig.all_ready()
        for _ in range(3):
            await rig.put(*(Work(seconds=1) for _ in range(9)))
            holder = await rig.until(rig.holder, 20, "a worker that runs something")
            await rig.freeze(holder, rig.lease * rig.random.uniform(1.5, 2.5))
        stop.set()
        await producing
        verdict = fine(await rig.finish(), rig.seed)
    assert verdict.duplicates["freeze"]


async def test_the_zombies_settle_is_refused(tmp_path):
    """It finishes its job right after it wakes, while its successor still runs the same one."""
    async with Rig(tmp_path, seed=4) as rig:
        zombie = await rig.fleet.start()
        (job,) = await rig.put(Gated(gate="g"))
        await rig.until(lambda: rig.runs_of(job) == 1, 30, "the zombie runs it")
        successor = await rig.fleet.start()
        await rig.all_ready()
        frozen = time.monotonic()
        zombie.signal(signal.SIGSTOP)
        await rig.until(lambda: rig.runs_of(job) == 2, 30, "the successor runs it")
        began = time.monotonic()
        successor.signal(signal.SIGSTOP)  # so that the zombie is first for sure
        rig.open_gate("g")
        zombie.signal(signal.SIGCONT)
        rig.fault("freeze", zombie.name, began=frozen, tail=1)
        await rig.until(lambda: zombie.said("settle_lost") or zombie.said("claim_lost"), 20, "the zombie learns it")
        successor.signal(signal.SIGCONT)
        rig.fault("freeze", successor.name, began=began, tail=1)
        verdict = fine(await rig.finish(), rig.seed)
    assert verdict.stale_settles or zombie.said("claim_lost")


async def test_a_zombie_that_emits_adds_nothing_to_its_successors_output(tmp_path):
    """Frozen in the middle of its output, and woken while its successor emits: readers see each run whole.

    The same holds for its log.
    """
    async with Rig(tmp_path, seed=12) as rig:
        zombie = await rig.fleet.start(JOB_LOG="ctx", JOB_LOG_LINES=5000)
        (job,) = await rig.put(Talking(gate="g"))
        items: list[OutputItem] = []

        async def read() -> None:
            async for item in rig.app.output(job, queue="q"):
                items.append(item)

        reading = asyncio.create_task(read())
        await rig.until(lambda: len(items) > 50, 30, "the zombie emits")
        logs = [keys.log(job) for keys in rig.ground.homes]
        await rig.until(lambda: rig.raw.exists(*logs), 30, "the zombie's log is kept")
        await rig.fleet.start(JOB_LOG="ctx", JOB_LOG_LINES=5000)
        await rig.all_ready()
        frozen = time.monotonic()
        zombie.signal(signal.SIGSTOP)
        await rig.until(lambda: items[-1].chunk[0] == 2, 30, "the successor emits")
        woken = len(items)
        zombie.signal(signal.SIGCONT)
        rig.fault("freeze", zombie.name, began=frozen, tail=1)
        await rig.until(lambda: zombie.said("claim_lost") or zombie.said("settle_lost"), 20, "the zombie learns it")
        await rig.until(lambda: len(items) > woken + 100, 30, "the successor goes on")
        rig.open_gate("g")
        await asyncio.wait_for(reading, 30)
        lines = [line async for line in rig.app.job_log(job, queue="q")]
        kept = [name(job) for keys in rig.ground.homes for name in (keys.output, keys.log, keys.result, keys.ended)]
        rig.raw.delete(*kept)  # kept for an hour
        fine(await rig.finish(), rig.seed)
    told = [item.chunk for item in items]
    first = [number for delivery, number in told if delivery == 1]
    second = [number for delivery, number in told if delivery == 2]
    assert told == [[1, number] for number in first] + [[2, number] for number in second]
    assert first == list(range(len(first)))
    assert second == [*range(len(second) - 1), "end"]
    assert [item.restart for item in items] == [position == len(first) for position in range(len(items))]
    assert {line.deliveries for line in lines} == {1, 2}
    for delivery in (1, 2):
        mine = [line.text for line in lines if line.deliveries == delivery]
        assert mine == [f"talks of={delivery} number={20 * number}" for number in range(len(mine))]
    assert lines == sorted(lines, key=lambda line: line.deliveries)


async def test_a_storm_of_terminations(tmp_path):
    async with Rig(tmp_path, seed=5, GRACE=0.5) as rig:
        for _ in range(3):
            await rig.fleet.start()
        stop = asyncio.Event()
        producing = asyncio.create_task(rig.produce(stop, 60))
        for _ in range(12):
            await asyncio.sleep(rig.random.uniform(0, 0.3))
            worker = rig.random.choice(rig.fleet.alive)
            rig.terminate(worker)
            for _ in range(rig.random.randint(0, 3)):
                await asyncio.sleep(rig.random.uniform(0, 0.1))
                worker.terminate()
            await rig.fleet.start()
        stop.set()
        await producing
        verdict = fine(await rig.finish(), rig.seed)
    assert set(verdict.duplicates) <= {"terminate"}


@pytest.mark.mode_free
async def test_a_rolling_restart_repeats_nothing(tmp_path):
    """Each worker gets its grace, and every job fits into it."""
    async with Rig(tmp_path, seed=6, GRACE=20) as rig:
        for _ in range(3):
            await rig.fleet.start()
        stop = asyncio.Event()
        producing = asyncio.create_task(rig.produce(stop, 60))
        for worker in list(rig.fleet.alive):
            fresh = await rig.fleet.start()
            await rig.until(lambda fresh=fresh: fresh.said("worker_ready"), 20, "the new worker")
            rig.terminate(worker)
            assert await worker.wait() == 0
        stop.set()
        await producing
        verdict = fine(await rig.finish(), rig.seed)
    assert not verdict.duplicates


@pytest.mark.mode_free
@pytest.mark.parametrize("kind", [Work, Thread, Block])
@pytest.mark.timeout(400)
async def test_a_long_job_runs_once_however_it_passes_its_time(tmp_path, kind):
    """Awaiting, in a thread, or blocking the loop, with an idle worker beside it: many leases long. See LONG below."""
    lease, seconds = LONG
    async with Rig(tmp_path, seed=7, lease=lease) as rig:
        for _ in range(2):
            await rig.fleet.start()
        await rig.all_ready()
        (job,) = await rig.put(kind(seconds=seconds))
        verdict = fine(await rig.finish(timeout=seconds + 60), rig.seed)
        assert verdict.starved or (rig.runs_of(job) == verdict.runs == 1 and not verdict.duplicates)
        assert verdict.starved or not any(worker.said("job_recovered") for worker in rig.fleet.workers)


@pytest.mark.mode_free
async def test_a_thread_that_never_returns_costs_one_process(tmp_path):
    async with Rig(tmp_path, seed=8, GRACE=0.5) as rig:
        worker = await rig.fleet.start()
        rig.expected_codes = {70}
        (job,) = await rig.put(Stuck())
        await rig.put(*(Work(seconds=0.1) for _ in range(10)))
        assert await worker.wait() == 70
        rig.fault("stuck", worker.name, began=time.monotonic() - 10)
        fine(await rig.finish(), rig.seed)
        assert rig.runs_of(job) == 2


@pytest.mark.mode_free
async def test_a_handler_that_does_not_hear_its_timeout_is_rescued(tmp_path):
    async with Rig(tmp_path, seed=9) as rig:
        workers = [await rig.fleet.start() for _ in range(2)]
        (job,) = await rig.put(Deaf())
        await rig.until(lambda: rig.runs_of(job) >= 2, 30, "a second run")
        for worker in workers:
            rig.fault("deaf", worker.name, began=time.monotonic() - 30, tail=30)
        fine(await rig.finish(), rig.seed)
        assert rig.runs_of(job) == 2


async def test_a_poison_takes_few_along_and_ends_dead(tmp_path):
    async with Rig(tmp_path, seed=10, lease=0.6, MAX_DELIVERIES=3) as rig:
        for _ in range(2):
            await rig.fleet.start()
        (job,) = await rig.put(Poison())
        await rig.put(*(Work(seconds=0.02) for _ in range(200)))
        deadline = time.monotonic() + 200
        while rig.ground.backlog() and time.monotonic() < deadline:
            if len(rig.fleet.alive) < 2:
                await rig.fleet.start()
            await asyncio.sleep(0.02)
        verdict = fine(await rig.finish(), rig.seed)
        assert rig.runs_of(job) == 3 and rig.ground.dead_ids() == [job]
    assert verdict.done == 200 and rig.injected["poison"] == 3


@pytest.mark.mode_free
@pytest.mark.parametrize("then", ["raise", "keep", "die"])
async def test_a_handler_takes_all_the_memory(tmp_path, then):
    """Its worker goes on, limps or dies: nothing is lost, and the others' leases hold."""
    async with Rig(tmp_path, seed=11) as rig:
        # However it ends without memory: aborted by a library, of an error, or told to.
        rig.expected_codes = {-signal.SIGABRT, -signal.SIGSEGV, 1, 70, 75}
        hungry = await rig.fleet.start()
        rig.may_stammer = {hungry}
        began = time.monotonic()
        (job,) = await rig.put(Hungry(then=then))
        await rig.until(lambda: rig.runs_of(job), 20, "the hungry job being taken")
        await rig.fleet.start()
        await rig.put(*(Work(seconds=0.05) for _ in range(60)))
        if then == "die":
            assert await hungry.wait() == -signal.SIGKILL
        elif then == "keep":
            await asyncio.sleep(3 * rig.lease)
            rig.kill(hungry)
            await hungry.wait()
        rig.fault("out of memory", hungry.name, began=began, tail=5)
        verdict = fine(await rig.finish(), rig.seed)
        assert rig.runs_of(job) >= (1 if then == "keep" else 2)
    assert verdict.done == 61
