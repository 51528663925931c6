"""A job that is changed while it waits: with a ledger its row follows."""

from __future__ import annotations

import json

import pytest

from streamworker import App
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working


@pytest.mark.parametrize("moved", [False, True], ids=["stays", "moves"])
async def test_the_row_follows(redis_url, database_url, pg, raw, moved):
    app = App(settings=settings_for(redis_url, database_url, relay="on", concurrency=1))

    @app.handler
    async def handler(payload: Job) -> None: ...

    async with app:
        async with working(app):
            async with pg.transaction():
                made = await app.enqueue(Job(n=1), connection=pg)

            async def parked():
                return await pg.fetchval("select status from streamworker.jobs where id = $1", made.id) == "completed"

            await eventually(parked)
        await pg.execute("update streamworker.jobs set status = 'dispatched', hop = 1, finished_at = null")
        body = json.dumps({"id": made.id, "kind": Job.__kind__, "payload": {"n": 1}, "hop": 1})
        raw.zadd("stream:{q}:due", {f"normal/{made.id}/0": 4e12})
        raw.hset("stream:{q}:bodies", f"normal/{made.id}/0", body)
        assert await app.change(
            made.id, queue="q", fields={"n": 5}, level="high", **({"to_queue": "other"} if moved else {})
        )
        row = await pg.fetchrow("select queue_name, level, payload::text from streamworker.jobs where id = $1", made.id)
        assert (row["queue_name"], row["level"], json.loads(row["payload"])["n"]) == (
            "other" if moved else "q",
            "high",
            5,
        )
        assert await pg.fetchval("select queue_name from streamworker.job_logs") == row["queue_name"]
        await app.change(made.id, queue=row["queue_name"], run_at=2_000_000_000.0)
        at = await pg.fetchval(
            "select extract(epoch from run_at)::float8 from streamworker.jobs where id = $1", made.id
        )
        assert at == 2_000_000_000.0
