"""`jobs show`, `pending` and the dashboard show how far a running job has come."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import anyio

from streamworker import App, Context
from tests import forkserver
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working

ROOT = Path(__file__).parents[2]


def command(redis_url, database_url, *words):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "REDIS"))}
    env = {**clean, "PYTHONPATH": str(ROOT), "DATABASE_URL": database_url, "REDIS_URL": redis_url, "NO_COLOR": "1"}
    done = forkserver.run(words, env={**env, "COLUMNS": "200"}, cwd=ROOT, timeout=50)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_the_command_line(redis_url, database_url, pg, raw):
    app = App(settings=settings_for(redis_url, database_url))

    @app.handler
    async def handler(_: Job, ctx: Context) -> None:
        ctx.progress(37, 100, "reading")
        await anyio.sleep_forever()

    async with (
        app,
        working(
            app,
        ) as worker,
    ):
        made = await app.enqueue(Job())

        async def running():
            return await pg.fetchval("select status from streamworker.jobs") == "running"

        await eventually(running, 30)
        await eventually(lambda: raw.hexists(f"streamworker:worker:{worker.worker_id}", f"progress:{made.id}"), 30)
        both = []
        for words in (("jobs", "show", made.id), ("pending",)):
            both.append(await asyncio.to_thread(command, redis_url, database_url, *words))
            assert "37 of 100 (37 %) reading" in both[-1]
            rows = await asyncio.to_thread(command, redis_url, database_url, *words, "--json")
            progress = json.loads(rows)["progress"]
            assert (progress["done"], progress["total"], progress["note"]) == (37, 100, "reading")
            assert list(json.loads(rows))[-1] == "progress"
        await app.cancel(made.id)
