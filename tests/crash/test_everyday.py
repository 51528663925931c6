"""Workers die around what people ask of jobs: cancelled ones stay cancelled, results come once, ticks come once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from datetime import UTC, datetime

import pytest

from streamworker.cron import schedule
from streamworker.errors import JobCancelled
from tests.crash.app import EVERY, YEAR, Gated, Kept, Ticked
from tests.crash.fleet import Worker
from tests.crash.history import read
from tests.crash.rig import Rig, fine

pytestmark = [pytest.mark.crash, pytest.mark.timeout(150)]


def let_go(rig: Rig) -> int:
    """Jobs that workers let go because they were cancelled."""
    return sum(len(worker.said("job_cancelled")) for worker in rig.fleet.workers)


def ends_of(rig: Rig, job: str) -> list[str]:
    """How the runs of a job ended."""
    return [line["what"] for line in read(rig.directory / "runs") if line["job"] == job and line["what"] != "started"]


def settled(rig: Rig, how: str) -> int:
    """Claims that were settled this way, by the server's witness."""
    return sum(line.startswith(f"{how} ") and line.endswith(" 1") for line in rig.ground.witnesses())


# -- cancelling


async def test_killed_while_it_puts_a_cancelled_job_away(tmp_path):
    """It was told, its handler cleans up, and it dies: nobody runs the job again, and somebody ends it as cancelled."""
    async with Rig(tmp_path, seed=51) as rig:
        victim = await rig.fleet.start()
        (job,) = await rig.put(Kept(gate="never", careful=True))
        await rig.until(lambda: rig.runs_of(job), 30, "the victim runs it")
        waiting = asyncio.create_task(rig.app.result(job, queue="q", timeout=120))
        await rig.cancel(job)
        await rig.until((tmp_path / "gate-never-told").exists, 30, "the handler is told")
        rig.kill(victim)
        await rig.fleet.start()
        with pytest.raises(JobCancelled):
            await waiting
        fine(await rig.finish(), rig.seed)
        assert (rig.runs_of(job), ends_of(rig, job), let_go(rig), settled(rig, "drop")) == (1, [], 1, 1)
        assert not rig.raw.exists(*rig.ground.no_more)


async def test_killed_at_random_around_a_cancellation(tmp_path):
    """Running jobs and waiting ones; nobody opens the gate, so that whoever ran one again would never come to rest."""
    async with Rig(tmp_path, seed=52, MAX_DELIVERIES=20, CONCURRENCY=2) as rig:
        for _ in range(2):
            await rig.fleet.start()
        await rig.all_ready()
        cancelled: list[str] = []
        for _ in range(4):
            jobs = await rig.put(*(Gated(gate="never") for _ in range(6)))
            holder = await rig.until(lambda jobs=jobs: runner(rig, jobs), 60, "a worker that runs one of them")
            at_first = rig.random.random() < 0.5
            if at_first:
                rig.kill(holder)
            cancelling = asyncio.create_task(rig.cancel(*jobs))
            await asyncio.sleep(rig.random.uniform(0, 0.03))
            if not at_first:
                rig.kill(holder)
            await cancelling
            cancelled += jobs
            await rig.fleet.start()
        fine(await rig.finish(timeout=90), rig.seed)
        assert not any("finished" in ends_of(rig, job) for job in cancelled)
        assert settled(rig, "drop") == len(cancelled)  # each once, by whoever held it
        assert not rig.raw.exists(*rig.ground.no_more)


def runner(rig: Rig, jobs: list[str]) -> Worker | None:
    """A living worker that has started one of them."""
    return rig.living({run["worker"] for job in jobs for run in rig.runs(job)})


async def test_a_zombie_does_not_bring_a_cancelled_job_back(tmp_path):
    """It sleeps through the cancellation and its lease, and finishes the job when it wakes: that is refused."""
    async with Rig(tmp_path, seed=53) as rig:
        zombie = await rig.fleet.start()
        (job,) = await rig.put(Kept(gate="g"))
        await rig.until(lambda: rig.runs_of(job), 30, "the zombie runs it")
        await rig.fleet.start()
        await rig.all_ready()
        frozen = time.monotonic()
        zombie.signal(signal.SIGSTOP)
        await rig.cancel(job)
        await rig.until(lambda: let_go(rig), 60, "its successor lets it go")
        assert not rig.ground.backlog()
        rig.open_gate("g")
        zombie.signal(signal.SIGCONT)
        rig.fault("freeze", zombie.name, began=frozen, tail=1)
        await rig.until(lambda: zombie.said("settle_lost") or zombie.said("claim_lost"), 30, "the zombie learns it")
        with pytest.raises(JobCancelled):
            await rig.app.result(job, queue="q", timeout=120)
        fine(await rig.finish(), rig.seed)
        assert (rig.runs_of(job), let_go(rig), settled(rig, "drop"), settled(rig, "done")) == (1, 1, 1, 0)
        assert not rig.raw.exists(*rig.ground.no_more)


# -- results


@pytest.mark.parametrize(("point", "runs"), [("outcome", 2), ("settled", 1)])
async def test_a_result_survives_the_worker_that_made_it(tmp_path, point, runs):
    """Killed when the handler has returned: before it is settled the job runs again; after that nothing is lost."""
    async with Rig(tmp_path, seed=54) as rig:
        (job,) = await rig.put(Kept(gate="g"))
        waiting = [asyncio.create_task(rig.app.result(job, queue="q", timeout=120)) for _ in range(3)]
        victim = await rig.fleet.start(at=f"{point}:1")
        await rig.until(lambda: rig.runs_of(job), 30, "the victim runs it")
        rig.open_gate("g")
        assert await victim.wait() == -signal.SIGKILL
        assert ends_of(rig, job) == ["finished"]
        if runs == 2:
            assert not rig.raw.exists(rig.ground.keys.result(job))
        await rig.fleet.start()
        assert await asyncio.gather(*waiting) == [runs] * 3
        assert await rig.app.result(job, queue="q", timeout=120) == runs  # whoever comes later
        fine(await rig.finish(), rig.seed)
        assert (ends_of(rig, job), settled(rig, "done")) == (["finished"] * runs, 1)


# -- the calendar


def ticks(rig: Rig, name: str) -> list[float]:
    """Moments of a schedule's ticks whose jobs have run, in order."""
    lines = [line for line in read(rig.directory / "runs") if line.get("schedule") == name]
    return sorted({datetime.fromisoformat(line["tick"]).timestamp() for line in lines})


def holes(rig: Rig, after: float) -> list[float]:
    """Ticks of "often" that are missing between the first after a moment and the last that ran."""
    moments = [each for each in ticks(rig, "often") if each > after]
    between = range(int(moments[0]), int(moments[-1]), EVERY)
    return [moment for moment in between if moment not in moments and not starved(rig, moment)]


def starved(rig: Rig, moment: float) -> bool:
    """The machine let nobody run around a moment: then a tick may be late, and the one after it be the last."""
    late = [line for line in read(rig.directory / "stalls") if abs(line["wall"] - moment) < 2 * EVERY]
    return sum(line["late"] for line in late) > EVERY / 2


async def test_ticks_come_once_while_workers_are_killed(tmp_path):
    """Two of three live always. Then nobody does, for a while: of what was missed the last tick runs, and once."""
    async with Rig(tmp_path, seed=55, MAX_DELIVERIES=20) as rig:
        calendar = tmp_path / "gate-calendar"
        calendar.touch()
        keys = {name: schedule(YEAR, Ticked(), tz="UTC", missed="last", name=name).key for name in ("last", "skip")}
        long_ago = int((time.time() - 400 * 86_400) * 1000)
        rig.raw.hset(rig.ground.keys.crons, mapping=dict.fromkeys(keys.values(), long_ago))
        for _ in range(3):
            await rig.fleet.start()
        while len(ticks(rig, "often")) < 4:
            # One that holds something, where there is one: the job of a tick runs again then.
            rig.kill(rig.holder() or rig.random.choice(rig.fleet.alive))
            fresh = await rig.fleet.start()
            await rig.until(lambda fresh=fresh: fresh.ready, 30, "its successor")
            await asyncio.sleep(rig.random.uniform(0.2, 0.8))
        # The job of one may lie with a worker that was killed, until its lease is over.
        await rig.until(lambda: not holes(rig, 0.0), 30, "the job of every tick")

        for worker in rig.fleet.alive:
            rig.kill(worker)
        gone = time.time()
        await asyncio.sleep(2.5 * EVERY)
        back = time.time()
        await rig.fleet.start()
        await rig.until(lambda: len([each for each in ticks(rig, "often") if each > gone]) >= 2, 30, "ticks again")
        later = [each for each in ticks(rig, "often") if each > gone]
        assert later[0] > back - EVERY  # the last that was missed, and none before it
        await rig.until(lambda: not holes(rig, gone), 30, "the job of every tick since")

        calendar.unlink()
        for worker in rig.fleet.alive:
            rig.kill(worker)
        fine(await rig.finish(), rig.seed)
        year = datetime(datetime.now(UTC).year, 1, 1, tzinfo=UTC).timestamp()
        assert (ticks(rig, "last"), ticks(rig, "skip")) == ([year], [])
        # A tick that came twice would be two jobs, each settled.
        assert settled(rig, "done") == len(ticks(rig, "often")) + 1
        every = Counter((line["schedule"], line["tick"], line["job"]) for line in read(tmp_path / "runs"))
        assert len({job for _, _, job in every}) == len(every) == len(ticks(rig, "often")) + 1
