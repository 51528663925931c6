"""``streamworker flows``: list, show as a tree, cancel, retry, delete."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from streamworker import App, Settings, chain, group
from streamworker.errors import StreamworkerError
from streamworker.operators import FlowOperator
from streamworker.operators.audit_trail import ACTOR, Actor
from tests import inprocess
from tests.postgres.test_flows import Step, Sum, end, flow_status, look, order, started, states

ROOT = Path(__file__).parents[2]


@pytest.fixture
def flows(database_url, redis_url):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))}
    env |= {"PYTHONPATH": str(ROOT), "REDIS_URL": redis_url, "DATABASE_URL": database_url}

    def call(*words: str, code: int = 0, program: str = "flows", job: str = "", **more: str):
        words = ("--job", job, "--json") if job else words
        done = inprocess.run([program, *words], env={**env, **more}, cwd=ROOT)
        assert done.returncode == code, done.stderr
        return done

    return call


async def test_a_flow_is_listed_and_shown_as_a_tree(pg, flows):
    flow_id = await started(pg, order()[0])
    await end(pg, flow_id, "charge")
    await end(pg, flow_id, "pack", "dead")
    rows = [json.loads(line) for line in flows("list", "--json").stdout.splitlines()]
    assert [(row["id"], row["status"], row["nodes"]) for row in rows] == [
        (flow_id, "running", {"ok": 1, "failed": 1, "queued": 2, "blocked": 1, "skipped": 1})
    ]
    assert flow_id in flows().stdout
    assert flows("list", "--status", "failed").stderr.strip() == "streamworker: no flows"
    lines = flows("show", flow_id).stdout.splitlines()
    tree = [line.split("  01")[0].rstrip() for line in lines[-6:]]
    assert tree[0].startswith("`- [+] charge  ok")
    assert tree[1:] == [
        "   |- [x] pack  failed",
        "   |- [.] label  queued",
        "   |  `- [ ] ship  blocked  after pack, too",
        "   |- [-] refund  skipped  when failed",
        "   `- [.] tidy  queued  when always",
    ]
    shown = json.loads(flows("show", flow_id, "--json").stdout)
    assert {node["name"]: node["state"] for node in shown["graph"]}["ship"] == "blocked"


async def test_many_alike_are_counted_and_flows_in_flows_are_seen_through(pg, flows):
    flow = chain(Step(n=1), group(*(Step(n=n) for n in range(500)), name="all"), Sum(), key="k")
    await started(pg, flow)
    lines = flows("show", "k").stdout.splitlines()
    assert len(lines) < 25
    assert any("and 491 more: 491 blocked (--all shows them)" in line for line in lines), lines
    assert any("[ ] sum  blocked  after all/step" in line for line in lines), lines
    assert len(flows("show", "k", "--all").stdout.splitlines()) > 500


async def test_flows_are_cancelled_retried_and_deleted_as_one(pg, flows):
    flow_id = await started(pg, order()[0])
    await end(pg, flow_id, "charge")
    assert "has not ended: cancel it first" in flows("delete", flow_id, "--yes", code=1).stderr
    assert flows("cancel", flow_id).stdout.strip() == f"{flow_id}: cancelled"
    await look(pg)
    assert await flow_status(pg, flow_id) == "cancelled"
    assert "it has ended" in flows("cancel", flow_id, code=1).stderr
    assert flows("retry", flow_id).stdout.strip() == f"{flow_id}: 3 jobs queued"
    assert (await states(pg, flow_id))["ship"] == "blocked"
    await look(pg)
    flows("cancel", flow_id)
    await look(pg)
    assert flows("delete", flow_id, "--yes").stdout.strip() == f"{flow_id}: deleted"
    assert await pg.fetchval("select count(*) from streamworker.jobs") == 0
    assert "knows no flow" in flows("show", flow_id, code=1).stderr
    kept = await pg.fetch(
        "select source, action, result, details from streamworker.audit where job_id = $1 order by id", flow_id
    )
    assert [tuple(row) for row in kept] == [
        ("cli", "delete flow", "gone", "order"),
        ("cli", "cancel flow", "done", "order"),
        ("cli", "cancel flow", "gone", "order"),
        ("cli", "retry flow", "done", "order"),
        ("cli", "cancel flow", "done", "order"),
        ("cli", "delete flow", "done", "order"),
    ]
    shown = flows(program="audit", job=flow_id)
    assert [json.loads(line)["action"] for line in shown.stdout.splitlines()][:2] == ["delete flow", "cancel flow"]


async def test_an_operator_of_a_program_is_kept_too(pg, database_url, redis_url, raw):
    app = App(settings=Settings(redis_url=redis_url, database_url=database_url))
    flow_id = await started(pg, chain(Step(), Step(), key="1"))
    async with app.operator() as operator, app.archive() as archive:
        ACTOR.set(Actor("ann", "python"))
        flow = await archive.flows.find(flow_id)
        assert flow is not None
        assert await FlowOperator(archive, operator).cancel(flow)
        await look(pg)
        assert await FlowOperator(archive, operator).retry(flow) == 1
        await pg.execute("alter table streamworker.flows rename to flows_away")
        with pytest.raises(StreamworkerError):
            await FlowOperator(archive, operator).cancel(flow)
    kept = await pg.fetch(
        "select who, source, action, job_id, result, details from streamworker.audit where action like '%flow' order by id"
    )
    assert [tuple(row)[:4] for row in kept] == [
        ("ann", "python", f"{what} flow", flow_id) for what in ("cancel", "retry", "cancel")
    ]
    assert [row["result"][:8] for row in kept] == ["done", "done", "refused:"]
    assert {row["details"] for row in kept} == {"chain, key=1"}


async def test_a_program_finds_and_cancels_flows(pg, database_url, redis_url):
    app = App(settings=Settings(redis_url=redis_url, database_url=database_url))
    flow_id = await started(pg, chain(Step(), Step(), key="1"))
    async with app:
        found = await app.find_flow("1")
        assert found is not None
        assert (found.id, found.status, found.nodes) == (flow_id, "running", {"queued": 1, "blocked": 1})
        assert await app.cancel_flow(flow_id)
        await look(pg)
        assert not await app.cancel_flow(flow_id)
        assert await app.find_flow("none") is None


def test_without_a_ledger_one_sentence_says_so(flows, empty_database):
    done = flows("list", code=78, DATABASE_URL=empty_database)
    assert "streamworker migrate up" in done.stderr
    assert len(done.stderr.splitlines()) == 1
