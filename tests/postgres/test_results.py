"""Waiting for results where there is a ledger: nothing is kept in Redis, and still nobody polls."""

from __future__ import annotations

import anyio
import pytest

from streamworker import App, Backoff
from streamworker.errors import JobCancelled, JobDead
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working


async def test_the_ledger_has_the_result_and_redis_tells_that_it_is_there(
    redis_url, database_url, pg, raw, monkeypatch
):
    app = App(settings=settings_for(redis_url, database_url))
    monkeypatch.setattr("streamworker.results.LOOK", 1000.0)
    go = anyio.Event()

    @app.handler(max_attempts=1, backoff=Backoff(base=0.01))
    async def handler(payload: Job) -> dict[str, int] | None:
        await go.wait()
        if payload.n == 2:
            raise ValueError("no")
        return None if payload.n == 1 else {"n": payload.n}

    got: dict[int, object] = {}
    async with app, working(app):
        made = [await app.enqueue(Job(n=n)) for n in range(4)]
        later = await app.enqueue(Job(n=4), delay=3600)

        async def wait(n: int, job_id: str) -> None:
            try:
                got[n] = await app.result(job_id, timeout=60)
            except (JobDead, JobCancelled) as error:
                got[n] = type(error)

        async with anyio.create_task_group() as group:
            for n, each in enumerate([*made, later]):
                group.start_soon(wait, n, each.id)
            await eventually(lambda: len(app._connection._broker._subscriber._confirmed) == 5)
            await eventually(lambda: raw.hexists("stream:{q}:meta", "waits"))
            assert got == {}
            go.set()
            await app.cancel(later.id)
        assert got == {0: {"n": 0}, 1: None, 2: JobDead, 3: {"n": 3}, 4: JobCancelled}
        assert not raw.keys("*:result:*")
        assert await app.result(made[0].id) == {"n": 0}
        with pytest.raises(JobDead, match="ValueError: no"):
            await app.result(made[2].id)
