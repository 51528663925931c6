"""Whichever way a job ends, its stored payload is deleted soon; and no job that may still run ever loses its own."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from streamworker import App, Flow
from streamworker.broker import EndedPayload
from streamworker.errors import Unreachable
from streamworker.integrations.file_store import FileStore
from streamworker.operators import JobChange, JobChanger
from streamworker.payload import stored_in
from streamworker.testing import drain
from tests.conftest import eventually
from tests.postgres.test_offload import LARGE, Away, Doc, app_on, eventually_async, mode, stored
from tests.postgres.working import working

__all__ = ["mode"]
KEPT = LARGE + "kept"


async def kept_alone(app: App[Any], pg: Any, got: list[str], expected: int = 1) -> None:
    """A worker deletes all stored payloads but those of jobs that are left, which then run."""
    async with working(app):
        await eventually_async(lambda: stored(pg), expected)


async def delayed(app: App[Any], **options: Any) -> str:
    return (await app.enqueue(Doc(LARGE), delay=3600, **options)).id


async def forget(app: App[Any], _: Any) -> None:
    made = await delayed(app)
    async with app.operator() as operator:
        (job,) = [each for each in (await operator.delayed("q")).rows if each.job_id == made]
        assert await operator.forget(job)


async def purge_delayed(app: App[Any], _: Any) -> None:
    await delayed(app)
    await delayed(app)
    async with app.operator() as operator:
        assert await operator.purge("q", "delayed", 10) == 2


async def purge_ready(app: App[Any], _: Any) -> None:
    await app.enqueue(Doc(LARGE), priority="high")
    await app.enqueue(Doc(LARGE), priority="low")
    async with app.operator() as operator:
        assert await operator.purge("q", "ready", 10) == 2


async def purge_dead(app: App[Any], _: Any) -> None:
    await app.enqueue(Doc(LARGE, "die"))
    assert (await drain(app)).dead == 1
    async with app.operator() as operator:
        assert await operator.purge("q", "dead", 10) == 1


async def erase_dead(app: App[Any], _: Any) -> None:
    await app.enqueue(Doc(LARGE, "die"))
    assert (await drain(app)).dead == 1
    async with app.operator() as operator:
        (letter,) = (await operator.dead("q")).rows
        assert await operator.erase(letter)


async def cancel(app: App[Any], _: Any) -> None:
    assert await app.cancel(await delayed(app)) == "cancelled"


async def rewrite(app: App[Any], pg: Any) -> None:
    first = await delayed(app, key="k", unique="started", replace=True)
    again = await app.enqueue(Doc(LARGE + "again"), key="k", unique="started", replace=True, delay=3600)
    assert (again.id, again.new) == (first, False)
    async with app.operator() as operator:  # the successor keeps its own
        (job,) = [each for each in (await operator.delayed("q")).rows if each.job_id == first]
        reference = stored_in(json.dumps(json.loads(job.body or b"")["payload"]).encode())
        assert reference is not None
        async with working(app):
            await eventually_async(lambda: stored(pg), 1)
        assert await pg.fetchval("select id from streamworker.payloads") == reference.id
        assert await operator.forget(job)


async def debounce(app: App[Any], _: Any) -> None:
    for number in range(4):
        made = await app.enqueue(Doc(LARGE + str(number)), key="d", unique="started", debounce=3600)
    assert await app.cancel(made.id) == "cancelled"


async def supersede(app: App[Any], _: Any) -> None:
    for number in range(3):
        await app.enqueue(Doc(LARGE + str(number)), key="s", unique="started", replace=True)


async def change(app: App[Any], _: Any) -> None:
    made = await delayed(app)
    async with app.operator() as operator:
        (job,) = [each for each in (await operator.delayed("q")).rows if each.job_id == made]
        body = json.dumps(json.loads(job.body or b"") | {"payload": {"text": "small"}}).encode()
        assert await operator.change(job, body, queue="q", level="low", due=None)


async def ledger_cancel(app: App[Any], pg: Any) -> None:
    async with pg.transaction():
        made = await app.enqueue(Doc(LARGE), connection=pg, delay=3600)
    assert await app.cancel(made.id) == "cancelled"


async def ledger_rewrite(app: App[Any], pg: Any) -> None:
    for _ in range(2):
        async with pg.transaction():
            made = await app.enqueue(Doc(LARGE), connection=pg, key="l", unique="started", replace=True, delay=3600)
    await app.enqueue(
        Doc(LARGE), key="l", unique="started", replace=True, delay=3600
    )  # by way of Redis: it waits there
    assert await app.cancel(made.id) == "cancelled"


async def from_sql(app: App[Any], pg: Any) -> None:
    for _ in range(2):
        made = await pg.fetchval(
            "select streamworker.enqueue_unique('doc', streamworker.store_payload($1::jsonb), 'q', key => 's', "
            "replace => true, run_at => now() + interval '1 hour')",
            json.dumps({"text": LARGE}),
        )
    assert await app.cancel(made) == "cancelled"


WAYS: list[Callable[[App[Any], Any], Awaitable[None]]] = [
    forget, purge_delayed, purge_ready, purge_dead, erase_dead, cancel, rewrite, debounce, supersede, change, ledger_cancel,
    ledger_rewrite, from_sql,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_a_job_takes_its_payload_with_it(redis_url, database_url, pg, mode, way):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode, relay="off") as app:
        await way(app, pg)
        await app.enqueue(Doc(KEPT), delay=3600)
        await kept_alone(app, pg, got)
    assert KEPT not in got


async def test_a_dropped_claim_takes_its_payload_with_it(redis_url, database_url, pg, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        await app.enqueue(Doc(LARGE, "wait"))
        async with working(app), app.operator() as operator:
            await eventually(lambda: got)
            page = await operator.pending("q")
            while not page.rows and page.after:
                page = await operator.pending("q", page.after)
            assert await operator.drop(page.rows[0])
            await eventually_async(lambda: stored(pg), 0)


async def test_a_store_without_a_ledger_and_groups_of_dead_letters(redis_url, tmp_path, mode):
    got: list[str] = []
    async with app_on(redis_url, None, got, mode=mode, store=FileStore(tmp_path), relay="off") as app:
        for _ in range(3):
            await app.enqueue(Doc(LARGE, "die"))
        assert (await drain(app)).dead == 3
        async with app.operator() as operator, working(app):
            for letter in (await operator.dead("q")).rows:
                assert len(list(tmp_path.iterdir())) > 0
                assert await operator.erase(letter)
            await eventually(lambda: not list(tmp_path.iterdir()))


async def test_of_each_partition_and_past_a_key_of_a_wrong_type(redis_url, database_url, pg, raw):
    async with app_on(redis_url, database_url, [], partitions="q=3") as app:
        for _ in range(40):  # of which some come to each partition
            await app.enqueue(Doc(LARGE), delay=3600)
        assert await stored(pg) == 40
        async with app.operator() as operator:
            assert await operator.purge("q", "delayed", 100) == 40
        found = {name.decode() for name in raw.scan_iter("stream:{q*}:payloads")}
        assert len(found) == 3
        raw.rename("stream:{q#1}:payloads", "aside")
        raw.set("stream:{q#1}:payloads", "not ours")
        left = raw.zcard("aside")
        async with working(app):
            await eventually_async(lambda: stored(pg), left)
        raw.rename("aside", "stream:{q#1}:payloads")
        async with working(app):
            await eventually_async(lambda: stored(pg), 0)


async def test_a_relay_deletes_where_no_worker_runs(redis_url, database_url, pg, mode):
    async with app_on(redis_url, database_url, [], mode=mode) as app:
        await forget(app, pg)
        stopping = anyio.Event()
        async with app.relay_process() as relay, anyio.create_task_group() as group:
            group.start_soon(relay.run, stopping)
            await eventually_async(lambda: stored(pg), 0)
            await forget(app, pg)
            await eventually_async(lambda: stored(pg), 0)
            stopping.set()


class Stuck(Away):
    """A store that deletes nothing for a while."""

    deleted = 0

    async def delete(self, ids: Any, /) -> None:
        self.deleted += 1
        if self.away:
            raise OSError("no route to the store")
        await super().delete(ids)


async def test_what_cannot_be_deleted_now_is_deleted_by_another_worker(redis_url, tmp_path, mode):
    store = Stuck(FileStore(tmp_path))
    async with app_on(redis_url, None, [], mode=mode, store=store, relay="off") as app:
        store.away = True
        await forget(app, None)
        async with working(app):
            await eventually(lambda: store.deleted)
        assert len(list(tmp_path.iterdir())) == 1
        store.away = False
        async with working(app):
            await eventually(lambda: not list(tmp_path.iterdir()))


async def test_a_crash_before_the_note_leaves_it_to_the_sweep(redis_url, database_url, pg, raw, mode):
    async with app_on(redis_url, database_url, [], mode=mode) as app:
        await forget(app, pg)
        raw.delete("stream:{q}:payloads")  # as if Redis had lost it, or the worker that settled had been killed
        await delayed(app)
        await kept_alone(app, pg, [], expected=2)
        await pg.execute("update streamworker.payloads set used_at = now() - interval '2 days'")
        async with app.relaying() as relay:
            (sweeper,) = relay.sweepers
            assert [await sweeper.sweep() for _ in range(3)] == [0, 1, 0]
    assert await stored(pg) == 1


async def notes(raw: Any) -> int:
    return int(raw.zcard("stream:{q}:payloads"))


async def test_what_the_ledger_may_queue_again_keeps_its_payload_until_it_is_cancelled(
    redis_url, database_url, pg, raw, mode
):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        made = await dispatched(app, pg)
        async with app.operator() as operator:
            assert await operator.purge("q", "ready", 10) == 1
        assert await notes(raw) == 1
        async with working(app):
            await eventually(lambda: not raw.exists("stream:{q}:payloads"))
            assert await stored(pg) == 1  # `jobs reconcile` queues it again
            assert await app.cancel(made) == "cancelled"
            await eventually_async(lambda: stored(pg), 0)
    assert not got


async def status(pg: Any, job_id: str) -> str:
    return str(await pg.fetchval("select status from streamworker.jobs where id = $1", job_id))


async def test_a_letter_of_a_job_that_the_ledger_has_queued_again_does_not_take_its_payload(
    redis_url, database_url, pg, raw, mode
):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode, relay="off") as app:
        made = await app.enqueue(Doc(LARGE, "die"))
        assert (await drain(app)).dead == 1
        async with app.archive() as archive:
            assert await archive.retry("q", made.id)
        async with app.operator() as operator:
            (letter,) = (await operator.dead("q")).rows
            assert await operator.erase(letter)
        async with working(app):
            await eventually(lambda: not raw.exists("stream:{q}:payloads"))
        assert await stored(pg) == 1
    async with app_on(redis_url, database_url, got, mode=mode) as app, working(app):
        await eventually(lambda: got == [LARGE, LARGE])


async def test_an_old_letter_of_a_job_that_died_again_does_not_take_its_payload(redis_url, database_url, pg, raw, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app, app.operator() as operator:
        made = await app.enqueue(Doc(LARGE, "die"))
        async with working(app):
            await eventually_async(lambda: status(pg, made.id), "dead")
            async with app.archive() as archive:
                assert await archive.retry("q", made.id)
            await eventually_async(lambda: letters(operator), 2)
            old, new = sorted((await operator.dead("q")).rows, key=lambda each: each.handle)
            assert await operator.erase(old)
            await eventually(lambda: not raw.exists("stream:{q}:payloads"))
            assert await stored(pg) == 1
            assert await operator.replay(new)
            await eventually(lambda: len(got) == 3)
            await eventually_async(lambda: letters(operator), 1)
            assert await operator.erase((await operator.dead("q")).rows[0])
            await eventually_async(lambda: stored(pg), 0)


async def letters(operator: Any) -> int:
    return len((await operator.dead("q")).rows)


async def test_a_replayed_letter_takes_its_payload_along(redis_url, database_url, pg, raw, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        await app.enqueue(Doc(LARGE, "die"))
        for _ in range(3):
            assert (await drain(app)).dead == 1
            async with app.operator() as operator:
                (letter,) = (await operator.dead("q")).rows
                assert await operator.replay(letter)
                assert not await operator.erase(letter)  # it is gone: a second click must not delete anything
            assert await notes(raw) == 0
        assert await stored(pg) == 1


async def test_a_job_that_moves_keeps_its_payload(redis_url, database_url, pg, raw, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        made = await delayed(app)
        async with app.operator() as operator:
            (job,) = [each for each in (await operator.delayed("q")).rows if each.job_id == made]
            assert await JobChanger(operator, app, app.resolve(None)).change(job, JobChange(level="low", delay=0.0))
        assert await notes(raw) == 0
        assert (await drain(app)).done == 1
    assert got == [LARGE]


async def dispatched(app: App[Any], pg: Any) -> str:
    """A large job of the ledger that is in its queue."""
    async with pg.transaction():
        made = await app.enqueue(Doc(LARGE), connection=pg)
    stopping = anyio.Event()
    async with app.relaying() as relay, anyio.create_task_group() as group:
        group.start_soon(relay.run, stopping)
        await eventually_async(lambda: status(pg, made.id), "dispatched")
        stopping.set()
    return made.id


async def test_a_job_of_the_ledger_that_gets_another_payload_leaves_none(redis_url, database_url, pg, raw, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        made = await dispatched(app, pg)
        async with app.operator() as operator:
            changer = JobChanger(operator, app, app.resolve(None))
            assert await changer.change_by_id("q", made, JobChange(level="high"))
            assert (await stored(pg), await notes(raw)) == (1, 0)
            assert await changer.change_by_id("q", made, JobChange(payload={"text": "small"}))
        assert (await stored(pg), await notes(raw)) == (0, 1)
        async with working(app):
            await eventually(lambda: got == ["small"] and not raw.exists("stream:{q}:payloads"))


async def test_a_reference_that_a_caller_gives_is_not_the_producers_to_delete(redis_url, database_url, pg, mode):
    got: list[str] = []
    async with app_on(redis_url, database_url, got, mode=mode) as app:
        first = app.job(Doc(LARGE), key="k")
        await app.enqueue_many([first])
        async with app.operator() as operator:
            (job,) = [each async for each in operator.documents("q")]
        again = msgspec.structs.replace(app.job(Doc("x"), key="k"), payload=msgspec.Raw(_payload_of(job.body)))
        (answer,) = await app.enqueue_many([again])
        assert not answer.new
        assert (await drain(app)).done == 1
    assert got == [LARGE]


def _payload_of(body: bytes | None) -> bytes:
    return json.dumps(json.loads(body or b"")["payload"], separators=(",", ":")).encode()


async def test_a_flow_that_is_retried_has_its_payloads_and_takes_them_with_it(redis_url, database_url, pg, raw):
    got: list[str] = []
    async with app_on(redis_url, database_url, got) as app:
        flow = Flow("large")
        first = flow.add(Doc(LARGE + "first"), name="first", delay=3600)
        flow.add(Doc(LARGE + "second"), name="second", after=[first])
        async with pg.transaction():
            started = await app.start(flow, connection=pg)
        assert await app.cancel_flow(started.id)
        async with working(app):
            await eventually(lambda: not raw.exists("stream:{q}:payloads"))
        await pg.execute("update streamworker.payloads set used_at = now() - interval '2 days'")
        async with app.relaying() as relay:
            (sweeper,) = relay.sweepers
            assert [await sweeper.sweep() for _ in range(3)] == [0, 0, 0]
        assert await stored(pg) == 2
        async with app.archive() as archive:
            assert await archive.flows.delete(started.id)
        assert await stored(pg) == 0


class Notes:
    """Notes of ended jobs, as Redis has them."""

    def __init__(self, *found: EndedPayload) -> None:
        self.found = list(found)

    async def some(self) -> list[EndedPayload]:
        return list(self.found)

    async def forget(self, payloads: Any) -> None:
        self.found = [each for each in self.found if each not in payloads]

    async def listen(self, told: Any) -> None:
        await anyio.sleep_forever()


async def test_a_ledger_that_does_not_answer_deletes_nothing(tmp_path: Path):
    def files() -> list[Path]:
        return list(tmp_path.iterdir())

    from streamworker.worker.stored_payloads import PayloadReaper

    store = FileStore(tmp_path)
    await store.put("p", b"x")
    ended = Notes(
        EndedPayload("q", "id", 0, "p", ("key", b"member")), EndedPayload("q", "", 0, "", ("key", b"not ours"))
    )

    async def away(_: Any) -> list[str]:
        raise Unreachable("PostgreSQL does not answer")

    with pytest.raises(Unreachable):
        await PayloadReaper(store, ended, away).look()
    assert len(ended.found) == 2
    assert len(files()) == 1
    assert await PayloadReaper(store, ended, None).look() == 0.0
    assert not [*ended.found, *files()]
