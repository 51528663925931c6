"""Jobs that wait for a signal, or sleep: in no worker and no queue meanwhile, and no wake-up is lost."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import anyio
import msgspec
import pytest

from streamworker import App, Backoff, Context, Payload
from streamworker.broker.order import OrderSweeper
from streamworker.errors import ConfigurationError, SignalTimeout, UsageError
from streamworker.postgres.outbox import PostgresOutbox
from streamworker.postgres.pool import open_database
from tests.conftest import eventually
from tests.postgres.working import Job, settings_for, working

Q = "stream:{q}"
SOON = Backoff(base=0.02, jitter=0)


class Approval(msgspec.Struct):
    """The data of a signal."""

    by: str


async def job_of(pg, job_id):
    return dict(await pg.fetchrow("select * from streamworker.jobs where id = $1", job_id) or {"status": None})


async def becomes(pg, job_id, *statuses, timeout=20.0):
    async def is_there() -> Any:
        return (await job_of(pg, job_id))["status"] in statuses

    await eventually(is_there, timeout)


def approving(redis_url, database_url, seen, **more):
    """An app whose handler charges, waits for an approval, and packs."""
    app = App(settings=settings_for(redis_url, database_url, **{"relay": "on", **more}))

    @app.handler(max_attempts=2, backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        await ctx.step("charge", seen.append, "charge")
        approval = await ctx.wait_for("approved", result=Approval)
        await ctx.step("pack", seen.append, f"pack for {approval.by}")

    return app


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_job_waits_in_postgresql_alone_until_its_signal_comes(redis_url, database_url, pg, raw, mode):
    seen: list[str] = []
    app = approving(redis_url, database_url, seen, mode=mode)
    async with app, working(app):
        sent = await app.enqueue(Job(n=7))
        await becomes(pg, sent.id, "waiting")
        row = await job_of(pg, sent.id)
        assert (row["waits_for"], row["run_at"], row["attempt_count"]) == ("approved", None, 0)
        keys = ("queue:q",) if mode == "list" else (Q,)
        await eventually(lambda: all(not (raw.llen(key) if mode == "list" else raw.xlen(key)) for key in keys))
        assert not raw.zcard(f"{Q}:due") and not raw.hlen(f"{Q}:bodies")
        assert await app.signal(sent.id, "other", 1)
        await anyio.sleep(0.3)
        assert (await job_of(pg, sent.id))["status"] == "waiting"
        assert await app.signal(sent.id, "approved", {"by": "ann"})
        assert not await app.signal(sent.id, "approved", {"by": "bob"})
        await becomes(pg, sent.id, "completed")
        assert not await app.signal(sent.id, "late", 1)
    assert seen == ["charge", "pack for ann"]
    row = await job_of(pg, sent.id)
    assert (row["attempt_count"], row["waits_for"]) == (0, None)
    logs = await pg.fetch("select outcome, attempt from streamworker.job_logs order by hop, deliveries")
    assert [tuple(each) for each in logs] == [("waiting", 1), ("ok", 1)]


async def test_a_signal_before_its_wait_is_kept_also_before_the_ledger_knows_the_job(redis_url, database_url, pg):
    seen: list[str] = []
    app = approving(redis_url, database_url, seen)
    async with app:
        sent = await app.enqueue(Job())
        with pytest.raises(UsageError, match="the ledger knows no job '.*': check the id, or say its queue"):
            await app.signal(sent.id, "approved", {"by": "ann"})
        assert await app.signal(sent.id, "approved", {"by": "ann"}, queue="q")
        assert not await app.signal(sent.id, "approved", {"by": "bob"}, queue="q")
        async with working(app):
            await becomes(pg, sent.id, "completed")
    assert seen == ["charge", "pack for ann"]
    assert await pg.fetchval("select count(*) from streamworker.job_logs") == 1  # it never had to wait


async def test_a_signal_counts_if_its_transaction_commits(redis_url, database_url, pg):
    seen: list[str] = []
    app = approving(redis_url, database_url, seen)
    async with app, working(app):
        sent = await app.enqueue(Job())
        await becomes(pg, sent.id, "waiting")
        transaction = pg.transaction()
        await transaction.start()
        assert await app.signal(sent.id, "approved", {"by": "nobody"}, connection=pg)
        await transaction.rollback()
        async with pg.transaction(isolation="serializable"):
            assert await pg.fetchval("select streamworker.signal($1, 'approved', '{\"by\": \"sql\"}')", sent.id)
        await becomes(pg, sent.id, "completed")
    assert seen == ["charge", "pack for sql"]


@pytest.mark.parametrize("sync", [False, True])
async def test_sleeps_and_timeouts_end_by_the_clock(redis_url, database_url, pg, sync):
    app, seen = App(settings=settings_for(redis_url, database_url, relay="on")), []

    if sync:

        @app.handler(max_attempts=1)
        def job(payload: Job, ctx: Context) -> None:
            ctx.sleep_blocking(0.2)
            seen.append("slept")
            with pytest.raises(SignalTimeout, match="no signal 'approved' came in time"):
                ctx.wait_for_blocking("approved", timeout=0.2)
            seen.append("timed out")
            ctx.sleep_blocking(0.1)
    else:

        @app.handler(max_attempts=1)
        async def job(payload: Job, ctx: Context) -> None:
            await ctx.sleep(0.2)
            seen.append("slept")
            with pytest.raises(SignalTimeout, match="no signal 'approved' came in time"):
                await ctx.wait_for("approved", timeout=0.2)
            seen.append("timed out")
            await ctx.sleep(0.1)

    async with app, working(app):
        sent = await app.enqueue(Job())
        await becomes(pg, sent.id, "completed", "dead")
        assert (await job_of(pg, sent.id))["status"] == "completed"
        assert not await app.signal(sent.id, "approved")
    assert seen == ["slept", "slept", "timed out", "slept", "timed out"]
    outcomes = [row[0] for row in await pg.fetch("select outcome from streamworker.job_logs order by hop")]
    assert outcomes == ["waiting"] * 3 + ["ok"]


async def test_a_timeout_stays_one_though_the_signal_comes_after_it(redis_url, database_url, pg):
    app, seen, tried = App(settings=settings_for(redis_url, database_url, relay="on")), [], []

    @app.handler(max_attempts=3, backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        try:
            seen.append(await ctx.wait_for("approved", timeout=0))
        except SignalTimeout:
            seen.append("timed out")
        if len(seen) < 3:
            tried.append(await app.signal(ctx.job.id, "approved", 1))
            raise ValueError("once more")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await becomes(pg, sent.id, "completed", "dead")
    assert seen == ["timed out"] * 3 and tried == [False] * 2


async def test_a_retry_of_a_later_failure_gets_the_same_signal(redis_url, database_url, pg):
    app, seen = App(settings=settings_for(redis_url, database_url, relay="on")), []

    @app.handler(max_attempts=2, backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        seen.append(await ctx.wait_for("approved"))
        if ctx.attempt == 1:
            raise ValueError("once more")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await becomes(pg, sent.id, "waiting")
        assert await app.signal(sent.id, "approved", [1, {"a": None}])
        await becomes(pg, sent.id, "completed")
    assert seen == [[1, {"a": None}]] * 2


async def test_a_signal_while_the_job_is_about_to_wait_is_never_lost(redis_url, database_url, pg):
    """Two hundred jobs that wait at once, and their signals at any moment of that."""
    app, seen, rng = (
        App(settings=settings_for(redis_url, database_url, relay="on", concurrency=50)),
        [],
        random.Random(8),
    )

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        seen.append(await ctx.wait_for("go"))

    async with app, working(app):
        sent = await app.enqueue_many([Job(n=n) for n in range(200)])

        async def send(number: int) -> None:
            await asyncio.sleep(rng.uniform(0, 0.6))
            assert await app.signal(sent[number].id, "go", number, queue="q")

        await asyncio.gather(*map(send, range(200)))

        async def all_done() -> bool:
            return await pg.fetchval("select count(*) = 200 from streamworker.jobs where status = 'completed'")

        await eventually(all_done, 30)
    assert sorted(seen) == list(range(200))
    assert await pg.fetchval("select count(*) from streamworker.job_signals where not seen") == 0


async def test_a_row_that_is_locked_while_its_signal_comes_is_woken_when_it_is_free(redis_url, database_url, pg):
    seen: list[str] = []
    app = approving(redis_url, database_url, seen)
    async with app, working(app):
        sent = await app.enqueue(Job())
        await becomes(pg, sent.id, "waiting")
        async with pg.transaction():
            await pg.execute("select 1 from streamworker.jobs where id = $1 for update", sent.id)
            assert await app.signal(sent.id, "approved", {"by": "ann"})
            await anyio.sleep(0.5)
        await becomes(pg, sent.id, "completed")
    assert seen == ["charge", "pack for ann"]


@pytest.mark.parametrize("loss", ["flushall", "other epoch"])
async def test_a_waiting_job_is_not_lost_with_redis(redis_url, database_url, pg, raw, loss):
    seen: list[str] = []
    app = approving(redis_url, database_url, seen, lease=0.5)
    async with app, working(app):
        sent = await app.enqueue(Job())
        await becomes(pg, sent.id, "waiting")
        hop = (await job_of(pg, sent.id))["hop"]
        # A loss is told by what the relay knew before, and its first look may come after the job.
        await eventually(
            lambda: pg.fetchval("select count(*) from streamworker.job_queues where epoch <> '' and server <> ''")
        )
        if loss == "flushall":
            raw.flushall()
        else:
            raw.hset(f"{Q}:meta", "epoch", "other")

        async def compared() -> bool:
            return await pg.fetchval("select rechecks between 1 and 2 from streamworker.job_queues")  # of three

        await eventually(compared, 20)
        row = await job_of(pg, sent.id)
        assert (row["status"], row["hop"]) == ("waiting", hop)
        await app.signal(sent.id, "approved", {"by": "ann"})
        await becomes(pg, sent.id, "completed")
    assert seen == ["charge", "pack for ann"]


async def test_a_waiting_job_can_be_cancelled_retried_and_expires(redis_url, database_url, pg):
    app, seen = App(settings=settings_for(redis_url, database_url, relay="on")), []

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        seen.append(payload.n)
        await ctx.wait_for("go")

    async with app, working(app):
        one, two = await app.enqueue(Job(n=1)), await app.enqueue(Job(n=2), expires_in=1.0)
        await becomes(pg, one.id, "waiting")
        assert await app.cancel(one.id) == "cancelled"
        assert (await job_of(pg, one.id))["status"] == "cancelled"
        assert not await app.signal(one.id, "go")
        await becomes(pg, two.id, "expired")
        archive = await app._connection.required_archive()
        assert await archive.retry("q", one.id)
        await becomes(pg, one.id, "waiting")
        await app.signal(one.id, "go")
        await becomes(pg, one.id, "completed")
    assert seen.count(1) == 3 and seen.count(2) == 1


@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.parametrize("end", ["signal", "cancel", "expire"])
async def test_a_job_that_waits_holds_its_order_key_and_passes_it_on_when_it_ends(
    redis_url, database_url, pg, raw, mode, end
):
    class Booking(Payload, kind="booking", queue="q", order_by="account"):
        account: str
        n: int

    app, seen = App(settings=settings_for(redis_url, database_url, relay="on", mode=mode)), []

    @app.handler(max_attempts=1)
    async def booking(payload: Booking, ctx: Context) -> None:
        if payload.n == 0:
            await ctx.wait_for("go")
        seen.append(payload.n)

    async with app, working(app):
        first = await app.enqueue(Booking(account="a", n=0), expires_in=4.0 if end == "expire" else None)
        second = await app.enqueue(Booking(account="a", n=1))
        await becomes(pg, first.id, "waiting")
        await eventually(lambda: raw.hget(f"{Q}:halted", "a") is not None)
        broker = app._connection.broker()
        raw.delete(broker._key("q").swept)
        sweeper = OrderSweeper(broker._session)  # to it, the job is nowhere in Redis and not lost
        assert await sweeper.sweep(broker._key("q")) == 0 and not sweeper.is_in_doubt
        await anyio.sleep(0.3)
        assert seen == []
        if end == "signal":
            await app.signal(first.id, "go")
        elif end == "cancel":
            assert await app.cancel(first.id) == "cancelled"
        await becomes(pg, second.id, "completed")
        assert (await job_of(pg, first.id))["status"] == {
            "signal": "completed",
            "cancel": "cancelled",
            "expire": "expired",
        }[end]
    assert seen == ([0, 1] if end == "signal" else [1])
    assert not raw.exists(f"{Q}:halted") and not raw.exists(f"{Q}:order")


async def test_what_cannot_wait_says_so(redis_url, database_url, pg):
    app, errors = App(settings=settings_for(redis_url, database_url)), []

    async def inside(ctx: Context) -> None:
        await ctx.wait_for("go")

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        for what in (lambda: ctx.step("a", inside, ctx), lambda: ctx.sleep(-1), lambda: ctx.wait_for("")):
            with pytest.raises(UsageError) as error:
                await what()
            errors.append(str(error.value))
        async with ctx.transaction():
            with pytest.raises(UsageError, match="is inside of a transaction, which cannot wait"):
                await ctx.sleep(1)

    async with app, working(app):
        sent = await app.enqueue(Job())
        await becomes(pg, sent.id, "completed")
    assert [
        word in each for word, each in zip(("inside of the step", "from 0 up", "needs a name"), errors, strict=True)
    ] == [True] * 3


async def test_jobs_of_a_batch_cannot_wait(redis_url, database_url, pg):
    app = App(settings=settings_for(redis_url, database_url))

    @app.handler(max_attempts=1, batch=2, linger=0.01)
    async def job(payloads: list[Job], contexts: list[Context]) -> None:
        await contexts[0].wait_for("go")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await becomes(pg, sent.id, "dead")
    assert "is in a handler of batches, whose jobs cannot wait" in (await job_of(pg, sent.id))["last_error"]


async def test_without_a_ledger_one_sentence_says_what_is_missing(redis_url):
    app, errors = App(settings=settings_for(redis_url, None)), []

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        for what in (lambda: ctx.wait_for("go"), lambda: ctx.sleep(1)):
            with pytest.raises(ConfigurationError, match=r"ctx\..* needs the PostgreSQL ledger: set DATABASE_URL"):
                await what()
            errors.append(1)

    async with app, working(app):
        await app.enqueue(Job())
        await eventually(lambda: len(errors) == 2)
        with pytest.raises(ConfigurationError):
            await app.signal("x", "go")


@pytest.mark.all
async def test_a_hundred_thousand_waiting_jobs_cost_redis_and_the_relay_nothing(redis_url, database_url, pg, raw):
    """Neither memory of Redis, nor reads of PostgreSQL that grow with them: counted in pages, which no load changes."""
    database = await open_database(database_url)
    outbox, before = PostgresOutbox(database), raw.info("memory")["used_memory_dataset"]

    async def pages(statement: str, *values: Any) -> int:
        plan = await pg.fetchval(f"explain (analyze, buffers, format json) {statement}", *values)
        root = msgspec.json.decode(plan)[0]["Plan"]
        return int(root["Shared Hit Blocks"]) + int(root["Shared Read Blocks"])

    async def cost() -> int:
        from streamworker.postgres import outbox as statements

        await pg.execute("analyze streamworker.jobs")
        await pg.execute("set enable_seqscan = off")
        return (
            await pages(statements.NEXT) + await pages(statements.WAKE, 500) + await pages(statements.CLAIM, 200, 10**7)
        )

    async def add(count: int, start: int) -> None:
        await pg.execute(
            "insert into streamworker.jobs (id, queue_name, kind, payload, status, waits_for, run_at, hop) "
            "select 'w' || n, 'q', 'job', '{\"n\": 1}', 'waiting', 'go', "
            "case when n % 2 = 0 then now() + interval '1 day' end, 1 from generate_series($1::int, $2::int) as n",
            start, start + count - 1,
        )  # fmt: skip

    try:
        await add(1000, 0)
        few = await cost()
        await add(99_000, 1000)
        many = await cost()
        assert await outbox.next_due() == (None, pytest.approx(86_400, abs=600))
        assert await outbox.wake() == 0 and await outbox.claim() == []
        assert many <= few + 20, (few, many)
        assert await pg.fetchval("select streamworker.signal('w77777', 'go')")
        assert await outbox.wake() == 2
        assert [each.id for each in await outbox.claim()] == ["w77777"]
        assert raw.info("memory")["used_memory_dataset"] - before < 100_000
        assert raw.dbsize() == 0
        print(f"pages of the relay's statements: {few} with 1,000 waiting jobs, {many} with 100,000")
    finally:
        database.close()
