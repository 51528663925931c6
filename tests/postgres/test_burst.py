"""A burst, and `testing.drain`, end when nothing is ready: not in Redis, and not in the ledger on its way there."""

from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from streamworker import App, Context, QueueWorker, Settings
from streamworker.testing import drain
from tests.postgres.working import Job, settings_for

pytestmark = pytest.mark.anyio

MODES = pytest.mark.parametrize("mode", ["stream", "list"])


def counting(settings: Settings) -> tuple[App[Any], list[int]]:
    """An app whose handler notes what it ran; 1000 enqueues 1001 in its transaction, and so on to 1003."""
    app, ran = App(settings=settings), []

    @app.handler
    async def job(payload: Job, ctx: Context[Any]) -> None:
        ran.append(payload.n)
        if 1000 <= payload.n < 1003:
            async with ctx.transaction() as pg:
                await app.enqueue(Job(n=payload.n + 1), connection=pg)

    return app, ran


async def commit(pg: asyncpg.Connection, app: App[Any], *jobs: Any) -> None:
    async with pg.transaction():
        await app.enqueue_many(jobs, connection=pg)


@MODES
async def test_a_burst_waits_for_what_is_committed(redis_url, database_url, pg, mode):
    app, ran = counting(settings_for(redis_url, database_url, relay="on", mode=mode))
    await commit(pg, app, *[Job(n=n) for n in range(450)], Job(n=1000), app.job(Job(n=-1), delay=3600))
    await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
    assert sorted(ran) == [*range(450), *range(1000, 1004)]
    left = await pg.fetch("select status, count(*) as n from streamworker.jobs group by status")
    assert {row["status"]: row["n"] for row in left} == {"completed": 454, "queued": 1}


async def test_a_burst_without_a_relay_leaves_it_to_others(redis_url, database_url, pg):
    app, ran = counting(settings_for(redis_url, database_url, relay="off"))
    await commit(pg, app, Job(n=1))
    await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
    assert (await drain(app)).done == 0 and ran == []


@MODES
async def test_drain_takes_what_the_ledger_holds(redis_url, database_url, pg, mode):
    app, ran = counting(settings_for(redis_url, database_url, relay="on", mode=mode))
    later = datetime.now(UTC) + timedelta(days=1)
    await commit(pg, app, Job(n=1), Job(n=1001), app.job(Job(n=2), delay=3600), app.job(Job(n=3), run_at=later))
    drained = await drain(app)
    assert sorted(ran) == [1, 1001, 1002, 1003] and (drained.done, drained.delayed) == (4, 2)
    drained = await drain(app, delayed=True)
    assert sorted(ran) == [1, 2, 3, 1001, 1002, 1003] and (drained.done, drained.delayed) == (2, 0)


async def test_drain_without_a_ledger(redis_url, empty_database):
    app, _ = counting(settings_for(redis_url, empty_database, relay="on"))
    async with app:
        await app.enqueue(Job(n=1))
        assert (await drain(app)).done == 1
