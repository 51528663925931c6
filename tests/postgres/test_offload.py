"""Payloads above a limit are in a store, and the document has a reference: both modes, every way in, every way a job ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Context, Discard, Flow, Keys, Payload, Settings
from streamworker.encryption import new_key
from streamworker.errors import JobDead, JobTooLarge
from streamworker.integrations.file_store import FileStore
from streamworker.payload import MOST_STORED, PayloadStore, stored_in
from streamworker.testing import drain
from tests.conftest import eventually
from tests.postgres.test_erasure import everything
from tests.postgres.test_erasure import rows as all_rows
from tests.postgres.working import settings_for, working

LARGE = "x" * 3000
KEYS = Keys(current="one", keys={"one": new_key()})


class Doc(Payload, kind="doc", queue="q"):
    text: str
    how: str = ""


class Lenient(Payload, kind="lenient", queue="q"):
    text: str = "none"


class Together(Payload, kind="together", queue="q"):
    text: str


class Limited(Payload, kind="limited", queue="q"):
    text: str
    tenant: str = "t"


def app_on(redis_url: str, database_url: str | None, got: list[str], **more: Any) -> App[Any]:
    own = {name: more.pop(name) for name in ("encryption", "store") if name in more}
    settings = settings_for(redis_url, database_url, **{"relay": "on", "offload_bytes": 1024, **more})
    app = App(settings=settings, **own)

    @app.handler(max_attempts=1, backoff=Backoff(base=0.01))
    async def doc(payload: Doc, ctx: Context) -> int:
        got.append(payload.text)
        assert payload.text in bytes(ctx.job.payload).decode()
        if payload.how == "die":
            raise Discard("no")
        if payload.how == "wait":
            await anyio.sleep_forever()
        return len(payload.text)

    @app.handler
    def lenient(payload: Lenient) -> None:
        got.append(payload.text)

    @app.handler(batch=5, linger=0.05)
    async def together(payloads: list[Together], contexts: list[Context]) -> None:
        assert all(p.text in bytes(ctx.job.payload).decode() for p, ctx in zip(payloads, contexts, strict=True))
        got.extend(each.text for each in payloads)

    @app.handler(concurrency=1, limit_by="tenant")
    async def limited(payload: Limited) -> None:
        got.append(payload.text)

    return app


async def stored(pg: Any) -> int:
    return int(await pg.fetchval("select count(*) from streamworker.payloads"))


@pytest.fixture(params=["stream", "list"])
def mode(request):
    return request.param


async def test_every_way_in_every_kind_and_nothing_is_left(redis_url, database_url, pg, raw, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        await app.enqueue(Doc("small"))
        assert await stored(pg) == 0
        await app.enqueue(Doc(LARGE + "1"))
        await app.enqueue_many(
            [Doc(LARGE + "2"), Doc("small"), Lenient(LARGE + "3"), Together(LARGE + "4"), Limited(LARGE + "5")]
        )
        await asyncio.to_thread(app.enqueue_blocking, Doc(LARGE + "6"))
        async with pg.transaction():
            await app.enqueue(Doc(LARGE + "7"), connection=pg)
            await app.enqueue_many([Doc(LARGE + f"8.{n}") for n in range(25)], connection=pg)
        await app.enqueue(Doc(LARGE + "9"), run_at=None, delay=0.01, expires_in=3600)
        assert await stored(pg) == 33
        assert LARGE.encode() not in everything(raw)
        document = await pg.fetchval("select payload from streamworker.jobs where payload is not null limit 1")
        (reference,) = json.loads(document).values()
        assert set(reference) == {"id", "sha256", "size"}
        async with working(app):
            await eventually(lambda: len(got) == 35)
            await eventually_async(lambda: stored(pg), 0)
    assert sorted(got) == sorted(
        ["small", "small", *(LARGE + str(n) for n in (1, 2, 3, 4, 5, 6, 7, 9)), *(LARGE + f"8.{n}" for n in range(25))]
    )


async def eventually_async(read: Any, wanted: Any) -> None:
    with anyio.fail_after(20):
        while await read() != wanted:  # noqa: ASYNC110 - a table
            await anyio.sleep(0.02)


async def test_a_rolled_back_transaction_leaves_nothing_and_a_flow_runs(redis_url, database_url, pg):
    got: list[str] = []
    async with app_on(redis_url, database_url, got) as app:
        with pytest.raises(RuntimeError):
            async with pg.transaction():
                await app.enqueue(Doc(LARGE), connection=pg)
                raise RuntimeError
        assert await stored(pg) == 0
        flow = Flow("of large ones")
        first = flow.add(Doc(LARGE + "first"), name="first")
        flow.add(Doc(LARGE + "second"), name="second", after=[first])
        async with pg.transaction():
            await app.start(flow, connection=pg)
        assert await stored(pg) == 2
        async with working(app):
            await eventually(lambda: len(got) == 2)
            await eventually_async(lambda: stored(pg), 0)
    assert got == [LARGE + "first", LARGE + "second"]


async def test_a_dead_letter_keeps_its_payload_and_runs_again(redis_url, database_url, pg, raw, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        made = await app.enqueue(Doc(LARGE, "die"))
        assert (await drain(app)).dead == 1
        assert await stored(pg) == 1
        async with app.operator() as operator:
            (letter,) = (await operator.dead("q")).rows
            assert stored_in(json.dumps(json.loads(letter.body)["payload"]).encode()) is not None  # shown by reference
            assert await operator.replay(letter)
        assert (await drain(app)).dead == 1
        assert got == [LARGE, LARGE]
        record = await app.find(made.id)
        assert record is not None
        assert stored_in(record.payload) is not None
        await pg.execute("delete from streamworker.payloads")
        async with app.operator() as operator:
            (letter,) = (await operator.dead("q")).rows
            await operator.replay(letter)
        assert (await drain(app)).dead == 1
        with pytest.raises(JobDead, match="payload gone: its payload is not in the store any more"):
            await app.result(made.id, timeout=10)


async def test_other_data_than_the_job_says_is_not_run(redis_url, database_url, pg):
    got: list[str] = []
    async with app_on(redis_url, database_url, got) as app:
        made = [await app.enqueue(Doc(LARGE)) for _ in range(2)]
        ids = [row[0] for row in await pg.fetch("select id from streamworker.payloads order by id")]
        await pg.execute(
            "update streamworker.payloads set data = overlay(data placing 'y' from 20) where id = $1", ids[0]
        )
        await pg.execute("update streamworker.payloads set data = 'short' where id = $1", ids[1])
        assert (await drain(app)).dead == 2
        for each in made:
            with pytest.raises(JobDead, match="payload changed: the store has"):
                await app.result(each.id, timeout=10)
    assert got == []


@pytest.mark.parametrize("end", ["cancel", "expire"])
async def test_a_job_that_never_runs_takes_its_payload_with_it(redis_url, database_url, pg, end):
    got: list[str] = []
    async with app_on(redis_url, database_url, got) as app:
        made = await app.enqueue(Doc(LARGE), expires_in=0.05 if end == "expire" else None)
        if end == "cancel":
            await app.cancel(made.id)
        await anyio.sleep(0.1)
        async with working(app):
            await eventually_async(lambda: stored(pg), 0)
    assert got == []


async def test_a_running_job_that_is_cancelled_takes_it_too(redis_url, database_url, pg):
    got: list[str] = []
    async with app_on(redis_url, database_url, got) as app:
        made = await app.enqueue(Doc(LARGE, "wait"))
        async with working(app):
            await eventually(lambda: got)
            await app.cancel(made.id, queue="q")
            await eventually_async(lambda: stored(pg), 0)


async def test_what_a_deduplicated_job_brought_is_deleted(redis_url, database_url, pg):
    async with app_on(redis_url, database_url, []) as app:
        assert (await app.enqueue(Doc(LARGE), key="k")).new
        assert not (await app.enqueue(Doc(LARGE), key="k")).new
        assert await stored(pg) == 1


async def test_sealed_payloads_are_sealed_in_the_store(redis_url, database_url, pg, raw, mode):
    got: list[str] = []
    text = "MARKER" + LARGE
    async with app_on(redis_url, database_url, got, mode=mode, encryption=KEYS) as app:
        await app.enqueue(Doc(text))
        await app.enqueue(Lenient(text))
        dead = await app.enqueue(Doc(text, "die"))
        assert b"MARKER" not in everything(raw) + (await all_rows(pg)).encode()
        data = await pg.fetch("select data from streamworker.payloads")
        assert len(data) == 3
        assert not any(b"MARKER" in row[0] for row in data)
        async with app.archive() as archive:
            assert {use.place: use.count for use in await archive.key_uses()}["postgresql payloads.data"] == 3
        done = await drain(app)
        assert (done.done, done.dead) == (2, 1)
    assert got == [text] * 3
    other = Keys(current="two", keys={"two": new_key()})
    async with app_on(redis_url, database_url, got, mode=mode, encryption=other) as app:
        async with app.operator() as operator:
            (letter,) = (await operator.dead("q")).rows
            assert letter.job_id == dead.id
            await operator.replay(letter)
        found = await drain(app)
        assert (found.dead, found.delayed) == (0, 1)  # it waits for a worker with the key, and its payload is there
    assert await stored(pg) >= 1


class Away:
    """A store that is away for a while."""

    def __init__(self, inner: PayloadStore) -> None:
        self.inner, self.away, self.asked = inner, False, 0

    async def put(self, id: str, data: bytes, /) -> None:  # noqa: A002
        await self.inner.put(id, data)

    async def get(self, id: str, /) -> bytes | None:  # noqa: A002
        self.asked += 1
        if self.away:
            raise OSError("no route to the store")
        return await self.inner.get(id)

    async def delete(self, ids: Any, /) -> None:
        await self.inner.delete(ids)


async def test_a_store_that_is_away_is_a_pause_and_costs_no_attempt(redis_url, database_url, pg, tmp_path, mode):
    got: list[str] = []
    store = Away(FileStore(tmp_path))
    async with app_on(redis_url, None, got, mode=mode, store=store, relay="off") as app:
        store.away = True
        await app.enqueue(Doc(LARGE))
        assert len(list(tmp_path.iterdir())) == 1
        async with working(app) as worker:
            await eventually(lambda: store.asked > 2)
            await app.enqueue(Doc("small"))
            await eventually(lambda: got == ["small"])  # others go on
            assert worker._in_flight.counts.dead == 0
        # It was handed back, uncharged.
        store.away = False
        async with working(app):
            await eventually(lambda: got == ["small", LARGE])
            await eventually(lambda: not list(tmp_path.iterdir()))


async def test_a_worker_without_the_store_leaves_the_job_to_others(redis_url, database_url, tmp_path):
    got: list[str] = []
    async with app_on(redis_url, None, got, store=FileStore(tmp_path), relay="off") as app:
        made = await app.enqueue(Doc(LARGE))
        await app.enqueue(Lenient(LARGE))
    async with app_on(redis_url, None, got, relay="off", offload_bytes=None) as app:
        found = await drain(app)
        assert (found.dead, found.delayed) == (0, 2)
    async with app_on(redis_url, None, got, relay="off", offload_bytes=None, unknown_kind_ttl=0.0) as app:
        await drain(app, delayed=True)
        async with app.operator() as operator:
            letters = (await operator.dead("q")).rows
            assert {letter.details["reason"] for letter in letters} == {"no payload store"}
            assert made.id in {letter.job_id for letter in letters}
            for letter in letters:
                await operator.replay(letter)
    async with app_on(redis_url, None, got, store=FileStore(tmp_path), relay="off") as app:
        assert (await drain(app)).done == 2
    assert got == [LARGE, LARGE]


async def test_the_relay_sweeps_what_no_job_refers_to(redis_url, database_url, pg, raw, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        await app.enqueue(Doc(LARGE + "ready"))
        await app.enqueue(Doc(LARGE + "delayed"), delay=3600)
        dropped = await app.enqueue(Doc(LARGE + "dropped"), delay=3600)
        async with pg.transaction():
            await app.enqueue(Doc(LARGE + "row"), connection=pg)
        if mode == "stream":  # of a partition that this relay does not know of
            await pg.execute("insert into streamworker.payloads (id, data) values ('in a partition', 'x')")
            reference = {"streamworker_stored": {"id": "in a partition", "sha256": "0", "size": 1}}
            raw.xadd("stream:{q#3}", {"job": json.dumps({"id": "p", "kind": "doc", "payload": reference})})
        await pg.execute(
            "select streamworker.store_payload(jsonb_build_object('text', repeat('x', 2000)))"
        )  # an orphan
        await pg.execute("insert into streamworker.payloads (id, namespace, data) values ('of another', 'ns', 'x')")
        async with app.operator() as operator:
            found = [job for job in (await operator.delayed("q")).rows if job.job_id == dropped.id]
            assert await operator.forget(found[0])
        await pg.execute("update streamworker.payloads set used_at = now() - interval '2 days'")
        async with app.relaying() as relay:
            (sweeper,) = relay.sweepers
            assert await sweeper.sweep() == 0  # one look is not enough: a job may move meanwhile
            assert await stored(pg) == 6 + (mode == "stream")
            assert await sweeper.sweep() == 2
            assert await sweeper.sweep() == 0
        assert (
            await pg.fetchval("select count(*) from streamworker.payloads where used_at < now() - interval '1 day'")
            == 1
        )
        async with app.operator() as operator:
            for job in (await operator.delayed("q")).rows:
                await operator.run_now(job)
        async with working(app):
            await eventually(lambda: len(got) == 3)
    assert sorted(got) == [LARGE + "delayed", LARGE + "ready", LARGE + "row"]


async def test_a_file_store_is_swept_too(redis_url, database_url, tmp_path):
    import os

    store = FileStore(tmp_path)
    async with app_on(redis_url, database_url, [], store=store) as app:
        await app.enqueue(Doc(LARGE))
        await store.put("orphan", b"x")
        for path in tmp_path.iterdir():
            os.utime(path, (1, 1))
        from streamworker.relay.payload_sweeper import PayloadSweeper
        from streamworker.wiring import StoredDocuments

        async def none() -> list[bytes]:
            return []

        sweeper = PayloadSweeper(store, StoredDocuments(app.resolve(None), None, none))
        assert [await sweeper.sweep() for _ in range(2)] == [0, 1]
        assert len(list(tmp_path.iterdir())) == 1


async def test_drafts_of_processes_that_died_are_swept(tmp_path):
    import os

    draft, fresh = tmp_path / ".id.0badf00d", tmp_path / ".id.12345678"
    theirs = tmp_path / ".nfs0001"
    for path in (draft, fresh, theirs):
        path.write_bytes(b"half of a payload")
    os.utime(draft, (1, 1))
    os.utime(theirs, (1, 1))
    store = FileStore(tmp_path)
    await store.put("id", b"x")
    assert await store.idle(60) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, theirs.name, "id"]


async def test_a_folder_that_is_not_mounted_has_lost_nothing(tmp_path):
    store = FileStore(tmp_path / "not there")
    with pytest.raises(Exception, match="folder of stored payloads is not there"):
        await store.get("x")
    for bad in ("../x", "", ".x", "a/b"):
        with pytest.raises(Exception, match="no id"):
            await FileStore(tmp_path).get(bad)


async def test_producers_in_sql_store_payloads_too(redis_url, database_url, pg):
    got: list[str] = []
    async with app_on(redis_url, database_url, got) as app:
        statement = "select streamworker.enqueue('doc', streamworker.store_payload($1::jsonb), 'q')"
        await pg.execute(statement, json.dumps({"text": "ünï 🙂" + LARGE}))
        async with working(app):
            await eventually(lambda: got)
            await eventually_async(lambda: stored(pg), 0)
    assert got == ["ünï 🙂" + LARGE]


async def test_no_limit_and_no_store_say_so(redis_url, database_url):
    plain = App(settings=Settings(redis_url=redis_url, offload_bytes=1024))
    async with plain:
        with pytest.raises(Exception, match="DATABASE_URL"):
            await plain.enqueue(Doc(LARGE))
    async with app_on(redis_url, database_url, []) as app:
        with pytest.raises(JobTooLarge, match=f"{MOST_STORED} are allowed"):
            await app.enqueue(Doc("x" * MOST_STORED))


def test_the_stores_fit_the_protocol(tmp_path: Path) -> None:
    store: PayloadStore = FileStore(tmp_path)
    assert store is not None


@pytest.mark.parametrize("encryption", [None, KEYS], ids=["plain", "sealed"])
async def test_erasure_looks_into_stored_payloads_and_deletes_them(redis_url, database_url, pg, raw, mode, encryption):
    async with app_on(redis_url, database_url, [], mode=mode, encryption=encryption) as app:
        for name in ("ANN", "BOB"):
            await app.enqueue(Doc(LARGE, name))
            await app.enqueue(Doc(LARGE, name), delay=3600)
            async with pg.transaction():
                await app.enqueue(Doc(LARGE, name), connection=pg)
        assert await stored(pg) == 6
        told = await app.erase({"how": "ANN"}, dry_run=True)
        assert (len(told.jobs), await stored(pg)) == (3, 6)
        erased = await app.erase({"how": "ANN"})
        assert (len(erased.jobs), erased.sealed, erased.ledger["payloads"]) == (3, 0, 3)
        assert await stored(pg) == 3
        assert b"ANN" not in everything(raw) + (await all_rows(pg)).encode()
        assert len((await app.erase({"how": "BOB"}, dry_run=True)).jobs) == 3
