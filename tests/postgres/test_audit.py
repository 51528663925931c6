"""Who did what to which jobs, from Python, the command line and the dashboard."""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx2
import pytest

from streamworker import App, Payload, Settings
from streamworker.operators import JobChange, cancel_job
from streamworker.operators.audit_trail import ACTOR, Actor
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.pool import open_database
from streamworker.web import Access, dashboard
from tests import inprocess
from tests.conftest import eventually
from tests.web.conftest import HERE, Browser, letter

ROOT = Path(__file__).parents[2]


async def rows(pg):
    return [dict(row) for row in await pg.fetch("select * from streamworker.audit order by id")]


async def test_each_change_is_a_row(redis_url, database_url, pg, raw):
    letter(raw, id="d1")
    raw.zadd("stream:{q}:due", {"low/later/0": 4e12})
    raw.hset(
        "stream:{q}:bodies", "low/later/0", json.dumps({"id": "later", "kind": "k", "payload": {"secret": "s3cret"}})
    )
    app = App(settings=Settings(redis_url=redis_url, database_url=database_url))
    async with app.operator() as operator:
        await operator.pause("q", "by me")
        (job,) = (await operator.dead("q")).rows
        assert await operator.replay(job)
        assert not await operator.replay(job)
        ACTOR.set(Actor("ann", "python"))
        (later,) = (await operator.delayed("q")).rows
        assert await app.changer(operator).change(later, JobChange(level="high"))
        (later,) = (await operator.delayed("q")).rows
        assert await operator.forget(later)
        await operator.cancel("q", "nothing")
    found = await rows(pg)
    told = [(row["action"], row["queue_name"], row["job_id"], row["result"]) for row in found]
    assert told == [
        ("pause", "q", None, "done"), ("replay", "q", "d1", "done"), ("replay", "q", "d1", "gone"),
        ("change", "q", "later", "done"), ("forget", "q", "later", "done"), ("cancel", "q", "nothing", "gone"),
    ]  # fmt: skip
    assert [row["who"] for row in found[3:]] == ["ann"] * 3
    assert "@" in found[0]["who"]
    assert "s3cret" not in str(found)


async def test_the_dashboard_keeps_who_signed_in_and_viewers_change_nothing(redis_url, database_url, pg, raw):
    letter(raw, id="d1")
    letter(raw, id="d2")
    access = Access(user="ann", password="a", viewer="vic", viewer_password="v")
    site = dashboard(App(settings=Settings(redis_url=redis_url, database_url=database_url)), access=access)
    transport = httpx2.ASGITransport(app=site, client=("127.0.0.1", 5))
    try:
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, auth=("vic", "v")) as client:
            viewer = Browser(client)
            page = await viewer.text("/dead")
            assert "d1" in page
            assert 'data-do="replay"' not in page
            token = await viewer.token()
            answer = await viewer.post("pause", {"queue": "q"}, {"x-csrf-token": token, "origin": HERE})
            assert (answer.status_code, answer.text) == (403, "Viewers change nothing: ask an operator.\n")
            answer = await client.get(f"/payload?place=dead&queue=q&id={raw.xrange('stream:{q}:dead')[0][0].decode()}")
            assert answer.status_code == 400 and "payloads are shown to operators alone" in answer.text
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, auth=("ann", "a")) as client:
            operator = Browser(client)
            assert (await operator.do("pause", queue="q"))["ok"]
            await operator.do("campaign", what="replay", queue="q")

            async def kept():
                return [(row["who"], row["source"], row["action"]) for row in await rows(pg)]

            await eventually(lambda: raw.xlen("stream:{q}:dead") == 0)

            async def all_kept():
                return await kept() == [("ann", "dashboard", "pause"), *[("ann", "dashboard", "replay")] * 2]

            await eventually(all_kept)
    finally:
        await site.aclose()


async def test_the_header_of_a_trusted_proxy_and_of_nobody_else(redis_url):
    access = Access(user_header="X-Forwarded-User", proxies=("10.0.0.0/8",), operators=("ann",))
    site = dashboard(App(settings=Settings(redis_url=redis_url)), access=access)
    try:
        for peer, headers, expected in (
            ("10.1.2.3", {"x-forwarded-user": "ann"}, (200, True)),
            ("10.1.2.3", {"x-forwarded-user": "vic"}, (200, False)),
            ("10.1.2.3", {}, (401, False)),
            ("192.0.2.7", {"x-forwarded-user": "ann"}, (401, False)),
        ):
            transport = httpx2.ASGITransport(app=site, client=(peer, 5))
            async with httpx2.AsyncClient(transport=transport, base_url=HERE, headers=headers) as client:
                answer = await client.get("/delayed")
                assert (answer.status_code, "read-only" not in answer.text and answer.status_code == 200) == expected
    finally:
        await site.aclose()


class Waits(Payload, kind="waits", queue="q"):
    n: int = 0


async def test_changes_of_the_ledger_alone_are_rows_too(redis_url, database_url, pg, raw):
    """Jobs that wait in the outbox or for a signal never reach an operator of Redis; a job is cancelled in one row."""
    settings = Settings(redis_url=redis_url, database_url=database_url)
    app = App(settings=settings)
    async with pg.transaction():
        ids = [str((await app.enqueue(Waits(n=n), connection=pg)).id) for n in range(3)]
    ACTOR.set(Actor("ann", "cli"))
    await pg.execute("insert into streamworker.job_queues (name) values ('q')")
    async with app.archive() as archive, app.operator() as operator:
        assert await cancel_job(archive, operator, "q", ids[0]) == "cancelled"
        assert await archive.retry("q", ids[0])
        assert not await archive.retry("q", ids[0])
        await pg.execute("update streamworker.jobs set status = 'dispatched' where id = $1", ids[1])
        await cancel_job(archive, operator, "q", ids[1])
        assert await archive.signal(ids[2], "approved", '{"by": "s3cret"}', "q")
        await pg.execute(
            "update streamworker.jobs set status = 'completed', finished_at = now() - interval '1 day' where id = $1",
            ids[2],
        )
        assert await archive.prune("q", older=3600) == 1
    found = await rows(pg)
    assert sorted((row["action"], row["job_id"], row["result"]) for row in found if row["action"] != "prune jobs") == sorted([
        ("cancel", ids[0], "done"), ("retry", ids[0], "done"), ("retry", ids[0], "gone"), ("cancel", ids[1], "gone"),
        ("signal", ids[2], "done"),
    ])  # fmt: skip
    (pruned,) = (row for row in found if row["action"] == "prune jobs")
    assert (pruned["queue_name"], pruned["details"], pruned["result"]) == ("q", "older=3600, 1 jobs", "done")
    assert {(row["who"], row["source"]) for row in found} == {("ann", "cli")}
    assert "s3cret" not in str(found)


async def test_the_command_line_keeps_them(database_url, redis_url, pg):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))}
    env |= {"PYTHONPATH": str(ROOT), "REDIS_URL": redis_url, "DATABASE_URL": database_url}
    async with pg.transaction():
        job_id = str((await App(settings=Settings()).enqueue(Waits(), connection=pg)).id)

    def call(*words: str) -> str:
        done = inprocess.run([*words], env=env, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    call("jobs", "cancel", job_id, "--yes")
    (row,) = map(json.loads, call("audit", "--job", job_id, "--json").splitlines())
    assert (row["action"], row["source"], row["kind"], row["result"]) == ("cancel", "cli", "waits", "done")


@pytest.mark.parametrize("way", ["cli", "python"])
async def test_an_erasure_is_kept_and_says_nothing_of_the_person(way, database_url, redis_url, pg):
    app = App(settings=Settings(redis_url=redis_url, database_url=database_url))
    async with pg.transaction():
        await app.enqueue(Waits(n=17), connection=pg, headers={"who": "ann@example.org"})
    if way == "python":
        ACTOR.set(Actor("ann", "python"))
        async with app:
            assert len((await app.erase({"n": 17}, queue="q")).jobs) == 1
    else:
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "REDIS_URL": redis_url,
            "DATABASE_URL": database_url,
        }
        done = inprocess.run(["jobs", "erase", "--where", "n=17", "--yes"], env=env, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    found = await rows(pg)
    (row,) = (row for row in found if row["action"] == "erase")
    assert (row["queue_name"], row["job_id"], row["source"], row["details"]) == ("q", None, way, "1 jobs")
    assert "example.org" not in str(found)


async def test_old_rows_are_pruned_by_the_retention_of_the_setting(database_url, pg):
    assert Settings().audit_retention == 365 * 86_400
    await pg.execute(
        "insert into streamworker.audit (at, who, source, action, result)"
        " select now() - make_interval(days => day), 'ann', 'cli', day::text, 'done' from generate_series(0, 1500) as day"
    )
    database = await open_database(database_url, name="test")
    ledger = PostgresLedger(database, database.pool, "w", audit=10.5 * 86_400)
    pauses = [await ledger.tick() for _ in range(4)]
    assert pauses[0] < 1 < pauses[3]  # batch after batch, then a minute
    assert sorted(int(row["action"]) for row in await rows(pg)) == list(range(11))
    database.close()
