"""Logs of jobs with a ledger: kept with the attempt, sealed, erased, forgotten with the job; quick jobs leave Redis alone."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Context, Keys, Payload, Retry
from streamworker.encryption import new_key
from streamworker.errors import NoKey
from streamworker.views.job_log import JobLogLine
from streamworker.worker import job_logs
from tests.conftest import eventually
from tests.postgres.test_erasure import everything
from tests.postgres.test_erasure import rows as all_rows
from tests.postgres.working import settings_for, working

KEYS = Keys(current="one", keys={"one": new_key()})


class Work(Payload, kind="work", queue="q"):
    text: str
    how: str = ""


def app_on(redis_url: str, database_url: str | None, *, encryption: Keys | None = None, **more: Any) -> App[Any]:
    app = App(settings=settings_for(redis_url, database_url, job_log="ctx", **more), encryption=encryption)

    @app.handler(max_attempts=2, backoff=Backoff(base=0.01))
    async def work(payload: Work, ctx: Context) -> None:
        ctx.log.info("begun", text=payload.text)
        if payload.how == "retry" and ctx.attempt == 1:
            raise Retry(after=0.01)
        if payload.how == "transaction":
            async with ctx.transaction():
                ctx.log.info("inside")
        if payload.how == "wait":
            await anyio.sleep_forever()
        ctx.log.warning("done", text=payload.text)

    return app


async def read(app: App[Any], job_id: str, **options: Any) -> list[JobLogLine]:
    with anyio.fail_after(20):
        return [line async for line in app.job_log(job_id, **options)]


def texts(lines: list[JobLogLine]) -> list[tuple[int, str]]:
    return [(line.attempt, line.text) for line in lines]


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_the_lines_of_each_attempt_are_kept_with_it_and_redis_holds_none(redis_url, database_url, pg, raw, mode):
    async with app_on(redis_url, database_url, mode=mode) as app:
        made = await app.enqueue(Work("x", "retry"))
        async with working(app):
            assert texts(await read(app, made.id, follow=True)) == [
                (1, "begun text=x"), (2, "begun text=x"), (2, "done text=x"),
            ]  # fmt: skip
        assert not raw.keys("*:log:*")
        rows = await pg.fetch(
            "select attempt, lines::text from streamworker.job_logs where job_id = $1 order by hop", made.id
        )
        assert [(row[0], [line[1:] for line in json.loads(row[1])]) for row in rows] == [
            (1, [["info", "begun text=x"]]), (2, [["info", "begun text=x"], ["warning", "done text=x"]]),
        ]  # fmt: skip
        assert len(await read(app, made.id)) == 3


async def test_a_transaction_and_a_job_that_logs_nothing(redis_url, database_url, pg):
    app = app_on(redis_url, database_url)

    class Silent(Payload, kind="silent", queue="q"):
        pass

    @app.handler
    async def silent(_: Silent, ctx: Context) -> None: ...

    async with app:
        made, other = await app.enqueue(Work("x", "transaction")), await app.enqueue(Silent())
        async with working(app):
            for each in (made, other):
                await app.result(each.id, timeout=20)
        assert [text for _, text in texts(await read(app, made.id))] == ["begun text=x", "inside", "done text=x"]
        assert await pg.fetchval("select lines from streamworker.job_logs where job_id = $1", other.id) is None


async def test_a_long_run_is_read_from_redis_and_then_from_the_ledger_once(redis_url, database_url, raw, monkeypatch):
    monkeypatch.setattr(job_logs, "GATHER", 0.01)
    async with app_on(redis_url, database_url) as app:
        made = await app.enqueue(Work("x", "wait"))
        async with working(app):
            await eventually(lambda: raw.keys("*:log:*"))
            assert texts(await read(app, made.id, queue="q")) == [(1, "begun text=x")]
            follower = app.job_log(made.id, queue="q", follow=True)
            assert (await anext(follower)).text == "begun text=x"
            await app.cancel(made.id, queue="q")
            with anyio.fail_after(20):
                assert [line.text async for line in follower] == []
        assert texts(await read(app, made.id)) == [(1, "begun text=x")]


@pytest.mark.parametrize("gather", [0.0, 60.0], ids=["in redis", "in the ledger"])
async def test_with_encryption_no_byte_of_a_line_is_readable(redis_url, database_url, pg, raw, monkeypatch, gather):
    monkeypatch.setattr(job_logs, "GATHER", gather)
    async with app_on(redis_url, database_url, encryption=KEYS, grace=0.2) as app:
        made = await app.enqueue(Work("MARKER", "retry"))
        running = await app.enqueue(Work("MARKER", "wait"))
        async with working(app):
            assert len(await read(app, made.id, follow=True)) == 3
            if not gather:
                await eventually(lambda: raw.keys(f"*:log:{running.id}"))
                assert len(await read(app, running.id, queue="q")) == 1
        assert b"MARKER" not in everything(raw) + (await all_rows(pg)).encode()
        async with app.archive() as archive:
            uses = {use.place for use in await archive.key_uses()}
            assert "postgresql job_logs.lines" in uses
    async with app_on(redis_url, database_url) as stranger:
        with pytest.raises(NoKey, match="log of this job is sealed"):
            await read(stranger, made.id)


async def test_erasure_and_retention_take_the_lines(redis_url, database_url, pg, raw, monkeypatch):
    monkeypatch.setattr(job_logs, "GATHER", 0.0)
    async with app_on(redis_url, database_url) as app:
        made = [await app.enqueue(Work(name, "retry")) for name in ("ANN", "BOB")]
        async with working(app):
            for each in made:
                await app.result(each.id, timeout=20)
        assert b"ANN" in everything(raw) + (await all_rows(pg)).encode()
        await app.erase({"text": "ANN"})
        assert b"ANN" not in everything(raw) + (await all_rows(pg)).encode()
        assert not raw.keys(f"*:log:{made[0].id}")
        async with app.archive() as archive:
            await archive.prune("q", older=0)
        assert await pg.fetchval("select count(*) from streamworker.job_logs") == 0


async def test_lines_that_postgresql_does_not_take_hold_no_job_up(redis_url, database_url, monkeypatch):
    monkeypatch.setattr("streamworker.postgres.ledger.KEEP_LOGS", "select 1 / 0")
    async with app_on(redis_url, database_url) as app:
        made = await app.enqueue(Work("x"))
        async with working(app):
            await app.result(made.id, timeout=20)
        async with app.archive() as archive:
            record = await archive.find(made.id)
        assert record is not None
        assert record.status == "completed"
