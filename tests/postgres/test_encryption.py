"""Encryption from end to end: every gate, rotation, keys that are missing, and what is left behind where."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from streamworker import App, Backoff, Context, Discard, Keys, Payload, Retry, Settings
from streamworker.encryption import new_key
from streamworker.errors import JobDead, NoKey
from streamworker.testing import drain
from tests import forkserver, inprocess
from tests.conftest import eventually
from tests.postgres.working import settings_for, working

ONE, TWO = new_key(), new_key()
OLD = Keys(current="one", keys={"one": ONE})
BOTH = Keys(current="two", keys={"one": ONE, "two": TWO})
NEW = Keys(current="two", keys={"two": TWO})


class Letter(Payload, kind="letter", queue="q", aliases=("old.letter",)):
    text: str


class Ordered(Payload, kind="ordered", queue="q", order_by="text"):
    text: str


def app_with(keys: Keys | None, redis_url: str, database_url: str | None, got: list[str], **more: Any) -> App[Any]:
    app = App(settings=settings_for(redis_url, database_url, **{"relay": "on", **more}), encryption=keys)

    @app.handler(max_attempts=1, backoff=Backoff(base=0.01), result_ttl=60)
    async def letter(payload: Letter, ctx: Context) -> dict[str, str]:
        got.append(payload.text)
        assert payload.text in bytes(ctx.job.payload).decode()
        match payload.text.partition(" ")[0]:
            case "raise":
                raise ValueError(payload.text)
            case "discard":
                raise Discard(payload.text)
            case "retry":
                raise Retry(reason=payload.text)
            case "emit":
                await ctx.emit(payload.text)
                await ctx.emit({"text": payload.text})
        return {"text": payload.text}

    return app


def everything(raw: Any) -> bytes:
    """All that a server holds, in one string."""
    found = []
    for key in raw.keys("*"):
        found.append(raw.dump(key) or b"")
        if raw.type(key) == b"stream":
            found += [repr(entry).encode() for entry in raw.xrange(key)]
        elif raw.type(key) == b"hash":
            found.append(repr(raw.hgetall(key)).encode())
        elif raw.type(key) == b"string":
            found.append(raw.get(key))
    return b"\n".join(found)


async def rows(pg: asyncpg.Connection) -> str:
    found = await pg.fetch("select job::text as row from streamworker.jobs as job")
    found += await pg.fetch("select log::text as row from streamworker.job_logs as log")
    return "\n".join(row["row"] for row in found)


async def test_every_gate_seals_and_every_reader_opens(redis_url, database_url, pg, raw):
    got: list[str] = []
    app = app_with(BOTH, redis_url, database_url, got)
    async with app:
        made = [await app.enqueue(Letter("plain")), *await app.enqueue_many([Letter("many"), app.job(Letter("job"))])]
        made.append(await asyncio.to_thread(app.enqueue_blocking, Letter("blocking")))
        async with pg.transaction():
            made.append(await app.enqueue(Letter("row"), connection=pg))
            made += await app.enqueue_many([Letter(f"copied {n}") for n in range(30)], connection=pg)
        made.append(await app.enqueue(Letter("emit")))
        delayed = await app.enqueue(Letter("later"), delay=3600)
        for text in ("plain", "many", "blocking", "row", "copied", "later"):
            assert text.encode() not in everything(raw)
            assert f'"{text}' not in await rows(pg)
        done = await drain(app)
        assert (done.done, done.failed, done.dead) == (len(made), 0, 0)
        assert sorted(got) == sorted(
            ["plain", "many", "job", "blocking", "row", "emit", *(f"copied {n}" for n in range(30))]
        )
        assert await app.result(made[0].id) == {"text": "plain"}
        record = await app.find(made[4].id)
        assert record is not None
        assert record.result == {"text": "row"}
        assert json.loads(bytes(record.payload or b"")) == {"text": "row"}
        async with aclosing(app.output(made[-1].id)) as items:
            assert [item.chunk async for item in items] == ["emit", {"text": "emit"}]
        async with app.operator() as operator:
            parked = (await operator.delayed("q")).rows
            assert [json.loads(job.body or b"")["payload"] for job in parked] == [{"text": "later"}]
            assert parked[0].job_id == delayed.id
            assert await operator.run_now(parked[0])  # what was shown opened goes back as it was
        assert b"later" not in everything(raw)
        assert (await drain(app)).done == 1


async def test_who_has_no_key_reads_nothing_and_is_told(redis_url, database_url):
    got: list[str] = []
    app = app_with(BOTH, redis_url, database_url, got)
    async with app:
        made = await app.enqueue(Letter("emit"))
        await drain(app)
    plain = app_with(None, redis_url, database_url, got)
    async with plain:
        with pytest.raises(NoKey, match=r"App\(encryption=Keys"):
            await plain.result(made.id)
        with pytest.raises(NoKey, match="output of this job is sealed"):
            async with aclosing(plain.output(made.id)) as items:
                await anext(items)
        record = await plain.find(made.id)
        assert record is not None
        assert "streamworker_sealed" in record.result


@pytest.mark.parametrize("text", ["raise SECRET", "discard SECRET", "retry SECRET"])
async def test_the_text_of_an_error_is_sealed_everywhere_and_its_class_is_not(
    redis_url, database_url, pg, raw, text, caplog
):
    got: list[str] = []
    app = app_with(BOTH, redis_url, database_url, got)
    async with app:
        made = await app.enqueue(Letter(text))
        await drain(app)
        assert got == [text]
        assert b"SECRET" not in everything(raw)
        assert "SECRET" not in await rows(pg)
        with pytest.raises(JobDead, match="SECRET"):
            await app.result(made.id)
        async with app.operator() as operator, app.archive() as archive:
            (letter,) = (await operator.dead("q")).rows
            assert "SECRET" in letter.details["error"]
            (attempt,) = await archive.attempts("q", made.id)
            assert "SECRET" in (attempt.error or "")
            record = await archive.find(made.id)
            assert record is not None
            assert "SECRET" in (record.error or "")
            if text.startswith("raise"):
                assert letter.details["error"].startswith("ValueError: at test_encryption.py:")
            assert await operator.replay(letter)
        assert (await drain(app)).dead == 1
        assert got == [text, text]
    assert "SECRET" not in caplog.text


async def test_a_plain_job_is_a_dead_letter_where_sealed_ones_are_required(redis_url, database_url, pg):
    got: list[str] = []
    app, lax = app_with(BOTH, redis_url, database_url, got), Keys(current="one", keys={"one": ONE}, required=False)
    async with app:
        await pg.execute("""select streamworker.enqueue('letter', '{"text": "sql"}', 'q')""")
        assert (await drain(app)).dead == 1
        async with app.operator() as operator:
            (letter,) = (await operator.dead("q")).rows
            assert letter.details["reason"] == "not encrypted"
            assert await operator.replay(letter)
    async with app_with(lax, redis_url, database_url, got) as app:
        assert (await drain(app)).done == 1
    assert got == ["sql"]


async def test_a_job_whose_key_is_missing_waits_for_a_worker_that_has_it(redis_url, database_url, raw):
    got: list[str] = []
    async with app_with(NEW, redis_url, database_url, got) as app:  # both stores have it
        made = await app.enqueue(Letter("x"))
    async with app_with(OLD, redis_url, database_url, got) as app:
        found = await drain(app)
        assert (found.done, found.dead, found.delayed) == (0, 0, 1)
        record = await app.find(made.id)
        assert record is not None
        assert record.status == "retrying"
    async with app_with(BOTH, redis_url, database_url, got) as app:
        assert (await drain(app, delayed=True)).done == 1
    assert got == ["x"]


@pytest.mark.parametrize("keys", [OLD, Keys(current="two", keys={"two": ONE})], ids=["missing", "wrong"])
async def test_a_job_whose_key_never_comes_is_dead_with_its_bytes_and_runs_when_it_does(redis_url, database_url, keys):
    got: list[str] = []
    async with app_with(NEW, redis_url, database_url, got) as app:
        await app.enqueue(Letter("x"))
        await app.enqueue(Ordered("y"))
    async with app_with(keys, redis_url, database_url, got, unknown_kind_ttl=0.0) as app:

        @app.handler
        async def ordered(payload: Ordered) -> None:
            got.append(payload.text)

        assert (await drain(app)).dead == 2
        async with app.operator() as operator:
            for letter in (await operator.dead("q")).rows:
                assert letter.details["reason"] == "sealed"
                assert "'two'" in letter.details["error"]
                assert await operator.replay(letter)
    async with app_with(BOTH, redis_url, database_url, got) as app:

        @app.handler
        async def again(payload: Ordered) -> None:
            got.append(payload.text)

        assert (await drain(app)).done == 2
    assert sorted(got) == ["x", "y"]


@pytest.mark.parametrize(
    "width", [pytest.param(1, id="small", marks=pytest.mark.all), pytest.param(2000, id="in a store")]
)
async def test_rotation_under_load_loses_nothing(redis_url, database_url, pg, width):
    """Workers and producers change their keys one after the other while jobs come, as a rolling deploy does."""
    got: list[str] = []
    ahead = Keys(current="one", keys={"one": ONE, "two": TWO})
    sent = 0
    wide = f"{{:0{width}d}}".format
    more = {"offload_bytes": 1024}
    async with app_with(OLD, redis_url, database_url, got, **more) as first:
        for steps in ((OLD, OLD), (ahead, OLD), (ahead, ahead), (BOTH, ahead), (BOTH, BOTH)):
            apps = [app_with(keys, redis_url, database_url, got, **more) for keys in steps]
            async with apps[0] as a, apps[1] as b, working(a), working(b):
                for app in (a, b):
                    await app.enqueue_many([Letter(wide(sent + n)) for n in range(20)])
                    sent += 20
                    async with pg.transaction():
                        await app.enqueue(Letter(wide(sent)), connection=pg)
                    await app.enqueue(Letter(wide(sent + 1)), delay=0.2)
                    sent += 2
                await eventually(lambda most=sent: len(got) >= most - 2)
        assert first is not None
    async with app_with(BOTH, redis_url, database_url, got, **more) as app:
        await drain(app, delayed=True)
        assert sorted(map(int, got)) == list(range(sent))
        assert await pg.fetchval("select count(*) from streamworker.payloads") == 0
        async with app.operator() as operator:
            assert not (await operator.dead("q")).rows


async def test_batches_cron_and_jobs_that_replace_others(redis_url, database_url, raw, pg):
    got: list[str] = []

    class Note(Payload, kind="note", queue="q"):
        text: str

    app = App(settings=settings_for(redis_url, database_url, relay="on"), encryption=BOTH)

    @app.handler(batch=5, linger=0.1, max_attempts=1)
    async def notes(payloads: list[Note], contexts: list[Context]) -> list[Any]:
        got.extend(each.text for each in payloads)
        return [ValueError(each.text) if each.text == "bad" else {"said": each.text} for each in payloads]

    app.cron("* * * * * *", Note("tick"))
    async with app:
        assert (await app.enqueue(Note("first"), key="k", replace=True, delay=3600)).new
        assert (await app.enqueue(Note("second"), key="k", replace=True, delay=0.05)).replaced
        async with pg.transaction():
            await app.enqueue(Note("third"), key="l", replace=True, delay=3600, connection=pg)
        async with pg.transaction():
            assert (await app.enqueue(Note("fourth"), key="l", replace=True, connection=pg)).replaced
        bad, good = await app.enqueue_many([Note("bad"), Note("good")])
        async with working(app):
            await eventually(lambda: len({*got}) == 5)
            with pytest.raises(JobDead, match="ValueError.*bad"):
                await app.result(bad.id)
            assert await app.result(good.id, timeout=10) == {"said": "good"}
        assert sorted(each for each in got if each != "tick") == ["bad", "fourth", "good", "second"]
        assert b"tick" not in everything(raw)
        assert "fourth" not in await rows(pg)


async def test_a_schedule_that_is_kept_as_data_is_sealed_and_ticks(redis_url, database_url, raw):
    got: list[str] = []
    app = app_with(BOTH, redis_url, database_url, got)
    async with app:
        await app.schedules.put("often", "* * * * * *", Letter("by night"))
        assert b"by night" not in everything(raw)
        assert bytes((await app.schedules.get("often")).stored.payload) == b'{"text":"by night"}'
        await app.schedules.edit("often", missed="skip")
        await app.schedules.run_now("often")
        async with working(app):
            await eventually(lambda: len(got) > 1)
        assert b"by night" not in everything(raw)
    assert set(got) == {"by night"}


async def test_a_job_of_an_older_kind_runs_again_from_the_ledger_after_a_loss(redis_url, database_url, pg, raw):
    """The ledger names it by its handler's kind, and it was sealed under another one."""
    got: list[str] = []

    class Old(Payload, kind="old.letter", queue="q"):
        text: str

    app = app_with(BOTH, redis_url, database_url, got)
    async with app:
        made = await app.enqueue(Old("raise it"))
        await drain(app)
        raw.flushall()
        async with app.archive() as archive:
            assert await archive.retry("q", made.id)
    async with app_with(BOTH, redis_url, database_url, got) as app:
        await drain(app)
    assert got == ["raise it", "raise it"]


async def test_what_moves_through_a_list_bridge_stays_sealed(redis_url, database_url, raw):
    got: list[str] = []
    app = app_with(BOTH, redis_url, database_url, got)
    lists = app_with(BOTH, redis_url, database_url, got, mode="list")
    async with lists, app:
        await lists.enqueue(Letter("by list"))
        async with app.bridge(["q"]) as mover:
            await mover.move(everything=True)
        assert raw.xlen("stream:{q}") == 1
        assert b"by list" not in everything(raw)
        assert (await drain(app)).done == 1
    assert got == ["by list"]


WORKER = """
import logging
from streamworker import App, Backoff, Context, Discard, Keys, Payload

class Secret(Payload, kind="secret", queue="q"):
    text: str
    how: str

app = App(encryption={encryption})

@app.handler(max_attempts=2, backoff=Backoff(base=0.01), result_ttl=3600)
async def secret(payload: Secret, ctx: Context) -> dict[str, str]:
    await ctx.emit(payload.text)
    await ctx.emit([payload.text])
    if payload.how == "log":
        ctx.log.info("kept", text=payload.text)
    async def once() -> dict[str, str]:
        return {{"text": payload.text}}
    assert await ctx.step("once", once) == {{"text": payload.text}}
    await ctx.cursor.set([payload.text])
    if ctx.attempt > 1:
        assert await ctx.cursor.read() == [payload.text]
    if payload.how == "raise":
        try:
            raise KeyError(payload.text)
        except KeyError as error:
            raise ValueError("because of " + payload.text) from error
    if payload.how == "discard":
        raise Discard(payload.text)
    if payload.how == "group":
        raise ExceptionGroup(payload.text, [ValueError(payload.text)])
    if payload.how == "unkept":
        return {{"text": payload.text, "number": float("nan"), payload.text: float("inf")}}
    return {{"text": payload.text}}
"""


class Secret(Payload, kind="secret", queue="q"):
    text: str
    how: str


@pytest.mark.parametrize(
    "sealed", [pytest.param(True, id="sealed"), pytest.param(False, id="plain", marks=pytest.mark.all)]
)
async def test_no_byte_of_a_payload_result_error_output_or_step_is_left_anywhere(
    own_server, own_postgres, tmp_path, sealed
):
    """A run with encryption leaves no trace of a marker in the append-only file, PostgreSQL's data, a dump and the log.

    Nor in the logs that are kept with jobs, and in payloads that are in a store. The same run without it leaves the
    marker in all of them: the test looks where it would be. What a handler logs itself is in the worker's log, too:
    where it does, that begins at warnings.
    """
    marker = f"MARK{secrets.token_hex(8)}"
    (tmp_path / "secretly.py").write_text(
        WORKER.format(encryption=f"Keys(current='one', keys={{'one': {ONE!r}}})" if sealed else "None")
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")},
        "REDIS_URL": own_server.url, "DATABASE_URL": own_postgres.url(), "STREAMWORKER_APP": "secretly:app",
        "STREAMWORKER_LOG_LEVEL": "debug", "STREAMWORKER_OFFLOAD_BYTES": "1024",
        "STREAMWORKER_LEASE": "2", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip

    def program(*words: str) -> subprocess.CompletedProcess[str]:
        start = forkserver.run if words[0] == "worker" else inprocess.run
        more = {"timeout": 100} if words[0] == "worker" else {}
        done = start(words, env=environment, cwd=tmp_path, **more)
        assert done.returncode == 0, done.stderr
        return done

    program("enqueue", "secret", json.dumps({"text": marker, "how": "return"}))
    keys = Keys(current="one", keys={"one": ONE}) if sealed else None
    ours = Settings(redis_url=own_server.url, database_url=own_postgres.url(), offload_bytes=1024)
    async with App(settings=ours, encryption=keys) as app:
        await app.enqueue_many([Secret(marker, how) for how in ("raise", "discard", "group", "unkept")])
        await app.enqueue_many([Secret(marker * 100, how) for how in ("return", "discard")])
    log = ""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = program("worker", "--burst")
        log += done.stdout + done.stderr
        if not json.loads(program("queues", "--json").stdout)["delayed"]:
            break
    async with App(settings=ours, encryption=keys) as app:
        logged = await app.enqueue(Secret(marker, "log"))
    environment |= {"STREAMWORKER_LOG_LEVEL": "warning", "STREAMWORKER_JOB_LOG": "ctx"}
    done = program("worker", "--burst")
    log += done.stdout + done.stderr
    assert program("jobs", "logs", logged.id).stdout.count(marker) == 1
    shown = program("dead", "--payload", "--json").stdout + program("jobs", "--payload", "--json").stdout
    assert shown.count(marker) > 8  # who has the key reads all of it

    with own_server.client() as client:
        client.execute_command("BGREWRITEAOF")  # the base as well as what came after it
        await eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        await eventually(lambda: not client.info("persistence").get("aof_pending_bio_fsync"))
    aof = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if "appendonly" in str(path) and path.is_file())
    connection = await asyncpg.connect(own_postgres.url())
    try:
        names = await connection.fetch("select tablename from pg_tables where schemaname = 'streamworker'")
        dump = ""
        for (name,) in names:
            dump += "\n".join(row[0] for row in await connection.fetch(f"select t::text from streamworker.{name} as t"))
        await connection.execute("checkpoint")
    finally:
        await connection.close()
    data = b"".join(
        path.read_bytes()
        for path in (own_postgres._directory / "embedded" / "postgres" / "data").rglob("*")
        if path.is_file()
    )
    assert len(aof) > 1000
    assert len(data) > 1_000_000
    places = {"aof": aof, "dump": dump.encode(), "data": data, "log": log.encode()}
    found = {name for name, held in places.items() if marker.encode() in held or marker.encode().hex().encode() in held}
    assert found == (set() if sealed else set(places))
