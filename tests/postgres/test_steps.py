"""Steps: a function runs once per job, whatever its runs go through; its value is remembered under the fence."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import msgspec
import pytest

from streamworker import App, Backoff, Context, Discard
from streamworker.encryption import PLAIN
from streamworker.errors import ConfigurationError, RunEnded, StepsChanged, UsageError
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.steps import JobSteps
from tests.conftest import eventually
from tests.postgres.test_transaction import opened, run
from tests.postgres.working import Job, settings_for, working

SOON = Backoff(base=0.02, jitter=0)


class Receipt(msgspec.Struct):
    """What a step returns."""

    id: str
    lines: tuple[int, ...] = ()


class Host:
    """A context, as far as steps ask for it."""

    sealer = PLAIN

    def __init__(self) -> None:
        self.cause = ""
        self.deadline_at = None
        self.connection: Any = None
        self.refused: Any = None

    def refuse(self, effect: Any) -> None:
        self.refused = effect


async def status(pg, job_id):
    return await pg.fetchval("select status from streamworker.jobs where id = $1", job_id)


async def finish(pg, job_id, *wanted):
    async def is_there() -> bool:
        return await status(pg, job_id) in (wanted or ("completed",))

    await eventually(is_there, 15)


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_steps_of_a_failed_run_are_given_to_the_next_one(redis_url, database_url, pg, mode):
    app, calls, got = App(settings=settings_for(redis_url, database_url, mode=mode)), Counter(), []

    def charge(amount: int) -> Receipt:
        calls["charge"] += 1
        return Receipt(f"r{amount}", (1, 2))

    async def pack() -> dict[str, Any]:
        calls["pack"] += 1
        if calls["pack"] < 3:
            raise ValueError("not yet")
        return {"box": 7, "at": (1, 2)}

    @app.handler(backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        receipt = await ctx.step("charge", charge, payload.n, result=Receipt)
        got.append((receipt, await ctx.step("pack", pack), await ctx.step("nothing", lambda: None)))

    async with app, working(app):
        sent = await app.enqueue(Job(n=5))
        await finish(pg, sent.id)
    assert calls == {"charge": 1, "pack": 3}
    assert got == [(Receipt("r5", (1, 2)), {"box": 7, "at": [1, 2]}, None)]  # as JSON has it, in every run
    assert await pg.fetchval("select attempt_count from streamworker.jobs") == 2
    rows = await pg.fetch("select position, kind, name, value::text from streamworker.job_steps order by position")
    assert [tuple(row) for row in rows] == [
        (0, "step", "charge", '{"id":"r5","lines":[1,2]}'), (1, "step", "pack", '{"box":7,"at":[1,2]}'),
        (2, "step", "nothing", "null"),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_sync_handler_has_steps_and_a_cursor(redis_url, database_url, pg, mode):
    app, calls, seen = App(settings=settings_for(redis_url, database_url, mode=mode)), Counter(), []

    def charge(amount: int) -> str:
        calls["charge"] += 1
        return f"r{amount}"

    @app.handler(backoff=SOON)
    def job(payload: Job, ctx: Context) -> None:
        assert ctx.step_blocking("charge", charge, payload.n, result=str) == "r5"
        for page in range(ctx.cursor.read_blocking(0), 4):
            seen.append(page)
            ctx.cursor.set_blocking(page + 1)
            if page == 1:
                raise ValueError("not yet")

    async with app, working(app):
        sent = await app.enqueue(Job(n=5))
        await finish(pg, sent.id)
    assert calls == {"charge": 1}
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("renamed", [("pay", "pack"), ("pack", "charge"), ("greet", "charge"), ("greet",)])
async def test_steps_that_were_renamed_or_reordered_are_one_clear_error(redis_url, database_url, pg, renamed):
    app, calls = App(settings=settings_for(redis_url, database_url)), []

    @app.handler(max_attempts=2, backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        for name in ("charge", "pack") if ctx.attempt == 1 else renamed:
            await ctx.step(name, calls.append, name)
        raise ValueError("once more")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await finish(pg, sent.id, "dead")
    assert calls == ["charge", "pack"]
    error = await pg.fetchval("select last_error from streamworker.jobs")
    assert (
        "StepsChanged: the steps of this handler were renamed or reordered: step 1 of this job was recorded as" in error
    )
    assert "deploy the steps as they were, or give the changed handler a new kind" in error


async def test_what_makes_no_sense_is_refused_before_the_function_is_called(redis_url, database_url, pg):
    app, errors, calls = App(settings=settings_for(redis_url, database_url)), [], []

    async def outer(ctx: Context) -> Any:
        return await ctx.step("inner", calls.append, 1)

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        await ctx.step("one", int)
        for name, function, *args in (
            ("one", calls.append, 1), ("", calls.append, 1), ("x" * 201, calls.append, 1), ("outer", outer, ctx),
            ("large", lambda: "x" * 262_143), ("odd", object),
        ):  # fmt: skip
            with pytest.raises(UsageError) as error:
                await ctx.step(name, function, *args)
            errors.append(str(error.value))
        with pytest.raises(UsageError, match="would block the event loop"):
            ctx.step_blocking("blocks", int)
        with pytest.raises(StepsChanged, match="does not fit the type that is asked for"):
            await ctx.step("typed", lambda: "words", result=Receipt)

    async with app, working(app):
        sent = await app.enqueue(Job())
        await finish(pg, sent.id)
    words = ("two steps of this handler are named 'one'", "needs a name", "needs a name", "is inside of the step 'outer'",
             "262145 bytes of JSON and 262144 are allowed", "cannot be written as JSON")  # fmt: skip
    assert [word in error for word, error in zip(words, errors, strict=True)] == [True] * 6, errors
    assert calls == []


async def test_a_value_of_the_most_bytes_and_of_odd_characters_comes_back_as_it_was(redis_url, database_url, pg):
    app, got = App(settings=settings_for(redis_url, database_url)), []
    values = ["x" * 262_142, {"nul": "\x00", "n": 10**30, "f": 1e300}, [None, True, 0.1]]

    @app.handler(max_attempts=2, backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        got.append([await ctx.step(f"value {n}", lambda n=n: values[n]) for n in range(3)])
        if ctx.attempt == 1:
            raise ValueError("once more")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await finish(pg, sent.id)
    assert got[0] == got[1]
    assert got[0][0] == values[0] and got[0][1]["nul"] == "\x00" and got[0][2] == values[2]


async def test_a_step_and_the_rows_of_its_transaction_are_one_commit(redis_url, database_url, pg):
    await pg.execute("create table effect (n integer)")
    app, calls = App(settings=settings_for(redis_url, database_url)), Counter()

    async def write(connection, n: int) -> int:
        calls["write"] += 1
        await connection.execute("insert into effect values ($1)", n)
        if calls["write"] == 1:
            raise ValueError("rolled back")
        return n

    @app.handler(max_attempts=4, backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        assert await ctx.step("write", write, payload.n, transaction=True) == 5
        if ctx.attempt < 4:
            raise ValueError("once more")
        async with ctx.transaction() as connection:  # the job's own transaction is still there
            assert await ctx.step("inside", connection.fetchval, "select 7") == 7
            await connection.execute("insert into effect values (6)")

    async with app, working(app):
        sent = await app.enqueue(Job(n=5))
        await finish(pg, sent.id)
    assert calls == {"write": 2}
    assert [row[0] for row in await pg.fetch("select n from effect order by n")] == [5, 6]
    assert await pg.fetchval("select count(*) from streamworker.job_steps") == 2


async def test_a_step_in_a_block_that_is_rolled_back_is_not_remembered(redis_url, database_url, pg):
    app, calls = App(settings=settings_for(redis_url, database_url)), []

    @app.handler(max_attempts=2, backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        async with ctx.transaction():
            await ctx.step("inside", calls.append, 1)
            if ctx.attempt == 1:
                raise ValueError("rolled back")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await finish(pg, sent.id)
    assert calls == [1, 1]


async def test_a_cursor_commits_with_the_rows_of_its_batch(redis_url, database_url, pg):
    await pg.execute("create table effect (n integer)")
    app = App(settings=settings_for(redis_url, database_url))

    @app.handler(max_attempts=5, backoff=SOON)
    async def job(payload: Job, ctx: Context) -> None:
        for n in range(await ctx.cursor.read(0, result=int), 4):
            async with ctx.database.acquire() as connection, connection.transaction():
                await connection.execute("insert into effect values ($1)", n)
                await ctx.cursor.set(n + 1, connection=connection)
                if n == ctx.attempt:
                    raise ValueError("rolled back, both of them")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await finish(pg, sent.id)
    assert [row[0] for row in await pg.fetch("select n from effect order by n")] == [0, 1, 2, 3]


@pytest.mark.parametrize(("bound", "runs"), [(0, 2), (100, 7), (4, 5)])
async def test_attempts_start_anew_after_progress_within_their_bound(redis_url, database_url, pg, bound, runs):
    """Two attempts, and six pages of which each run does one: without the option the second failure is the last."""
    app, seen = App(settings=settings_for(redis_url, database_url)), []

    @app.handler(max_attempts=2, backoff=SOON, progress_runs=bound)
    async def job(payload: Job, ctx: Context) -> None:
        page = await ctx.cursor.read(0)
        seen.append(page)
        if page < 6:
            await ctx.cursor.set(page + 1)
            raise ValueError("one page at a time")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await finish(pg, sent.id, "completed", "dead")
    assert len(seen) == runs
    assert await status(pg, sent.id) == ("completed" if bound == 100 else "dead")


async def test_steps_of_an_earlier_job_with_the_same_id_are_not_remembered(redis_url, database_url, pg):
    app, calls = App(settings=settings_for(redis_url, database_url, relay="on")), []

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        await ctx.step("charge", calls.append, payload.n)
        if payload.n == 1:
            raise Discard("no")

    async with app, working(app):
        await pg.fetchval("select streamworker.enqueue('job', '{\"n\": 1}', 'q', id => 'same')")
        await finish(pg, "same", "dead")
        await pg.fetchval("select streamworker.enqueue('job', '{\"n\": 2}', 'q', id => 'same')")
        await finish(pg, "same")
    assert calls == [1, 2]


async def test_a_dead_job_that_is_retried_goes_on_after_its_steps(redis_url, database_url, pg):
    app, calls = App(settings=settings_for(redis_url, database_url, relay="on")), []

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        await ctx.step("charge", calls.append, 1)
        if len(calls) == 1 and ctx.job.hop == 0:
            raise Discard("no")

    async with app, working(app):
        sent = await app.enqueue(Job())
        await finish(pg, sent.id, "dead")
        archive = await app._connection.required_archive()
        assert await archive.retry("q", sent.id)
        await finish(pg, sent.id)
    assert calls == [1]


async def test_without_a_ledger_a_step_says_what_it_needs(redis_url):
    app, errors = App(settings=settings_for(redis_url, None)), []

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        for what in (lambda: ctx.step("one", int), lambda: ctx.cursor.set(1)):
            with pytest.raises(ConfigurationError) as error:
                await what()
            errors.append(str(error.value))

    async with app, working(app):
        await app.enqueue(Job())
        await eventually(lambda: len(errors) == 2)
    assert errors[0] == (
        "ctx.step() needs the PostgreSQL ledger: set DATABASE_URL, and run `streamworker migrate up` once"
    )


# -- the fence, on the ledger alone


@pytest.fixture
async def ledger(database_url: str, pg: Any) -> Any:
    async with opened(database_url, database_url) as found:
        yield found


def steps_of(ledger: PostgresLedger, **which: Any) -> tuple[JobSteps, Host]:
    host = Host()
    return ledger.steps(run(**which), host), host


@pytest.mark.parametrize("later", [{"deliveries": 2}, {"hop": 1}])
async def test_a_zombies_step_is_refused_and_overwrites_nothing(ledger, pg, later):
    """It lost its claim inside of the function; its successor has taken the job, and may have recorded the step."""
    zombie, host = steps_of(ledger)
    successor, _ = steps_of(ledger, **later)

    async def lose_the_claim() -> str:
        assert await successor.call("charge", lambda: "successor", (), None, None) == "successor"
        return "zombie"

    with pytest.raises(RunEnded):
        await zombie.call("charge", lose_the_claim, (), None, None)
    assert host.refused.value == "superseded"
    assert await pg.fetchval("select value::text from streamworker.job_steps") == '"successor"'


async def test_a_zombies_step_is_refused_as_soon_as_its_successor_has_looked(ledger, pg):
    zombie, _ = steps_of(ledger)
    successor, _ = steps_of(ledger, deliveries=2)

    async def lose_the_claim() -> str:
        assert await successor.cursor("none", None) == "none"
        return "zombie"

    with pytest.raises(RunEnded):
        await zombie.call("charge", lose_the_claim, (), None, None)
    assert await pg.fetchval("select count(*) from streamworker.job_steps") == 0
    with pytest.raises(RunEnded):
        await zombie.set_cursor(1, None)


async def test_a_step_that_was_recorded_before_its_successor_looked_is_remembered(ledger):
    first, _ = steps_of(ledger)
    assert await first.call("charge", lambda: "first", (), None, None) == "first"
    second, _ = steps_of(ledger, deliveries=2)
    assert await second.call("charge", lambda: "second", (), None, None) == "first"


async def test_steps_begin_in_order_side_by_side(ledger):
    async def slow(n: int) -> int:
        await asyncio.sleep(0.05 * (3 - n))
        return n

    first, _ = steps_of(ledger)
    assert await asyncio.gather(*(first.call(f"s{n}", slow, (n,), None, None) for n in range(3))) == [0, 1, 2]
    second, _ = steps_of(ledger, deliveries=2)
    assert await asyncio.gather(*(second.call(f"s{n}", lambda: 9, (), None, None) for n in range(3))) == [0, 1, 2]


async def test_a_step_is_recorded_when_postgresql_is_back(own_postgres, tmp_path):
    """What the function did is done: it must not be called again because its record met an outage."""
    url = own_postgres.url()
    async with opened(url, url) as ledger:
        steps, _ = steps_of(ledger)
        calls = []

        def lose_the_server() -> str:
            calls.append(1)
            own_postgres.kill()
            asyncio.get_running_loop().call_later(0.5, own_postgres.start)
            return "kept"

        assert await steps.call("charge", lose_the_server, (), None, None) == "kept"
        again, _ = steps_of(ledger, deliveries=2)
        assert await again.call("charge", calls.append, (2,), None, None) == "kept"
    assert calls == [1]


async def test_the_table_holds_one_cursor(ledger, pg):
    steps, _ = steps_of(ledger)
    for n in range(3):
        await steps.set_cursor({"n": n}, None)
    assert json.loads(await pg.fetchval("select value::text from streamworker.job_steps")) == {"n": 2}


async def test_a_completed_job_that_is_forced_to_run_again_runs_its_steps_again(redis_url, database_url, pg):
    app, calls = App(settings=settings_for(redis_url, database_url, relay="on")), []

    @app.handler(max_attempts=1)
    async def job(payload: Job, ctx: Context) -> None:
        await ctx.step("charge", calls.append, 1)

    async with app, working(app):
        sent = await app.enqueue(Job())
        await finish(pg, sent.id)
        archive = await app._connection.required_archive()
        assert await archive.retry("q", sent.id)
        await finish(pg, sent.id)
        assert calls == [1, 1]
        assert await pg.fetchval("select count(*) from streamworker.job_steps") == 1
        while await archive.prune(older=0):
            pass
    assert await pg.fetchval("select count(*) from streamworker.job_steps") == 0
