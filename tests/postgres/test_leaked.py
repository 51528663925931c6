"""Connections of ctx.database that a handler never gave back."""

from __future__ import annotations

from typing import Any

import anyio

from streamworker import App, Context
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working


async def test_a_connection_that_was_never_released_does_not_keep_the_worker(redis_url, database_url, pg, caplog):
    app: App[Any] = App(settings=settings_for(redis_url, database_url))
    leaked: list[Any] = []
    connections: list[Any] = []

    @app.handler
    async def job(payload: Job, ctx: Context) -> None:
        leaked.append(await ctx.database.acquire())
        connections.append(leaked[-1]._con)
        await leaked[-1].fetchval("select 1")

    with anyio.fail_after(20):
        async with app, working(app):
            await app.enqueue(Job(n=1))
            await eventually(lambda: leaked)
    assert connections[0].is_closed()
    assert "connections_not_released" in caplog.text
