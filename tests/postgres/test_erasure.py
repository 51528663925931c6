"""Erasure: after it nothing of a person's jobs is left in either store, and everybody else's is as it was."""

from __future__ import annotations

import json
import threading
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Context, Keys, Payload
from streamworker.encryption import new_key
from streamworker.errors import UsageError
from streamworker.testing import drain
from tests.conftest import eventually
from tests.postgres.working import settings_for, working

KEYS = Keys(current="one", keys={"one": new_key()})


class Mail(Payload, kind="mail", queue="q"):
    person: str
    then: str = ""
    people: tuple[dict[str, str], ...] = ()


class Fair(Payload, kind="fair", queue="q", fair_by="tenant"):
    person: str
    tenant: str


class Ordered(Payload, kind="ordered", queue="q", order_by="account"):
    person: str
    account: str


def everything(raw: Any) -> bytes:
    """All that a server answers, names of keys included. Its dumps are no help: streams keep deleted bytes for a while."""
    reads = {b"stream": raw.xrange, b"hash": raw.hgetall, b"string": raw.get, b"list": lambda key: raw.lrange(key, 0, -1),
             b"zset": lambda key: raw.zrange(key, 0, -1, withscores=True), b"set": raw.smembers}  # fmt: skip
    return b"\n".join(key + repr(reads[raw.type(key)](key)).encode() for key in raw.keys("*"))


async def rows(pg: Any) -> str:
    names = await pg.fetch("select tablename from pg_tables where schemaname = 'streamworker'")
    found = [await pg.fetch(f"select t::text from streamworker.{name} as t") for (name,) in names]
    return "\n".join(row[0] for each in found for row in each)


def app_on(redis_url: str, database_url: str | None, **options: Any) -> App[Any]:
    mode = options.pop("mode", "stream")
    app = App(settings=settings_for(redis_url, database_url, relay="on", mode=mode), **options)

    @app.handler(max_attempts=1, backoff=Backoff(base=0.01), result_ttl=600)
    async def mail(payload: Mail, ctx: Context) -> str:
        await ctx.emit(f"to {payload.person}")
        if payload.then == "step":

            async def once() -> str:
                return payload.person

            await ctx.step("once", once)
        if payload.then == "raise":
            raise ValueError(payload.person)
        if payload.then == "wait":
            await anyio.sleep(100)
        return payload.person

    @app.handler
    async def fair(payload: Fair) -> None: ...

    @app.handler
    async def ordered(payload: Ordered) -> None: ...

    return app


@pytest.mark.parametrize("encryption", [None, KEYS], ids=["plain", "sealed"])
@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_no_trace_of_a_person_is_left_in_either_store(redis_url, database_url, pg, raw, mode, encryption):
    app = app_on(redis_url, database_url, encryption=encryption, mode=mode)
    async with app:
        for person in ("ANN", "BOB"):  # what has run
            for then in ("step", "raise", ""):
                await app.enqueue(Mail(person, then), headers={"who": person})
        await drain(app)
        for person in ("ANN", "BOB"):  # what waits
            await app.enqueue(Mail(person), priority="high")
            await app.enqueue(Mail(person), delay=3600, key=f"key of {person}")
            await app.enqueue(Mail("", people=({"name": "x"}, {"name": person})))
            await app.enqueue_many([Fair(person, "t")] * 3)
            await app.enqueue_many([Ordered(person, "a")] * 3)
            async with pg.transaction():
                await app.enqueue(Mail(person), connection=pg)
        whose = {"person": "ANN"}
        before = await app.erase(whose, dry_run=True)
        assert (len(before.jobs), before.dry_run) == (12, True)
        assert raw.exists("stream:{q}:key:key of ANN")
        erased = await app.erase(whose)
        assert sorted(erased.jobs) == sorted(before.jobs)
        assert (erased.running, erased.sealed, erased.unreadable) == ([], 0, 0)
        nested = await app.erase({"people.name": "ANN"})
        assert len(nested.jobs) == 1
        for name in ("ready", "fair", "delayed", "dead", "results", "outputs"):
            assert erased.redis[name], (name, erased.redis)
        for table in ("jobs", "job_logs", "job_steps"):
            assert erased.ledger[table], (table, erased.ledger)
        left = everything(raw) + (await rows(pg)).encode()
        assert b"ANN" not in left, left[max(0, left.index(b"ANN") - 300) :][:400]
        for queue, job_id in (*erased.jobs, *nested.jobs):
            assert not raw.keys(f"stream:{{{queue}}}:*:{job_id}")
        assert not (await app.erase(whose)).jobs
        assert len((await app.erase({"person": "BOB"}, dry_run=True)).jobs) == 12
        assert (await drain(app, delayed=True)).done == 10  # all of Bob's, in their order and lines


async def test_a_job_that_runs_is_ended_first_and_reported_if_it_does_not(redis_url, database_url, pg, raw):
    app = app_on(redis_url, database_url)
    running, gate = threading.Event(), threading.Event()

    class Stubborn(Payload, kind="stubborn", queue="q"):
        person: str

    @app.handler
    def stubborn(payload: Stubborn) -> None:  # a thread, which cannot be stopped
        running.set()
        gate.wait(60)

    async with app:
        async with working(app):
            made = await app.enqueue(Mail("ANN", "wait"))
            await eventually(lambda: raw.exists(f"stream:{{q}}:output:{made.id}"))
            erased = await app.erase({"person": "ANN"})
            assert (erased.jobs, erased.running) == ([("q", made.id)], [])
            other = await app.enqueue(Stubborn("ANN"))
            await eventually(running.is_set)
            erased = await app.erase({"person": "ANN"}, wait=0.3)
            assert erased.running == [("q", other.id)]
            gate.set()
            await eventually(lambda: not raw.xlen("stream:{q}"))
            await app.erase({"person": "ANN"})
        assert b"ANN" not in everything(raw)
        assert "ANN" not in await rows(pg)


async def test_what_no_key_opens_is_counted_and_kept(redis_url, database_url, pg):
    async with app_on(redis_url, database_url, encryption=KEYS) as app:
        await app.enqueue(Mail("ANN"))
    async with app_on(redis_url, database_url) as app:
        erased = await app.erase({"person": "ANN"})
        assert (erased.jobs, erased.sealed) == ([], 1)
        with pytest.raises(UsageError, match="say whose jobs"):
            await app.erase()


async def test_values_are_those_of_json(redis_url, raw):
    app = app_on(redis_url, None)
    for payload in ({"id": 17}, {"id": "17"}, {"id": True}, {"id": None}, {"other": 17}):
        raw.xadd("stream:{q}", {"job": json.dumps({"id": str(payload), "payload": payload})})
    raw.xadd("stream:{q}", {"job": b"{no json"})
    async with app:
        assert [job_id for _, job_id in (await app.erase({"id": 17}, dry_run=True)).jobs] == ["{'id': 17}"]
        assert [job_id for _, job_id in (await app.erase({"id": True}, dry_run=True)).jobs] == ["{'id': True}"]
        assert [job_id for _, job_id in (await app.erase({"id": None}, dry_run=True)).jobs] == ["{'id': None}"]
        found = await app.erase({"id": "17"})
        assert (len(found.jobs), found.unreadable) == (1, 1)
        assert raw.xlen("stream:{q}") == 5
