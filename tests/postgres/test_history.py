"""The history of runs in PostgreSQL: where there is a ledger, nothing of it is in Redis."""

from __future__ import annotations

import asyncio
import json
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from streamworker import App, Backoff
from streamworker.errors import ConfigurationError
from streamworker.postgres.archive import open_archive
from streamworker.postgres.ledger_history import LedgerHistory, packed, read_statement
from streamworker.postgres.pool import open_database
from streamworker.telemetry.run_history import (
    DAY,
    HOUR,
    MINUTE,
    HistoryQuery,
    HistoryRow,
    HistorySums,
    RunTally,
    bucket_of,
    percentiles,
)
from streamworker.worker import history_recorder
from tests.conftest import eventually
from tests.contract.test_history import AT, added_up, everything, random_tally, tally
from tests.postgres.working import Job, settings_for, working


@pytest.fixture
async def stores(database_url):
    databases = [await open_database(database_url, connections=2) for _ in range(2)]
    yield [LedgerHistory(database) for database in databases]
    for database in databases:
        database.close()


async def test_workers_add_to_one_minute_and_every_span_is_the_sum(stores):
    """At once, in any order: no deadlock, and nothing is lost."""
    chance = random.Random(23)
    written = [
        HistoryRow(AT + minute * MINUTE, queue, kind, random_tally(chance))
        for minute in (0, 1, 59, 60, 61, 1440)
        for queue in ("q", "r")
        for kind in ("a", "b c")
        for _ in range(6)
    ]
    chance.shuffle(written)
    parts = [written[at : at + 12] for at in range(0, len(written), 12)]
    await asyncio.gather(*(stores[number % 2].add(part) for number, part in enumerate(parts)))
    for span in (MINUTE, HOUR, DAY):
        assert await everything(stores[0], span) == added_up(written, span), span
    assert await everything(stores[0], MINUTE, step=HOUR) == added_up(written, HOUR)
    only = added_up([row for row in written if (row.queue, row.kind) == ("r", "b c")], HOUR)
    assert await everything(stores[0], HOUR, queue="r", kind="b c") == only
    assert await everything(stores[0], HOUR, queue="r") == added_up([row for row in written if row.queue == "r"], HOUR)
    assert await everything(stores[0], HOUR, kind="a") == added_up([row for row in written if row.kind == "a"], HOUR)
    whole = added_up(written, HOUR)
    assert await stores[0].read(HistoryQuery(MINUTE, AT, AT + 3 * DAY, HOUR, kinds=False)) == HistorySums(
        whole.steps, {}, whole.counts
    )


async def test_the_index_finds_a_kind(stores, pg):
    """A day of one kind by minute is 1,440 rows among those of all others."""
    one = HistoryQuery(MINUTE, AT, AT + DAY, 10 * MINUTE, "q", "a")
    arguments = one.span, one.since, one.until, one.step, one.queue, one.kind
    await pg.execute("set enable_seqscan = off")
    plan = [row[0] for row in await pg.fetch(f"explain {read_statement(one)}", *arguments)]
    (found,) = [line for line in plan if "Index Cond" in line]
    assert "queue_name = " in found
    assert "kind = " in found


async def test_sql_sees_the_same_percentiles(stores, pg):
    """For Grafana, and for whom it may concern."""
    chance = random.Random(5)
    counts: dict[int, int] = {}
    for _ in range(500):
        bucket = bucket_of(chance.lognormvariate(-2, 2))
        counts[bucket] = counts.get(bucket, 0) + 1
    for histogram in (counts, {0: 1}, {199: 3}):
        found = [
            await pg.fetchval("select streamworker.history_quantile($1::text::numeric, $2)", packed(histogram), share)
            for share in (0.5, 0.95, 0.99)
        ]
        assert found == pytest.approx(percentiles(histogram, (0.5, 0.95, 0.99)))
    assert await pg.fetchval("select streamworker.history_quantile(0, 0.5)") is None


BOARD = Path(__file__).parents[2] / "deploy/grafana/streamworker-history.json"


async def test_postgresql_can_read_the_queries_of_the_board(stores, pg):
    """As Grafana sends them: its macros and variables are filled in."""
    now = await stores[0].now()
    await stores[0].add([HistoryRow(now - age, "q", "k", tally(5)) for age in (0, 7 * DAY)])
    board = json.loads(BOARD.read_text())
    times = {
        "$__timeFilter(at)": "at between now() - interval '1 day' and now()",
        "$__timeFrom()": f"'{datetime.fromtimestamp(now - DAY, UTC)}'", "$__timeTo()": f"'{datetime.fromtimestamp(now + 1, UTC)}'", "${span}": "3600",
        "$queue": "'q'", "$kind": "'k'",
    }  # fmt: skip
    asked = 0
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            sql = target["rawSql"]
            for macro, text in times.items():
                sql = sql.replace(macro, text)
            rows = await pg.fetch(sql)
            assert rows or "failed" in sql, panel["title"]
            asked += 1
            assert target["format"] == "table" or {"time", "metric", "value"} == set(rows[0].keys()), panel["title"]
    assert asked == 12
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            assert await pg.fetchval(variable["query"].replace("$queue", "'q'")) in ("q", "k")


async def test_what_is_too_old_is_deleted(stores, pg):
    now = await stores[0].now()
    ages = [3600, 2 * DAY + 3700, 59 * DAY, 61 * DAY]
    await stores[0].add([HistoryRow(now - age, "q", "k", tally()) for age in ages])
    await stores[0].prune()
    found = await pg.fetch("select span, count(*) from streamworker.history group by 1 order by 1")
    assert [tuple(row) for row in found] == [(60, 1), (3600, 3), (86400, 3)]


async def test_a_worker_with_a_ledger_keeps_it_there(redis_url, database_url, raw, pg, monkeypatch):
    monkeypatch.setattr(history_recorder, "EVERY", 0.2)
    app = App(settings=settings_for(redis_url, database_url))
    tries = []

    @app.handler(backoff=Backoff(base=0.001, cap=0.01))
    async def job(payload: Job) -> None:
        tries.append(payload.n)
        if payload.n < 2 and tries.count(payload.n) == 1:
            raise ValueError("again")

    async with working(app) as worker, app:
        await app.enqueue_many([Job(n=n) for n in range(30)])
        await eventually(lambda: worker.ready.is_set() and worker._in_flight.counts.done == 30)
        await eventually(lambda: pg.fetchval("select done from streamworker.history limit 1"))
    rows = await pg.fetch("select * from streamworker.history order by span")
    assert {row["span"] for row in rows} == {MINUTE, HOUR, DAY}
    for span in (MINUTE, HOUR, DAY):
        sums = [
            sum(row[name] for row in rows if row["span"] == span) for name in ("started", "done", "failed", "retried")
        ]
        assert sums == [32, 30, 2, 2]
    assert raw.keys("*history*") == []
    assert await pg.fetchval("select streamworker.history_quantile(run, 0.5) < 5 from streamworker.history limit 1")


async def test_off_writes_nothing(redis_url, database_url, raw, pg):
    app = App(settings=settings_for(redis_url, database_url, history="off"))

    @app.handler
    async def job(payload: Job) -> None:
        pass

    async with working(app) as worker, app:
        await app.enqueue_many([Job(n=n) for n in range(20)])
        await eventually(lambda: worker.ready.is_set() and worker._in_flight.counts.done == 20)
    assert await pg.fetchval("select count(*) from streamworker.history") == 0
    assert raw.keys("*history*") == []


async def test_a_schema_without_it_is_said_and_the_worker_goes_on(
    redis_url, database_url, pg, caplog, monkeypatch, stack
):
    monkeypatch.setattr(history_recorder, "EVERY", 0.1)
    await pg.execute("drop table streamworker.history")
    app = App(settings=settings_for(redis_url, database_url))

    @app.handler
    async def job(payload: Job) -> None:
        pass

    async with working(app) as worker, app:
        await app.enqueue(Job())
        await eventually(lambda: worker.ready.is_set() and worker._in_flight.counts.done == 1)
        await eventually(lambda: "history_not_recorded" in caplog.text)
    assert "streamworker migrate up" in caplog.text
    archive = await open_archive(stack, database_url)
    with pytest.raises(ConfigurationError, match="migrate up"):
        await archive.history.read(HistoryQuery(HOUR, 0, DAY, HOUR))


@pytest.fixture
async def stack():
    from contextlib import AsyncExitStack

    async with AsyncExitStack() as made:
        yield made


def test_a_tally_of_nothing_is_zero():
    assert packed(RunTally().run) == "0"
