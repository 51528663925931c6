"""The line before the slots: nobody waits while a slot sleeps, and no more slots wake than are needed."""

from __future__ import annotations

import asyncio

import pytest

from streamworker.job import Claim
from streamworker.run import Run
from streamworker.slots import Line

pytestmark = pytest.mark.anyio


def run(n: int = 0) -> Run:
    return Run(Claim("q", "normal", "stream:{q}", b"%d-0" % n, 1, b"{}", b"epoch"))


class Pool:
    """Slots that note what they take; each of them waits in its job until it is let go, if it shall wait."""

    def __init__(self, line: Line, slots: int, *, waits: bool) -> None:
        self.taken: list[tuple[int, bytes]] = []
        self.let_go = asyncio.Event()
        self._line, self._waits = line, waits
        self.tasks = [asyncio.create_task(self._slot(number)) for number in range(slots)]

    async def _slot(self, number: int) -> None:
        while True:
            taken = await self._line.get()
            self.taken.append((number, taken.claim.entry))
            if self._waits:
                await self.let_go.wait()

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


async def spin(times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.mark.parametrize("jobs", [1, 2, 3, 50, 100])
async def test_jobs_that_await_all_begin_at_once_each_in_a_slot_of_its_own(jobs):
    line = Line()
    pool = Pool(line, 100, waits=True)
    await spin(2)
    for n in range(jobs):
        line.put(run(n))
    await spin(10)  # they wake in waves: 1, 2, 4 … 64
    assert len({slot for slot, _ in pool.taken}) == len(pool.taken) == jobs
    await pool.end()


async def test_jobs_that_await_nothing_are_run_by_one_slot_in_order():
    line = Line()
    pool = Pool(line, 100, waits=False)
    await spin(2)
    for n in range(50):
        line.put(run(n))
    await spin(10)
    assert [entry for _, entry in pool.taken] == [b"%d-0" % n for n in range(50)]
    assert len({slot for slot, _ in pool.taken}) == 1
    await pool.end()


async def test_jobs_that_come_one_by_one_are_taken_one_by_one():
    line = Line()
    pool = Pool(line, 3, waits=True)
    await spin(2)
    for n in range(3):
        line.put(run(n))
        await spin(3)
        assert len(pool.taken) == n + 1
    line.put(run(3))  # no slot is free
    await spin(5)
    assert len(pool.taken) == 3
    pool.let_go.set()
    await spin(3)
    assert len(pool.taken) == 4
    await pool.end()


async def test_a_slot_that_ends_when_it_was_called_passes_the_call_on():
    line = Line()
    pool = Pool(line, 2, waits=True)
    await spin(2)
    line.put(run())
    pool.tasks[0].cancel()  # it was called, and has not run since
    await spin(5)
    assert pool.taken == [(1, b"0-0")]
    await pool.end()


async def test_slots_that_end_asleep_are_never_called():
    line = Line()
    pool = Pool(line, 3, waits=True)
    await spin(2)
    pool.tasks[0].cancel()
    pool.tasks[1].cancel()
    line.put(run())  # before the cancelled ones have run
    await spin(5)
    assert pool.taken == [(2, b"0-0")]
    await pool.end()


async def test_what_is_cleared_is_taken_by_nobody():
    line = Line()
    pool = Pool(line, 2, waits=True)
    await spin(2)
    waiting = [run(n) for n in range(3)]
    for each in waiting:
        line.put(each)
    assert line.clear() == waiting
    await spin(5)
    assert pool.taken == []
    line.put(run(9))
    await spin(3)
    assert [entry for _, entry in pool.taken] == [b"9-0"]
    await pool.end()
