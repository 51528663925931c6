"""Flows: the end of a node and the release of those after it are one commit, whichever way the node ends."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import asyncpg
import msgspec
import pytest

from streamworker import App, Backoff, Context, Discard, Flow, Payload, Settings, chain, group
from streamworker.errors import ConfigurationError, InvalidJob, JobTooLarge, ResultNotKept, UsageError
from streamworker.postgres.archive import CANCEL, RETRY
from tests.conftest import eventually
from tests.postgres import graphs
from tests.postgres.graphs import Act, draw, effects, flow_of, foretell, grown
from tests.postgres.working import settings_for, working

bare = App(settings=Settings())


class Step(Payload, kind="step", queue="q"):
    n: int = 0


class Sum(Payload, kind="sum", queue="q"):
    pass


class Receipt(msgspec.Struct):
    total: int


async def started(pg: asyncpg.Connection, flow: Flow, app: App[Any] = bare) -> str:
    async with pg.transaction():
        answer = await app.start(flow, connection=pg)
    return answer.id


async def states(pg: asyncpg.Connection, flow_id: str) -> dict[str, str]:
    rows = await pg.fetch(
        "select node.name, job.status from streamworker.flow_nodes as node join streamworker.jobs as job"
        " on job.id = node.job_id and job.queue_name = node.queue_name where node.flow_id = $1",
        flow_id,
    )
    return {row["name"]: row["status"] for row in rows}


async def outcomes(pg: asyncpg.Connection, flow_id: str) -> dict[int, str]:
    rows = await pg.fetch(
        "select name, outcome, unrun from streamworker.flow_nodes where flow_id = $1 and job_id is not null and name !~ '/'"
        " and name ~ '^[0-9]+$'",
        flow_id,
    )
    return {
        int(row["name"]): "unrun" if row["unrun"] and row["outcome"] == "failed" else row["outcome"] or "blocked"
        for row in rows
    }


async def end(pg: asyncpg.Connection, flow_id: str, name: str, status: str = "completed") -> None:
    """What any end of a job is for the ledger: its row changes."""
    changed = await pg.execute(
        "update streamworker.jobs as job set status = $3, finished_at = now() from streamworker.flow_nodes as node"
        " where node.flow_id = $1 and node.name = $2 and job.id = node.job_id and job.queue_name = node.queue_name",
        flow_id, name, status,
    )  # fmt: skip
    assert changed == "UPDATE 1"


async def look(pg: asyncpg.Connection) -> int:
    """What a relay does."""
    return int(await pg.fetchval("select streamworker.flow_look(1000)"))


async def flow_status(pg: asyncpg.Connection, flow_id: str) -> str:
    return str(await pg.fetchval("select status from streamworker.flows where id = $1", flow_id))


def order(**policies: Any) -> tuple[Flow, dict[str, str]]:
    flow = Flow("order")
    a = flow.add(Step(n=1), name="charge", **policies)
    b = flow.add(Step(n=2), name="pack", after=a)
    c = flow.add(Step(n=3), name="label", after=a)
    flow.add(Step(n=4), name="ship", after=[b, c])
    flow.add(Step(n=5), name="refund", after=a, when="failed")
    flow.add(Step(n=6), name="tidy", after=a, when="always")
    return flow, {}


def _cycle() -> Flow:
    flow = Flow("round")
    a, b = flow.add(Step(), name="a"), flow.add(Step(), name="b")
    flow.link(a, b)
    flow.link(b, a)
    return flow


def _around() -> Flow:
    flow = Flow("round")
    flow.add(flow)
    return flow


async def test_each_node_is_released_by_the_commit_that_ends_the_last_one_before_it(pg):
    flow_id = await started(pg, order()[0])
    blocked = dict.fromkeys(("pack", "label", "ship", "refund", "tidy"), "blocked")
    assert await states(pg, flow_id) == {"charge": "queued", **blocked}
    await end(pg, flow_id, "charge")
    after = {"charge": "completed", "pack": "queued", "label": "queued", "ship": "blocked", "refund": "cancelled", "tidy": "queued"}  # fmt: skip
    assert await states(pg, flow_id) == after
    await end(pg, flow_id, "pack")
    assert (await states(pg, flow_id))["ship"] == "blocked"
    await end(pg, flow_id, "label")
    assert (await states(pg, flow_id))["ship"] == "queued"
    await end(pg, flow_id, "ship")
    assert await flow_status(pg, flow_id) == "running"
    await end(pg, flow_id, "tidy")
    assert await flow_status(pg, flow_id) == "completed"
    await look(pg)
    assert await look(pg) == 0


@pytest.mark.parametrize("status", ["dead", "expired", "cancelled"])
async def test_a_failure_runs_what_waits_for_it_and_ends_the_rest(pg, status):
    flow_id = await started(pg, order()[0])
    await end(pg, flow_id, "charge", status)
    assert await states(pg, flow_id) == {
        "charge": status, "pack": "cancelled", "label": "cancelled", "ship": "cancelled", "refund": "queued", "tidy": "queued",
    }  # fmt: skip
    await end(pg, flow_id, "refund")
    await end(pg, flow_id, "tidy")
    assert await flow_status(pg, flow_id) == "failed"


async def test_skip_lets_the_flow_be_completed_and_hold_waits_for_the_replay(pg):
    skipping, holding = await started(pg, order(if_failed="skip")[0]), await started(pg, order(if_failed="hold")[0])
    for flow_id in (skipping, holding):
        await end(pg, flow_id, "charge", "dead")
        await end(pg, flow_id, "refund")
        await end(pg, flow_id, "tidy")
    assert await flow_status(pg, skipping) == "completed"
    assert await flow_status(pg, holding) == "running"
    assert (await states(pg, holding))["pack"] == "blocked"
    charge = await pg.fetchval(
        "select job_id from streamworker.flow_nodes where flow_id = $1 and name = 'charge'", holding
    )
    await pg.fetch(RETRY, charge, "q")
    assert (await states(pg, holding))["charge"] == "queued"
    await end(pg, holding, "charge")
    for name in ("pack", "label", "ship"):
        assert (await states(pg, holding))[name] == "queued" or name == "ship"
        await end(pg, holding, name)
    assert await flow_status(pg, holding) == "completed"


async def test_the_replay_of_a_dead_node_opens_what_its_death_had_ended(pg):
    flow_id = await started(pg, order()[0])
    await end(pg, flow_id, "charge", "dead")
    await end(pg, flow_id, "refund")
    await end(pg, flow_id, "tidy")
    assert await flow_status(pg, flow_id) == "failed"
    charge = await pg.fetchval(
        "select job_id from streamworker.flow_nodes where flow_id = $1 and name = 'charge'", flow_id
    )
    await pg.fetch(RETRY, charge, "q")
    assert await flow_status(pg, flow_id) == "running"
    found = await states(pg, flow_id)
    assert (found["pack"], found["ship"], found["refund"]) == ("blocked", "blocked", "completed")
    for name in ("charge", "pack", "label", "ship"):
        await end(pg, flow_id, name)
    assert await flow_status(pg, flow_id) == "completed"


async def test_two_that_end_at_once_and_cannot_see_each_other_leave_a_note(pg, database_url):
    flow_id = await started(pg, order()[0])
    await end(pg, flow_id, "charge")
    other = await asyncpg.connect(database_url)
    try:
        one, two = pg.transaction(), other.transaction()
        await one.start()
        await two.start()
        await end(pg, flow_id, "pack")
        await end(other, flow_id, "label")
        await one.commit()
        await two.commit()
    finally:
        await other.close()
    assert (await states(pg, flow_id))["ship"] == "blocked"
    assert await look(pg) > 0
    assert (await states(pg, flow_id))["ship"] == "queued"


async def test_nothing_is_released_by_an_end_that_is_rolled_back(pg):
    flow_id = await started(pg, chain(Step(n=1), Step(n=2)))
    transaction = pg.transaction()
    await transaction.start()
    await end(pg, flow_id, "step")
    assert (await states(pg, flow_id))["step-2"] == "queued"
    await transaction.rollback()
    assert await states(pg, flow_id) == {"step": "queued", "step-2": "blocked"}


@pytest.mark.parametrize("level", ["repeatable_read", "serializable"])
async def test_an_old_snapshot_decides_nothing(pg, level):
    flow_id = await started(pg, chain(Step(n=1), Step(n=2)))
    async with pg.transaction(isolation=level):
        await end(pg, flow_id, "step")
    await look(pg)
    assert (await states(pg, flow_id))["step-2"] == "queued"


async def test_a_job_that_is_cancelled_or_deleted_ends_its_node(pg):
    flow_id = await started(pg, order()[0])
    charge = await pg.fetchval(
        "select job_id from streamworker.flow_nodes where flow_id = $1 and name = 'charge'", flow_id
    )
    await pg.fetch(CANCEL, charge, "q")
    assert (await states(pg, flow_id))["refund"] == "queued"
    other = await started(pg, order()[0])
    await pg.execute(
        "delete from streamworker.jobs where id = (select job_id from streamworker.flow_nodes where flow_id = $1 and name = 'charge')",
        other,
    )
    assert (await states(pg, other))["refund"] == "queued"
    assert (await states(pg, other))["pack"] == "cancelled"


async def test_flows_nest_and_a_gate_stands_for_the_end_of_all_of_one(pg):
    inner = group(Step(n=2), Step(n=3), name="both")
    flow_id = await started(pg, chain(Step(n=1), inner, Step(n=4)))
    await end(pg, flow_id, "step")
    assert await states(pg, flow_id) == {
        "step": "completed", "both/step": "queued", "both/step-2": "queued", "step-2": "blocked",
    }  # fmt: skip
    await end(pg, flow_id, "both/step")
    await end(pg, flow_id, "both/step-2")
    assert (await states(pg, flow_id))["step-2"] == "queued"
    failing = await started(pg, chain(Step(n=1), group(Step(n=2), Step(n=3), name="both"), Step(n=4)))
    await end(pg, failing, "step")
    await end(pg, failing, "both/step", "dead")
    assert (await states(pg, failing))["step-2"] == "blocked"
    await end(pg, failing, "both/step-2")
    assert (await states(pg, failing))["step-2"] == "cancelled"
    assert await flow_status(pg, failing) == "failed"


async def test_a_key_starts_one_flow_until_that_is_cancelled(pg):
    first = await started(pg, chain(Step(), key="7"))
    async with pg.transaction():
        again = await bare.start(chain(Step(), key="7"), connection=pg)
    assert (again.id, again.new) == (first, False)
    assert await pg.fetchval("select count(*) from streamworker.jobs") == 1
    await pg.fetch("select * from streamworker.cancel_flow($1)", first)
    assert await started(pg, chain(Step(), key="7")) != first


async def test_cancel_retry_and_delete_a_flow_as_one(pg):
    flow_id = await started(pg, order()[0])
    await end(pg, flow_id, "charge")
    await end(pg, flow_id, "pack", "running")
    told = await pg.fetch("select * from streamworker.cancel_flow($1)", flow_id)
    assert len(told) == 1
    found = await states(pg, flow_id)
    assert (found["pack"], found["label"], found["ship"], found["tidy"]) == (
        "running",
        "cancelled",
        "cancelled",
        "cancelled",
    )
    assert not await pg.fetchval("select streamworker.delete_flow($1)", flow_id)
    await end(pg, flow_id, "pack", "cancelled")
    await look(pg)
    assert await flow_status(pg, flow_id) == "cancelled"
    assert await pg.fetchval("select finished_at is not null from streamworker.flows where id = $1", flow_id)
    assert await pg.fetchval("select streamworker.retry_flow($1)", flow_id) == 3
    await look(pg)
    found = await states(pg, flow_id)
    assert (found["pack"], found["label"], found["ship"], found["refund"]) == (
        "queued",
        "queued",
        "blocked",
        "cancelled",
    )
    for name in ("pack", "label", "tidy", "ship"):
        await end(pg, flow_id, name)
    assert await flow_status(pg, flow_id) == "completed"
    assert await pg.fetchval("select streamworker.delete_flow($1)", flow_id)
    for table in ("jobs", "flows", "flow_nodes", "flow_edges"):
        assert await pg.fetchval(f"select count(*) from streamworker.{table}") == 0, table


async def test_a_retry_decides_anew_on_what_ran_because_of_a_failure(pg):
    flow_id = await started(pg, order()[0])
    await end(pg, flow_id, "charge", "dead")
    await end(pg, flow_id, "refund", "dead")
    assert await pg.fetchval("select streamworker.retry_flow($1)", flow_id) == 2
    found = await states(pg, flow_id)
    assert (found["charge"], found["refund"], found["pack"]) == ("queued", "blocked", "blocked")
    await end(pg, flow_id, "charge")
    found = await states(pg, flow_id)
    assert (found["refund"], found["pack"], found["label"]) == ("cancelled", "queued", "queued")


async def test_a_wide_join_is_decided_by_a_look_that_reads_each_end_once(pg):
    flow = Flow("wide")
    parts = [flow.add(Step(n=n)) for n in range(300)]
    flow.add(Sum(), after=parts)
    flow_id = await started(pg, flow)
    steps = await pg.fetch(
        "select job_id from streamworker.flow_nodes where flow_id = $1 and name like 'step%' order by node", flow_id
    )
    ids = [row[0] for row in steps]
    for some in (ids[:150], ids[150:299]):
        await pg.execute("update streamworker.jobs set status = 'completed' where id = any($1::text[])", some)
        assert await pg.fetchval("select count(*) from streamworker.flow_checks") == 1  # one for all of a transaction
        await look(pg)
        assert (await states(pg, flow_id))["sum"] == "blocked"
    first, looked = await pg.fetchrow(
        "select min(node), max(looked) from streamworker.flow_nodes where flow_id = $1 and (looked > 0 or name = 'step')",
        flow_id,
    )
    assert looked == first + 298
    await pg.execute("update streamworker.jobs set status = 'completed' where id = $1", ids[299])
    await look(pg)
    assert (await states(pg, flow_id))["sum"] == "queued"


async def test_jobs_in_no_flow_start_nothing_of_it(pg):
    await pg.execute(
        "insert into streamworker.jobs (id, queue_name) select n::text, 'q' from generate_series(1, 100) as n"
    )
    plan = await pg.fetch("explain (analyze, costs off) update streamworker.jobs set status = 'completed'")
    assert not [row[0] for row in plan if "jobs_node_changed" in row[0] and "calls=0" not in row[0]]


@pytest.mark.parametrize(
    ("flow", "sentence"),
    [
        (lambda: Flow("empty"), "has no nodes"),
        (lambda: Flow(""), "must be a text of 1 to 200 bytes"),
        (lambda: chain(Step(), name="x", key="k\x00"), "must be a text"),
        (_cycle, "has a cycle: each of these nodes waits for another (a, b)"),
        (_around, "is inside of itself"),
        (lambda: Flow("a").add(Step(), key="k"), "a node has no key"),
        (lambda: Flow("a").add(Step(), when="maybe", after=Flow("b").add(Step())), "must be one of ok, failed, always"),
        (lambda: Flow("a").add(Step(), after=Flow("b").add(Step())), "is no node of the flow 'a'"),
        (lambda: Flow("a").add(Step(), if_failed="cry"), "must be one of fail, skip, hold"),
        (lambda: group(*[bare.job(Step())] * 2), "has a job twice"),
    ],
)
async def test_what_is_no_flow_is_refused_with_one_sentence(pg, flow, sentence):
    with pytest.raises(UsageError) as caught:
        async with pg.transaction():
            await bare.start(flow(), connection=pg)
    assert sentence in str(caught.value)
    assert await pg.fetchval("select count(*) from streamworker.flows") == 0


async def test_payloads_are_checked_as_at_enqueue(pg):
    with pytest.raises(InvalidJob):
        Flow("a").add(Step(n="no"))  # type: ignore[arg-type]
    small = App(settings=Settings(max_job_bytes=1024))

    class Text(Payload, kind="text", queue="q"):
        text: str

    with pytest.raises(JobTooLarge):
        async with pg.transaction():
            await small.start(chain(Text(text="x" * 2000)), connection=pg)


async def test_without_the_schema_one_sentence_says_so(empty_database):
    connection = await asyncpg.connect(empty_database)
    try:
        with pytest.raises(
            ConfigurationError, match="has no schema streamworker: run `streamworker migrate up`"
        ) as caught:
            async with connection.transaction():
                await bare.start(chain(Step()), connection=connection)
        assert caught.value.exit_code == 78
    finally:
        await connection.close()


async def test_large_flows_are_copied_and_small_ones_are_not(pg):
    for size in (5, 50):
        flow_id = await started(pg, chain(*(Step(n=n) for n in range(size))))
        rows = await pg.fetch(
            "select payload->>'n' as n, status, node from streamworker.jobs where node in"
            " (select node from streamworker.flow_nodes where flow_id = $1) order by node",
            flow_id,
        )
        assert [int(row["n"]) for row in rows] == list(range(size))
        assert [row["status"] for row in rows] == ["queued"] + ["blocked"] * (size - 1)


# -- with workers


def acting(app: App[Any]) -> None:
    @app.handler(max_attempts=20, backoff=Backoff(base=0.05, cap=0.3, jitter=0))
    async def act(payload: Act, ctx: Context) -> None:
        if payload.dies and not await ctx.database.fetchval("select count(*) from healed"):
            raise Discard("as drawn")
        async with ctx.transaction() as pg:
            await pg.execute("insert into effect (flow, n) values ($1, $2)", payload.flow, payload.n)
            if payload.grow:
                await app.start(grown(payload), connection=pg, inside=ctx)


async def prepare(pg: asyncpg.Connection) -> None:
    await pg.execute("create table effect (flow text, n int); create table healed (n int)")


async def rows_of(pg: asyncpg.Connection, name: str) -> Counter[int]:
    return Counter(row["n"] for row in await pg.fetch("select n from effect where flow = $1", name))


async def quiet(pg: asyncpg.Connection) -> bool:
    """Nothing can happen any more without a replay."""
    busy = await pg.fetchval(
        "select count(*) from streamworker.jobs where status in ('queued', 'dispatching', 'dispatched', 'running', 'retrying')"
    )
    return not busy and not await pg.fetchval("select count(*) from streamworker.flow_checks")


@pytest.mark.all
@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_random_flows_end_as_foretold_and_again_when_they_are_healed(redis_url, database_url, pg, mode):
    await prepare(pg)
    app = App(settings=settings_for(redis_url, database_url, mode=mode, relay="on"))
    acting(app)
    chance = random.Random(5)
    drawn = {f"flow-{n}": draw(chance, 25) for n in range(25)}
    async with working(app):
        ids = {name: await started(pg, flow_of(name, specs), app) for name, specs in drawn.items()}
        await eventually(lambda: quiet(pg), timeout=60)
        known = {}
        for name, specs in drawn.items():
            known[name] = foretell(specs)
            assert await outcomes(pg, ids[name]) == known[name], (name, specs)
            assert await rows_of(pg, name) == Counter(effects(specs, known[name])), name
            assert await flow_status(pg, ids[name]) == graphs.status(specs, known[name]), (name, specs)
        await pg.execute("insert into healed values (1)")
        for flow_id in ids.values():
            await pg.fetchval("select streamworker.retry_flow($1)", flow_id)
        await eventually(lambda: quiet(pg), timeout=60)
        for name, specs in drawn.items():
            healed = foretell(specs, known[name])
            assert await outcomes(pg, ids[name]) == healed, (name, specs)
            assert await rows_of(pg, name) == Counter(effects(specs, healed)), name
            assert await flow_status(pg, ids[name]) == graphs.status(specs, healed), (name, specs)


async def test_results_reach_the_next_node_typed(redis_url, database_url, pg):
    app, got = App(settings=settings_for(redis_url, database_url, relay="on")), []

    @app.handler
    async def step(payload: Step) -> Receipt:
        return Receipt(payload.n * 10)

    @app.handler
    async def add_up(payload: Sum, ctx: Context) -> int:
        with pytest.raises(ResultNotKept, match="no node 'nothing' was completed right before this one"):
            await ctx.parents.result("nothing")
        one = await ctx.parents.result("step", Receipt)
        got.append((one, await ctx.parents.results(Receipt)))
        return sum(each.total for each in got[0][1].values())

    async with working(app), app:
        flow = Flow("sums")
        inner = flow.add(group(Step(n=2), Step(n=3), name="both"))
        last = flow.add(Sum(), after=[flow.add(Step(n=1)), inner])
        await started(pg, flow, app)
        assert await app.result(last.id, timeout=20) == 60
    assert got == [(Receipt(10), {"step": Receipt(10), "both/step": Receipt(20), "both/step-2": Receipt(30)})]


async def test_sync_handlers_have_parents_and_add_nodes(redis_url, database_url, pg):
    pool = pytest.importorskip("psycopg_pool")
    app, got = App(settings=settings_for(redis_url, database_url, relay="on")), []

    with pool.ConnectionPool(database_url, min_size=1, max_size=2) as source:

        @app.handler
        def step(payload: Step, ctx: Context) -> None:
            with ctx.transaction(source) as connection:
                if payload.n == 1:
                    app.start_blocking(group(Step(n=2), Step(n=3), name="more"), connection=connection, inside=ctx)

        @app.handler
        def add_up(payload: Sum, ctx: Context) -> None:
            got.append(ctx.parents.results_blocking())

        async with working(app), app:
            flow = Flow("sums")
            last = flow.add(Sum(), after=flow.add(Step(n=1)))
            flow_id = await started(pg, flow, app)
            await app.result(last.id, timeout=20)
    assert got == [{"step": None, "step/more/step": None, "step/more/step-2": None}]
    assert set((await states(pg, flow_id)).values()) == {"completed"}


async def test_nodes_are_added_only_in_the_transaction_of_a_running_node(redis_url, database_url, pg):
    app, said = App(settings=settings_for(redis_url, database_url, relay="on")), []

    @app.handler
    async def step(payload: Step, ctx: Context) -> None:
        async with ctx.database.acquire() as own, own.transaction():
            try:
                await app.start(chain(Step(n=9)), connection=own, inside=ctx)
            except UsageError as error:
                said.append(str(error))

    async with working(app), app:
        flow = chain(Step(n=1))
        await started(pg, flow, app)
        await app.result(flow.nodes[0].id, timeout=20)
    assert "in the transaction that ends it" in said[0]
    assert await pg.fetchval("select count(*) from streamworker.jobs") == 1


async def test_a_look_takes_as_many_notes_as_it_is_told(pg):
    """More would outlast the timeout of a statement, and be looked at anew for ever. So in the plan for a table that was small."""
    await pg.execute("insert into streamworker.flow_checks (node) values (0)")
    await pg.execute("vacuum analyze streamworker.flow_checks")
    await pg.execute("insert into streamworker.flow_checks (node) select number from generate_series(1, 59) as number")
    left = []
    for most in (7, 7, 100):
        await pg.fetchval("select streamworker.flow_look($1)", most)
        left.append(await pg.fetchval("select count(*) from streamworker.flow_checks"))
    assert left == [53, 46, 0]


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_node_that_waits_passes_its_order_key_on_when_its_flow_is_cancelled(
    redis_url, database_url, pg, raw, mode
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
        flow = Flow("trip")
        node = flow.add(Booking(account="a", n=0))
        flow_id = await started(pg, flow, app)
        await eventually(lambda: raw.hget("stream:{q}:halted", "a") is not None)
        second = await app.enqueue(Booking(account="a", n=1))
        assert await app.cancel_flow(flow_id)
        await app.result(second.id, timeout=20)  # it is behind the one that waited no more
        assert await pg.fetchval("select status from streamworker.jobs where id = $1", node.id) == "cancelled"
    assert seen == [1]
    assert not raw.exists("stream:{q}:halted") and not raw.exists("stream:{q}:order")
