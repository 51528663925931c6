"""Worker processes that are killed and frozen between PostgreSQL and Redis."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from tests import forkserver
from tests.conftest import eventually, nothing_left

ROOT = Path(__file__).parents[2]
Q = "stream:{q}"


class Process:
    """One worker process."""

    def __init__(self, redis_url: str, database_url: str, log: Path, **more: Any) -> None:
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))
        }
        env |= {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "PYTHONPATH": str(ROOT)}
        env |= {"STREAMWORKER_LEASE": "1", "STREAMWORKER_LEDGER": "on", "STREAMWORKER_RELAY": "off"}
        env |= {name: str(value) for name, value in more.items()}
        self.log = log
        with log.open("wb") as out:
            self.process = forkserver.forked(
                [], module="tests.postgres.apps", env=env, cwd=ROOT, stdout=out, stderr=out
            )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def said(self, event: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("{")]
        return [each for each in map(json.loads, lines) if each.get("event") == event]

    async def ready(self) -> Process:
        await eventually(lambda: self.ended or self.said("worker_ready"), 30)
        assert not self.ended, self.log.read_text()
        return self


Start = Callable[..., Process]


@pytest.fixture
def start(redis_url: str, database_url: str, tmp_path: Path) -> Iterator[Start]:
    processes: list[Process] = []

    def make(**more: Any) -> Process:
        processes.append(Process(redis_url, database_url, tmp_path / f"worker{len(processes)}.log", **more))
        return processes[-1]

    yield make
    for each in processes:
        each.process.kill()
        each.process.wait()
        print(f"--- {each.log.name}\n{each.log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(autouse=True)
async def table(pg: asyncpg.Connection) -> None:
    await pg.execute("create table effect (job text, worker text)")


def put(raw: redis.Redis, job_id: str, how: str) -> None:
    raw.xadd(Q, {"job": json.dumps({"id": job_id, "kind": "work", "payload": {"how": how}})})


def ran(raw: redis.Redis) -> list[list[str]]:
    return [each.decode().split()[:2] for each in raw.lrange("queue:trace:ran", 0, -1)]


async def job(pg: asyncpg.Connection, job_id: str = "a") -> dict[str, Any]:
    found = await pg.fetchrow("select * from streamworker.jobs where id = $1", job_id)
    return dict(found) if found is not None else {"status": None}


def ended(raw: redis.Redis) -> bool:
    return nothing_left(raw, Q)


@pytest.mark.parametrize(
    ("how", "hops", "status", "dead"),
    [
        ("ok", ["0"], "completed", 0),
        ("write", ["0"], "completed", 0),
        ("fail", ["0", "1"], "dead", 1),
        ("discard", ["0"], "dead", 1),
        ("snooze", ["0", "1"], "completed", 0),
    ],
)
async def test_a_recorded_verdict_outlives_its_worker(start, raw, pg, how, hops, status, dead):
    """Killed after PostgreSQL's commit and before Redis: applied again, not run again."""
    doomed = await start(CRASH_AT="settle").ready()
    put(raw, "a", how)
    await eventually(lambda: doomed.ended, 20)
    assert (await job(pg))["status"] is not None and raw.xlen(Q) == 1
    await start().ready()
    await eventually(lambda: ended(raw), 20)
    assert ran(raw) == [["a", hop] for hop in hops]
    assert (await job(pg))["status"] == status
    assert raw.xlen(f"{Q}:dead") == dead
    assert await pg.fetchval("select count(*) from effect") == (how == "write")
    if how == "fail":
        assert (await job(pg))["attempt_count"] == 2


@pytest.mark.parametrize(("how", "times"), [("write", 1), ("ok", 2)])
async def test_killed_before_the_record(start, raw, pg, how, times):
    """What the handler committed itself is known, and does not run again; anything else does."""
    doomed = await start(CRASH_AT="record").ready()
    put(raw, "a", how)
    await eventually(lambda: doomed.ended, 20)
    assert (await job(pg))["status"] == ("completed" if how == "write" else None)
    await start().ready()
    await eventually(lambda: ended(raw), 20)
    assert ran(raw) == [["a", "0"]] * times
    assert await pg.fetchval("select count(*) from effect") == (how == "write")
    assert (await job(pg))["status"] == "completed"


async def test_killed_in_the_transaction(start, raw, pg):
    doomed = await start().ready()
    put(raw, "a", "hold")
    await eventually(lambda: ran(raw))
    doomed.signal(signal.SIGKILL)
    raw.set("queue:trace:go", 1)
    await start().ready()
    await eventually(lambda: ended(raw), 20)
    assert await pg.fetchval("select count(*) from effect") == 1
    assert ((await job(pg))["status"], (await job(pg))["deliveries"]) == ("completed", 2)


async def test_a_zombie_changes_nothing(start, raw, pg):
    """Frozen past its lease before its first statement, it wakes when the job is done elsewhere."""
    zombie = await start().ready()
    put(raw, "a", "freeze")
    await eventually(lambda: ran(raw))
    zombie.signal(signal.SIGSTOP)
    await start().ready()
    await eventually(lambda: ended(raw), 20)
    before = await job(pg)
    assert (before["status"], before["deliveries"]) == ("completed", 2)
    zombie.signal(signal.SIGCONT)
    await eventually(lambda: zombie.said("run_ended") or zombie.said("claim_lost"), 20)
    zombie.signal(signal.SIGTERM)
    await eventually(lambda: zombie.ended, 20)
    assert await job(pg) == before
    assert [each["worker"] for each in await pg.fetch("select worker from effect")] == [before["worker_id"]]
    assert not raw.exists(f"{Q}:dead")


async def test_a_zombie_that_holds_the_row_does_not_block_its_successor_into_failure(start, raw, pg):
    """Frozen inside its transaction: the job waits, uncharged, until the server ends the frozen session."""
    zombie = await start(TIMEOUT=5).ready()
    put(raw, "a", "hold")
    await eventually(lambda: ran(raw))
    # The handler's own statement is done: before that, its transaction may have begun and hold nothing yet.
    holds = (
        "select count(*) from pg_stat_activity where state = 'idle in transaction' and query like 'insert into effect%'"
    )
    await eventually(lambda: pg.fetchval(holds))
    zombie.signal(signal.SIGSTOP)
    raw.set("queue:trace:go", 1)
    successor = await start().ready()
    await eventually(lambda: successor.said("job_released"), 20)
    assert not successor.said("job_retry") and not successor.said("job_dead")
    await eventually(lambda: ended(raw), 40)
    zombie.signal(signal.SIGCONT)
    zombie.signal(signal.SIGTERM)
    await eventually(lambda: zombie.ended, 20)
    stored = await job(pg)
    assert (stored["status"], stored["attempt_count"]) == ("completed", 0)
    assert [each["worker"] for each in await pg.fetch("select worker from effect")] == [stored["worker_id"]]
    assert not raw.exists(f"{Q}:dead")


@pytest.mark.parametrize("at", ["record", "settle"])
async def test_an_expired_job_stays_so_whenever_its_worker_dies(start, raw, pg, at):
    raw.xadd(Q, {"job": '{"id": "a", "kind": "work", "payload": {"how": "ok"}, "expires_at": "2020-01-01T00:00:00Z"}'})
    doomed = start(CRASH_AT=at)
    await eventually(lambda: doomed.ended)
    assert raw.xlen(Q) == 1
    await start().ready()
    await eventually(lambda: ended(raw))
    assert (await job(pg))["status"] == "expired"
    assert not ran(raw) and not raw.xlen(f"{Q}:dead")


async def test_a_held_key_is_freed_by_whoever_settles_the_end_of_its_job(start, raw, pg):
    """Killed between PostgreSQL and Redis: the job is completed and does not run again, and its key is free after all."""
    key = "stream:{q}:key:k"
    body = {"id": "a", "key": "k", "unique": "done", "kind": "work", "payload": {"how": "ok"}}
    raw.xadd(Q, {"job": json.dumps(body)})
    raw.set(key, "a")
    doomed = start(CRASH_AT="settle")
    await eventually(lambda: doomed.ended)
    assert (await job(pg))["status"] == "completed" and raw.get(key) == b"a"
    await start().ready()
    await eventually(lambda: ended(raw))
    assert len(ran(raw)) == 1 and not raw.exists(key)


async def test_a_worker_that_is_killed_in_its_job_frees_no_key_and_its_rescuer_does(start, raw, pg):
    key = "stream:{q}:key:k"
    raw.xadd(
        Q, {"job": json.dumps({"id": "a", "key": "k", "unique": "done", "kind": "work", "payload": {"how": "hold"}})}
    )
    raw.set(key, "a")
    doomed = start()
    await eventually(lambda: ran(raw))
    doomed.signal(signal.SIGKILL)
    await eventually(lambda: doomed.ended)
    assert raw.get(key) == b"a"
    raw.set("queue:trace:go", "1")
    await start().ready()
    await eventually(lambda: ended(raw))
    assert not raw.exists(key)


KILLS = int(os.environ.get("STEP_KILLS", "12"))
"""Workers killed by the test below; 1,000 take some minutes."""


async def test_a_step_is_called_again_only_if_its_process_died_inside_of_it(start, raw, pg):
    """Workers are killed at any moment: between two calls of one step its process died, and none begins a step before it."""
    rng, killed, sent = random.Random(KILLS), set(), 0
    more = {"STREAMWORKER_MAX_DELIVERIES": 1000, "STREAMWORKER_CONCURRENCY": 4, "STREAMWORKER_LOG_LEVEL": "warning"}

    def put_order() -> None:
        nonlocal sent
        raw.xadd(Q, {"job": json.dumps({"id": f"order-{sent}", "kind": "order", "payload": {}})})
        sent += 1

    def fresh() -> Process:
        return start(**more)

    def said(process: Process) -> int:
        return sum(each.endswith(b" %d" % process.process.pid) for each in raw.lrange("queue:trace:steps", -200, -1))

    workers = [fresh() for _ in range(2)]
    for _ in range(KILLS):
        while raw.xlen(Q) < 12:  # more than two workers have in hand
            put_order()
        doomed, late = workers.pop(0), time.monotonic() + 2.0
        while time.monotonic() < late and said(doomed) <= rng.randrange(6):  # noqa: ASYNC110 - a trace in Redis
            await asyncio.sleep(0.005)
        await asyncio.sleep(rng.uniform(0, 0.05))
        killed.add(doomed.process.pid)
        doomed.signal(signal.SIGKILL)
        doomed.process.wait()
        workers.append(fresh())
    await eventually(lambda: raw.xlen(Q) == 0, 60)

    calls: dict[str, list[tuple[int, int]]] = {}
    for each in raw.lrange("queue:trace:steps", 0, -1):
        job_id, step, pid = each.decode().split()
        calls.setdefault(job_id, []).append((int(step), int(pid)))
    assert len(calls) == sent
    again = 0
    for job_id, made in calls.items():
        assert [step for step, _ in made] == sorted(step for step, _ in made), (job_id, made)
        assert {step for step, _ in made} == set(range(6)), (job_id, made)
        for (step, pid), (following, _) in itertools.pairwise(made):
            if step == following:
                again += 1
                assert pid in killed, (job_id, made)
    print(f"{len(killed)} kills, {sent} jobs, {sum(map(len, calls.values()))} calls, {again} of them again")
    assert await pg.fetchval("select count(*) from effect") == sent
    assert await pg.fetchval("select count(distinct job) from effect where worker = 'step'") == sent
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed'") == sent


async def test_the_step_of_a_frozen_worker_is_refused(start, raw, pg):
    """It wakes when its successor has the job: what it did is not recorded, and what it goes on with neither."""
    zombie = await start().ready()
    raw.xadd(Q, {"job": json.dumps({"id": "order-0", "kind": "order", "payload": {}})})
    await eventually(lambda: raw.llen("queue:trace:steps"), 20)
    zombie.signal(signal.SIGSTOP)
    await start().ready()
    await eventually(lambda: pg.fetchval("select status = 'completed' from streamworker.jobs"), 20)
    zombie.signal(signal.SIGCONT)
    await eventually(
        lambda: zombie.said("settle_lost") or zombie.said("run_overruled") or zombie.said("lease_lost"), 20
    )
    workers = {row[0] for row in await pg.fetch("select worker_id from streamworker.job_steps where deliveries = 1")}
    assert len(workers) <= 1
    assert await pg.fetchval("select count(*) from effect") == 1
    steps = [each.decode().split() for each in raw.lrange("queue:trace:steps", 0, -1)]
    frozen = [int(step) for _, step, pid in steps if int(pid) == zombie.process.pid]
    assert len(frozen) == len(set(frozen)) and max(frozen) < 6


@pytest.mark.parametrize("signal_first", [False, True])
async def test_a_job_whose_worker_dies_as_it_parks_waits_and_goes_on(start, raw, pg, signal_first):
    """Killed after PostgreSQL holds the waiting job and before Redis lets it go: the entry is settled unrun."""
    doomed = await start(CRASH_AT="settle").ready()
    put(raw, "a", "wait")
    await eventually(lambda: doomed.ended, 20)
    assert ((await job(pg))["status"], raw.xlen(Q)) == ("waiting", 1)
    if signal_first:
        assert await pg.fetchval("select streamworker.signal('a', 'go')")
    await start(STREAMWORKER_RELAY="on").ready()
    if not signal_first:
        await eventually(lambda: ended(raw), 20)
        assert (ran(raw), (await job(pg))["status"]) == ([["a", "0"]], "waiting")
        assert await pg.fetchval("select streamworker.signal('a', 'go')")
    await eventually(lambda: pg.fetchval("select status = 'completed' from streamworker.jobs"), 20)
    await eventually(lambda: ended(raw), 20)
    assert ran(raw) == [["a", "0"], ["a", "2"]]


async def test_a_job_whose_worker_dies_before_it_parks_runs_again_and_waits(start, raw, pg):
    doomed = await start(CRASH_AT="park").ready()
    put(raw, "a", "wait")
    await eventually(lambda: doomed.ended, 20)
    assert (await job(pg))["status"] == "running"
    await start(STREAMWORKER_RELAY="on").ready()
    await eventually(lambda: pg.fetchval("select status = 'waiting' from streamworker.jobs"), 20)
    assert await pg.fetchval("select streamworker.signal('a', 'go')")
    await eventually(lambda: pg.fetchval("select status = 'completed' from streamworker.jobs"), 20)
    assert ran(raw) == [["a", "0"], ["a", "0"], ["a", "2"]]
