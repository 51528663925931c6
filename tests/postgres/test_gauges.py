"""/metrics of what is in the ledger alone: flows, jobs that wait for others, for a signal or their time, flows that stand still."""

from __future__ import annotations

import json
import os
import signal
import urllib.request

from streamworker import Flow, chain, group
from streamworker.worker.metrics import OF_LEDGER
from tests import forkserver
from tests.cli.conftest import ROOT, Running
from tests.conftest import eventually_blocking
from tests.lifecycle.test_health import raw, start
from tests.lifecycle.test_metrics import SOON, samples, scrape
from tests.postgres.databases import beside
from tests.postgres.test_flows import Step, Sum, end, look, order, started

__all__ = ["raw", "start"]

PARK = """
insert into streamworker.jobs (id, queue_name, kind, payload, level, status, hop, waits_for, run_at)
select 'waits-' || n, 'q', 'k', '{}', 'normal', 'waiting', 1, case when n % 3 > 0 then 'go' end, now() + interval '1 h'
from generate_series(1, $1::integer) as n"""


async def gauges(pg):
    rows = await pg.fetch("select gauge, label, value from streamworker.gauges()")
    return {f"{row['gauge']} {row['label']}".strip(): row["value"] for row in rows}


async def test_flows_and_jobs_that_wait_are_counted(pg):
    assert set((await gauges(pg)).values()) == {0}
    for status in ("running", "completed", "failed", "cancelled"):
        flow_id = await started(pg, chain(Step(), Sum()))
        if status == "cancelled":
            await pg.fetch("select * from streamworker.cancel_flow($1)", flow_id)
            await look(pg)
        elif status != "running":
            await end(pg, flow_id, "step", "completed" if status == "completed" else "dead")
        if status == "completed":
            await end(pg, flow_id, "sum")
    await pg.execute(PARK, 9)
    assert await gauges(pg) == {
        "flows running": 1, "flows completed": 1, "flows failed": 1, "flows cancelled": 1, "blocked": 1,
        "waiting signal": 6, "waiting time": 3, "stuck held": 0, "stuck unlooked": 0,
    }  # fmt: skip


async def test_flows_that_stand_still_are_counted_until_they_go_on(pg):
    held = [await started(pg, order(if_failed="hold")[0]) for _ in range(3)]
    for flow_id in held:
        await end(pg, flow_id, "charge", "dead")
    assert (await gauges(pg))["stuck held"] == 3
    await pg.fetchval("select streamworker.retry_flow($1)", held[0])
    await pg.fetch("select * from streamworker.cancel_flow($1)", held[1])
    assert (await gauges(pg))["stuck held"] == 1
    await look(pg)
    assert (await gauges(pg))["stuck unlooked"] == 0
    flow_id = await started(pg, chain(group(*(Step(n=n) for n in range(200))), Sum()))
    await end(pg, flow_id, "group/step")  # a relay has to look
    assert (await gauges(pg))["stuck unlooked"] == 0  # not yet late
    await pg.execute("update streamworker.flow_checks set at = now() - interval '2 minutes'")
    assert (await gauges(pg))["stuck unlooked"] == 1
    await look(pg)
    assert (await gauges(pg))["stuck unlooked"] == 0


async def test_many_are_estimated_and_read_from_indexes_alone(pg):
    await pg.execute(PARK, 30_000)
    await pg.execute(
        "insert into streamworker.flows (id, name, status) select 'f' || n, 'many', 'completed' from generate_series(1, 20000) as n"
    )
    await pg.execute("vacuum analyze streamworker.jobs, streamworker.flows")
    count = (
        "select coalesce(sum(seq_scan), 0) from pg_stat_user_tables where relname in ('jobs', 'flows', 'flow_nodes')"
    )

    async def scans():
        await pg.execute("select pg_stat_force_next_flush()")
        await pg.execute("select 1")
        await pg.execute("select pg_stat_clear_snapshot()")
        return await pg.fetchval(count)

    before = await scans()
    found = await gauges(pg)
    assert await scans() == before
    assert 18_000 < found["waiting signal"] < 22_000
    assert 10_000 <= found["waiting time"] < 11_000
    assert 19_000 < found["flows completed"] < 21_000


def test_a_worker_tells_them_and_goes_without_while_postgres_is_away(start, redis_url, raw, own_postgres):
    worker = start(redis_url, DATABASE_URL=own_postgres.url(), LEDGER="on", constants=SOON).ready()
    beside(filled, own_postgres.url())

    def told(name: str, **labels: str) -> float | None:
        return samples(scrape(worker)).get((f"streamworker_{name}", tuple(sorted(labels.items()))))

    eventually_blocking(lambda: told("waiting_jobs", until="signal") == 6, 20)
    assert told("waiting_jobs", until="time") == 3
    assert told("blocked_jobs") == 2
    assert told("flows", status="running") == 2
    assert told("flows_stuck", reason="held") == 1
    kinds = {line.split()[2] for line in scrape(worker).splitlines() if line.startswith("# TYPE")}
    assert {family.name for family in OF_LEDGER.values()} < kinds
    own_postgres.kill()
    eventually_blocking(lambda: told("flows", status="running") is None, 20)
    assert told("redis_up") == 1
    own_postgres.start()
    eventually_blocking(lambda: told("flows", status="running") == 2, 20)


async def filled(url: str) -> None:
    import asyncpg

    pg = await asyncpg.connect(url)
    await pg.execute(PARK, 9)
    held = Flow("held")
    held.add(Step(), after=held.add(Step(), name="first", if_failed="hold"))
    flow_id = await started(pg, held)
    await end(pg, flow_id, "first", "dead")
    await started(pg, chain(Step(), Step()))
    await pg.execute("update streamworker.jobs set run_at = now() + interval '1 h' where status = 'queued'")
    await pg.close()


def test_a_relay_tells_them_where_no_worker_is(redis_url, database_url, tmp_path):
    beside(filled, database_url)
    env = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "STREAMWORKER_HTTP": "127.0.0.1:0"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")}
    relay = Running(
        forkserver.forked(["relay"], cwd=tmp_path, env={**clean, **env, "PYTHONPATH": str(ROOT)}, constants=SOON)
    )
    try:
        eventually_blocking(lambda: relay.saw("relay_ready") and relay.saw("http_listening"), 30)
        address = next(json.loads(line)["address"] for line in relay.lines if "http_listening" in line)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            found = samples(answer.read().decode())
        assert found["streamworker_blocked_jobs", ()] == 2
        assert found["streamworker_waiting_jobs", (("until", "signal"),)] == 6
        assert found["streamworker_flows_stuck", (("reason", "held"),)] == 1
        relay.signal(signal.SIGTERM)
        assert relay.wait(15) == 0
    finally:
        relay.kill()
        relay.process.stderr.close()
