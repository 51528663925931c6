"""The contract of the ledger: what is recorded, what is answered, what is known, in every order things can happen."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import msgspec
import pytest

from streamworker.postgres import Known, RunRecord, Stored
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.pool import Database, open_database


def run_of(job_id: str, *, hop: int = 0, deliveries: int = 1, status: Any = "completed", **more: Any) -> RunRecord:
    """A finished run of a job as the worker would tell it."""
    payload = more.pop("payload", b'{"n": 1}')
    headers = more.pop("headers", None)
    document = b'{"id": %s, "payload": %s}' % (json.dumps(job_id).encode(), payload)
    now = time.time()
    return RunRecord(
        job_id, more.pop("queue", "q"), more.pop("kind", "k"), "normal", hop, deliveries,
        more.pop("attempt", 1), more.pop("attempts", 0), 20, b"epoch", document, msgspec.Raw(payload), headers, now - 1,
        None, status, more.pop("outcome", "ok"), now, **more,
    )  # fmt: skip


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await open_database(database_url)
    yield database
    database.close()


@pytest.fixture(params=[False, True], ids=["may be known", "taken for new"])
def ledger(request: pytest.FixtureRequest, database: Database) -> PostgresLedger:
    """Whether jobs are taken for new is a guess: right or wrong, what is stored and answered is the same."""
    return Guessing(database, database.pool, "worker-1", new=request.param)


class Guessing(PostgresLedger):
    def __init__(self, *arguments: Any, new: bool) -> None:
        super().__init__(*arguments)
        self._new = new

    async def record(self, runs: Sequence[RunRecord]) -> list[Stored]:
        for run in runs:
            run.new = self._new
        return await super().record(runs)


async def row(pg: asyncpg.Connection, job_id: str) -> dict[str, Any]:
    found = await pg.fetchrow("select * from streamworker.jobs where id = $1", job_id)
    assert found is not None
    return dict(found)


async def logs(pg: asyncpg.Connection, job_id: str) -> list[tuple[int, int, str]]:
    rows = await pg.fetch(
        "select hop, deliveries, outcome from streamworker.job_logs where job_id = $1 order by hop, deliveries", job_id
    )
    return [tuple(each) for each in rows]


async def test_a_run_is_one_row_and_one_attempt(ledger, pg):
    run = run_of("a", result=b'{"sum": 3}', headers={"traceparent": "00-1"})
    assert await ledger.record([run]) == [Stored.STORED]
    stored = await row(pg, "a")
    assert (stored["queue_name"], stored["kind"], stored["status"], stored["worker_id"]) == (
        "q",
        "k",
        "completed",
        "worker-1",
    )
    assert (json.loads(stored["payload"]), json.loads(stored["result"])) == ({"n": 1}, {"sum": 3})
    assert json.loads(stored["headers"]) == {"traceparent": "00-1"}
    assert stored["started_at"] < stored["finished_at"]
    assert stored["document"] is None and stored["epoch"] == "epoch"
    assert await logs(pg, "a") == [(0, 1, "ok")]


async def test_recording_again_changes_nothing(ledger, pg):
    run = run_of("a", result=b"1")
    await ledger.record([run])
    before = await row(pg, "a")
    assert await ledger.record([run]) == [Stored.STORED]
    after = await row(pg, "a")
    assert {**after, "updated_at": None} == {**before, "updated_at": None}
    assert await logs(pg, "a") == [(0, 1, "ok")]


@pytest.mark.parametrize("final", ["completed", "cancelled"])
async def test_what_has_ended_stays_so(ledger, pg, final):
    await ledger.record([run_of("a")])
    await pg.execute("update streamworker.jobs set status = $1", final)
    for status in ("retrying", "dead", "completed"):
        later = run_of("a", hop=3, deliveries=2, status=status, run_at=time.time(), error="no")
        assert await ledger.record([later]) == [Stored.ENDED]
    assert (await row(pg, "a"))["status"] == final
    assert (await row(pg, "a"))["hop"] == 0


@pytest.mark.parametrize(
    ("stored", "told", "answer"),
    [
        ((0, 1), (0, 1), Stored.STORED),
        ((0, 1), (0, 2), Stored.STORED),
        ((0, 9), (1, 1), Stored.STORED),
        ((0, 2), (0, 1), Stored.SUPERSEDED),
        ((2, 1), (1, 9), Stored.SUPERSEDED),
    ],
)
async def test_a_zombie_is_told_that_its_job_goes_on_elsewhere(ledger, pg, stored, told, answer):
    await ledger.record([run_of("a", hop=stored[0], deliveries=stored[1], status="running", outcome="x")])
    assert await ledger.record([run_of("a", hop=told[0], deliveries=told[1])]) == [answer]
    expected = told if answer is Stored.STORED else stored
    assert ((await row(pg, "a"))["hop"], (await row(pg, "a"))["deliveries"]) == expected


async def test_attempts_are_kept_one_by_one(ledger, pg):
    retry = run_of(
        "a", status="retrying", run_at=time.time() + 60, error="ValueError: no", outcome="raised", attempts=1
    )
    await ledger.record([retry])
    stored = await row(pg, "a")
    assert (stored["status"], stored["attempt_count"], stored["last_error"]) == ("retrying", 1, "ValueError: no")
    assert stored["run_at"] is not None and stored["finished_at"] is None
    await ledger.record([run_of("a", hop=1, attempt=2, attempts=1)])
    assert (await row(pg, "a"))["status"] == "completed"
    assert await logs(pg, "a") == [(0, 1, "raised"), (1, 1, "ok")]


async def test_one_job_twice_in_a_batch(ledger, pg):
    twins = [run_of("a"), run_of("b"), run_of("a", hop=1, status="dead", error="no")]
    assert await ledger.record(twins) == [Stored.STORED, Stored.STORED, Stored.ENDED]
    assert (await row(pg, "a"))["status"] == "completed"


async def test_an_order_of_ids_keeps_batches_from_deadlocks(ledger, database, pg):
    names = [f"job-{n}" for n in range(60)]

    async def record(worker: int) -> None:
        mine = PostgresLedger(database, database.pool, f"worker-{worker}")
        for hop in range(8):
            batch = [run_of(name, hop=hop, status="retrying", run_at=0.0, error="x") for name in names]
            random.Random(worker * 100 + hop).shuffle(batch)
            await mine.record(batch)

    await asyncio.gather(*(record(worker) for worker in range(4)))
    assert {each["hop"] for each in await pg.fetch("select hop from streamworker.jobs")} == {7}


POISON = {
    "NUL in the payload": {"payload": b'{"text": "a\\u0000b"}'},
    "half a surrogate pair": {"payload": b'{"text": "\\ud800"}'},
    "a number beyond numeric": {"payload": b'{"n": 1e999999}'},
    "deeper than the stack": {"payload": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"},
    "NUL in the headers": {"headers": {"x": "a\x00b"}},
    "NUL in the result": {"result": b'"\\u0000"'},
    "NUL in the error": {"status": "dead", "error": "a\x00b"},
    "half a surrogate pair in the error": {"status": "dead", "error": "a\ud800b"},
    "NUL in the kind": {"kind": "k\x00"},
    "a moment no calendar has": {"status": "retrying", "run_at": 1e300},
    "a megabyte of error": {"status": "dead", "error": "x" * 1_000_000},
    "many deliveries": {"deliveries": 2**53},
}


@pytest.mark.parametrize("name", POISON)
async def test_one_row_at_fault_holds_up_nobody(ledger, pg, name):
    poison = run_of("bad", **POISON[name])
    batch = [*(run_of(f"good-{n}") for n in range(20)), poison]
    assert await ledger.record(batch) == [Stored.STORED] * 21
    assert await pg.fetchval("select count(*) from streamworker.jobs where status = 'completed' and id <> 'bad'") == 20
    stored = await row(pg, "bad")
    assert stored["status"] == poison.status
    if stored["payload"] is None or (poison.headers and stored["headers"] is None):
        assert stored["document"] == poison.body
    if poison.result is not None:
        assert "could not be stored" in stored["last_error"]
    assert len(await logs(pg, "bad")) == 1


@pytest.mark.parametrize("job_id", ["x" * 200, "ä" * 100, "a\x00b", "'; drop table jobs --", "\U0001f600", "a\nb"])
async def test_every_id_a_document_may_have(ledger, job_id):
    assert await ledger.record([run_of(job_id)]) == [Stored.STORED]
    assert (await ledger.lookup([("q", job_id)]))["q", job_id].status == "completed"


async def test_looking_up(ledger, pg):
    at = time.time() + 100
    await ledger.record([
        run_of("done"),
        run_of("again", status="retrying", run_at=at, attempts=1, error="no"),
        run_of("gone", status="dead", error="discarded: no"),
        run_of("on", status="running", outcome="x"),
        run_of("ahead", hop=3, status="dispatched", outcome="x"),
    ])  # fmt: skip
    names = ["done", "again", "gone", "on", "ahead", "never seen"]
    known = {job_id: found for (_, job_id), found in (await ledger.lookup([("q", name) for name in names])).items()}
    assert sorted(known) == ["again", "ahead", "done", "gone", "on"]
    assert known["done"].status == "completed"
    assert known["again"] == Known("retrying", 0, 1, 1, pytest.approx(at, abs=0.001), "no")
    assert known["gone"].error == "discarded: no"
    assert known["ahead"].hop == 3


async def test_long_runs_are_noted_unless_something_is_known_of_them(ledger, pg):
    await ledger.record([run_of("done"), run_of("again", status="retrying", run_at=0.0, error="no")])
    await pg.execute(
        "insert into streamworker.jobs (id, queue_name, status, hop) values ('sent', 'q', 'dispatched', 1)"
    )
    runs = [run_of("done", status="running"), run_of("again", status="running"), run_of("new", status="running")]
    await ledger.running([*runs, run_of("sent", hop=1, status="running")])
    found = {each["id"]: each["status"] for each in await pg.fetch("select id, status from streamworker.jobs")}
    assert found == {"done": "completed", "again": "retrying", "new": "running", "sent": "running"}
    assert await pg.fetchval("select count(*) from streamworker.job_logs") == 2
    # The next hop of a retrying job is a new run.
    await ledger.running([run_of("again", hop=1, status="running")])
    assert (await row(pg, "again"))["status"] == "running"


async def test_a_row_somebody_works_on_is_told_later_and_holds_up_nobody(ledger, pg):
    await ledger.record([run_of("busy", status="running", outcome="x")])
    async with pg.transaction():
        await pg.execute("select * from streamworker.jobs where id = 'busy' for update")
        batch = [run_of("busy", hop=1), *(run_of(f"free-{n}") for n in range(10))]
        assert await ledger.record(batch) == [Stored.BUSY, *[Stored.STORED] * 10]
    assert await ledger.record(batch[:1]) == [Stored.STORED]
    assert (await row(pg, "busy"))["status"] == "completed"


async def test_queues_become_known(ledger, pg):
    await ledger.open(["b", "a"])
    await ledger.open(["a"])
    assert [each["name"] for each in await pg.fetch("select name from streamworker.job_queues order by 1")] == [
        "a",
        "b",
    ]


async def test_old_jobs_are_forgotten_by_their_queues_retention_and_the_dead_are_kept(ledger, pg):
    await ledger.open(["q", "short"])
    await pg.execute("update streamworker.job_queues set retention = '1 hour' where name = 'short'")
    await ledger.record([
        *(run_of(f"{queue}-{status}-{age}", queue=queue, status=status, error=None)
          for queue in ("q", "short") for status in ("completed", "dead") for age in ("new", "day", "year")),
        run_of("q-cancelled-year"),
    ])  # fmt: skip
    await pg.execute("update streamworker.jobs set status = 'cancelled' where id like '%cancelled%'")
    await pg.execute("update streamworker.jobs set finished_at = now() - interval '1 day' where id like '%-day'")
    await pg.execute("update streamworker.jobs set finished_at = now() - interval '1 year' where id like '%-year'")
    assert await ledger.tick() > 1
    left = {each["id"] for each in await pg.fetch("select id from streamworker.jobs")}
    assert left == {
        "q-completed-new", "q-completed-day", "short-completed-new",
        *(f"{queue}-dead-{age}" for queue in ("q", "short") for age in ("new", "day", "year")),
    }  # fmt: skip
    assert {each["job_id"] for each in await pg.fetch("select job_id from streamworker.job_logs")} == left


async def test_runs_are_recorded_while_others_are_noted(ledger, pg):
    """Both loops of a worker ask at any moment: a connection that is in use must not be asked again."""
    runs = [run_of(f"both-{n}") for n in range(40)]
    noted = [run_of(f"note-{n}", status="running") for n in range(40)]
    together = [
        ask for run, note in zip(runs, noted, strict=True) for ask in (ledger.record([run]), ledger.running([note]))
    ]
    answers = await asyncio.gather(*together)
    assert answers == [[Stored.STORED], None] * 40
    assert await pg.fetchval("select count(*) from streamworker.jobs") == 80
