"""A job that charges nothing and never waits must not keep the fleet busy: it is slowed, told of, and can be ended."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from streamworker import App, Payload, Snooze
from streamworker.policy import FREE_RETURNS
from streamworker.views.rows import worker_row
from tests.conftest import eventually
from tests.contract.helpers import list_in_all, settings, working


class Poll(Payload, kind="poll", queue="q"):
    wait: float = 0.0


@list_in_all
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.all), 2])
async def test_a_job_that_spins_is_slowed_and_told_of(raw, ground, workers):
    app = App(settings=settings(raw, ground, lease=1, concurrency=4))
    runs: list[float] = []

    @app.handler
    async def poll(payload: Poll) -> None:
        runs.append(time.monotonic())
        raise Snooze(payload.wait)

    async with app, app.operator() as operator:
        made = await app.enqueue(Poll())
        async with working(app, workers):

            async def told() -> bool:
                rows = [worker_row(info, time.time()) for info in await operator.workers(["q"])]
                return any(row.spinning is not None and row.spinning.turns > FREE_RETURNS for row in rows)

            await eventually(told)
            await eventually(lambda: len(runs) >= FREE_RETURNS + 4)
            assert await app.cancel(made.id)
        behind = runs[FREE_RETURNS:]
        # Each waits twice as long as the one before it; a machine that stalls makes that longer, never shorter.
        pauses = [later - earlier for earlier, later in pairwise(behind)]
        for number, pause in enumerate(pauses):
            assert pause >= 0.19 * 2**number


async def test_a_snooze_of_a_minute_is_one_of_a_minute(raw, ground):
    app = App(settings=settings(raw, ground, lease=3, concurrency=4))

    @app.handler
    async def poll(payload: Poll) -> None:
        raise Snooze(payload.wait)

    async with app:
        now = time.time()
        await app.enqueue(Poll(wait=60))
        due = ground.keys().due
        async with working(app):
            await eventually(lambda: raw.zcard(due) == 1)
        ((_, at),) = raw.zrange(due, 0, 0, withscores=True)
        assert now + 60 <= at / 1000 <= time.time() + 60
