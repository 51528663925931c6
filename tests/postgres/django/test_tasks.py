"""Tasks of Django as jobs: transactions, retries, priorities, options, signals, checks; and tasks whose ledger is elsewhere."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

pytest.importorskip("django.tasks", reason="django.tasks needs Django 6, and that Python 3.12")

import django.db
import msgspec
from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections, transaction
from django.tasks import TaskResultStatus, task_backends
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.test.utils import override_settings
from django.utils import timezone

from streamworker import Handlers, Payload
from streamworker.encryption import Keys
from streamworker.errors import ConfigurationError
from streamworker.integrations.django import run_options, url_of
from streamworker.integrations.django.task_backend import call_class
from tests.conftest import eventually
from tests.postgres.django.conftest import MODULES, tasks_setting
from tests.postgres.django.test_contract import ended, samples
from tests.postgres.working import working

__all__ = ["samples"]


async def job(pg, result):
    return await pg.fetchrow("select * from streamworker.jobs where id = $1", result.id)


async def effects(pg):
    return sorted(row["n"] for row in await pg.fetch("select n from effect"))


@pytest.fixture
async def effect(pg):
    await pg.execute("create table effect (n integer)")
    await pg.execute("create table once (n integer unique deferrable initially deferred)")


# -- enqueueing


@pytest.mark.parametrize(("priority", "level"), [(-100, "low"), (-1, "low"), (0, "normal"), (1, "high"), (100, "high")])
async def test_priorities_are_levels_by_their_sign_and_kept(samples, pg, priority, level):
    given = samples.noop.using(priority=priority)
    result = given.enqueue()
    row = await job(pg, result)
    assert (row["level"], row["kind"], row["queue_name"]) == (level, samples.noop.module_path, "default")
    assert samples.noop.get_result(result.id).task == given


async def test_a_commit_that_fails_enqueues_nothing(samples, effect, pg):
    def fail() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("insert into once values (1)")
            samples.insert.enqueue(1)
            cursor.execute("insert into once values (1)")

    with pytest.raises(django.db.IntegrityError):
        await sync_to_async(fail)()
    assert await pg.fetchval("select count(*) from streamworker.jobs") == 0


async def test_outside_of_atomic_a_task_is_committed_at_once(samples, pg):
    result = samples.noop.enqueue()
    assert (await job(pg, result))["status"] == "queued"
    connection.set_autocommit(False)
    try:
        second = samples.noop.enqueue()
        assert await job(pg, second) is None
        connection.commit()
        assert (await job(pg, second))["status"] == "queued"
    finally:
        connection.set_autocommit(True)


async def test_an_error_before_anything_was_written_leaves_the_transaction_whole(samples, pg):
    def go_on() -> Any:
        with transaction.atomic():
            with pytest.raises(Exception, match="bytes"):
                samples.noop.enqueue("x" * 300_000)
            return samples.noop.enqueue()

    result = await sync_to_async(go_on)()
    assert await pg.fetchval("select array_agg(id) from streamworker.jobs") == [result.id]


async def test_a_task_that_workers_would_not_import_is_refused(samples, pg):
    with (
        override_settings(TASKS=tasks_setting(modules=[])),
        pytest.raises(InvalidTask, match="in no app of INSTALLED_APPS"),
    ):
        samples.noop.enqueue()
    with override_settings(TASKS=tasks_setting(modules=[]), INSTALLED_APPS=["tests.postgres.django"]):
        samples.noop.enqueue()


async def test_a_database_without_the_schema_is_named(samples, pg):
    await pg.execute("alter schema streamworker rename to elsewhere")
    try:
        with pytest.raises(ConfigurationError, match="has no schema streamworker"):
            samples.noop.enqueue()
        with pytest.raises(ConfigurationError, match="has no schema streamworker"):
            samples.noop.get_result("1")
    finally:
        await pg.execute("alter schema elsewhere rename to streamworker")


# -- runs


@pytest.mark.parametrize("name", ["third_time", "third_time_async"])
async def test_a_task_that_may_is_tried_again(samples, at_work, name, pg):
    result = getattr(samples, name).enqueue()
    async with at_work() as worker:
        await ended(result)
    assert result.status == TaskResultStatus.SUCCESSFUL, result.errors
    assert result.return_value == (["builtins.ValueError"] * 2 if name == "third_time" else 3)
    assert (result.attempts, result.worker_ids) == (3, [worker.worker_id] * 3)
    assert [error.exception_class for error in result.errors] == [ValueError, ValueError]
    assert [error.traceback.splitlines()[-1] for error in result.errors] == [
        "ValueError: attempt 1",
        "ValueError: attempt 2",
    ]
    assert result.started_at < result.last_attempted_at < result.finished_at
    again = await sync_to_async(getattr(samples, name).get_result)(result.id)
    assert again == result


async def test_between_two_attempts_a_task_is_ready(samples, at_work, pg):
    result = samples.third_time.enqueue()
    async with at_work():
        await eventually(lambda: pg.fetchval("select status = 'retrying' from streamworker.jobs"))
        await result.arefresh()
        assert (result.status, len(result.errors), result.is_finished) == (TaskResultStatus.READY, 1, False)


async def test_a_running_task_says_so(samples, at_work):
    result = samples.waits.enqueue()
    async with at_work() as worker:

        async def runs() -> bool:
            await result.arefresh()
            return result.status == TaskResultStatus.RUNNING

        await eventually(runs)
        assert result.worker_ids == [worker.worker_id] and result.started_at is not None
        samples.RELEASE.set()
        await ended(result)
    assert (result.status, result.attempts) == (TaskResultStatus.SUCCESSFUL, 1)


async def test_ends_that_are_no_exception_have_one(samples, at_work, pg):
    gone, slow = samples.discards.enqueue(), samples.sleeps.enqueue()
    late = samples.noop.using(run_after=timezone.now() + timedelta(hours=1)).enqueue()
    async with at_work():
        await ended(gone)
        await ended(slow)
    await pg.execute("update streamworker.jobs set status = 'cancelled', finished_at = now() where id = $1", late.id)
    await late.arefresh()
    told = [(each.errors[0].exception_class.__name__, each.errors[0].traceback) for each in (gone, slow, late)]
    assert told[0] == ("Discard", "discarded: the customer is gone\n")
    assert told[1][0] == "TimeoutError" and "timed out after 0.2 s" in told[1][1]
    assert told[2] == ("JobCancelled", "cancelled\n")
    assert {each.status for each in (gone, slow, late)} == {TaskResultStatus.FAILED}


async def test_tracebacks_are_bounded_and_hide_passwords(samples, at_work, pg):
    deep, secret = samples.long_traceback.enqueue(200), samples.fails_async.enqueue()
    async with at_work():
        await ended(deep)
        await ended(secret)
    (error,) = deep.errors
    assert error.exception_class is RuntimeError and len(error.traceback) < 3500
    assert error.traceback.startswith("Traceback") and error.traceback.endswith("not this\n")
    assert secret.errors[0].exception_class is LookupError and "hunter2" not in secret.errors[0].traceback
    assert "LookupError: no such row, password=***\n" in (await job(pg, secret))["last_error"]


async def test_a_context_commits_the_tasks_writes_with_its_end(samples, at_work, effect, pg):
    result = samples.insert_once.enqueue(7)
    async with at_work():
        await ended(result)
    assert result.status == TaskResultStatus.SUCCESSFUL and await effects(pg) == [7]


@pytest.mark.parametrize("chosen", [{"atomic": True}], indirect=True)
async def test_atomic_tasks_commit_with_their_end(samples, at_work, effect, pg):
    good, bad, empty = samples.insert.enqueue(1), samples.insert.enqueue(2, fails=True), samples.noop.enqueue()
    assert good.task.get_backend().chosen.atomic
    async with at_work():
        for each in (good, bad, empty):
            await ended(each)
    assert (good.status, good.return_value) == (TaskResultStatus.SUCCESSFUL, 1)
    assert (bad.status, bad.errors[0].exception_class) == (TaskResultStatus.FAILED, ValueError)
    assert (empty.status, empty.return_value) == (TaskResultStatus.SUCCESSFUL, None)
    assert await effects(pg) == [1]
    with pytest.raises(InvalidTask, match="atomic does not support async"):
        samples.noop_async.enqueue()


async def test_a_task_enqueues_tasks_and_leaves_no_connection(samples, at_work, effect, pg):
    """Sync and async tasks alike."""
    count = "select count(*) from pg_stat_activity where datname = current_database() and application_name not like 'streamworker%'"
    before = await pg.fetchval(count)
    async with at_work():
        first, second = samples.enqueues.enqueue(1), samples.insert_async.enqueue(2)
        await ended(first)
        await ended(second)
        await eventually(lambda: pg.fetchval("select count(*) = 2 from effect"))
        await eventually(lambda: same(pg, count, before))
    assert await effects(pg) == [1, 2]


async def same(pg, count, before):
    return await pg.fetchval(count) <= before + 2  # those of this thread, and of the thread of `arefresh`


# -- signals


async def test_signals_are_sent_where_things_happen(samples, at_work):
    seen: list[tuple[str, str, Any]] = []

    def receiver(name: str) -> Any:
        def receive(sender: Any, task_result: Any, **_: Any) -> None:
            seen.append((name, task_result.task.name, task_result.status))
            assert sender.__name__ == "StreamworkerBackend"
            if name == "started":
                raise RuntimeError("a receiver's error is not the task's")

        return receive

    receivers = {name: receiver(name) for name in ("enqueued", "started", "finished")}
    signals = {"enqueued": task_enqueued, "started": task_started, "finished": task_finished}
    for name, signal in signals.items():
        signal.connect(receivers[name])
    try:
        results = [each.enqueue() for each in (samples.noop, samples.noop_async, samples.third_time, samples.discards)]
        async with at_work():
            for each in results:
                await ended(each)
    finally:
        for name, signal in signals.items():
            signal.disconnect(receivers[name])
    ready, running, good, bad = (TaskResultStatus[each] for each in ("READY", "RUNNING", "SUCCESSFUL", "FAILED"))
    of = {each: [(what, status) for what, name, status in seen if name == each] for _, each, _ in seen}
    assert of == {
        "noop": [("enqueued", ready), ("started", running), ("finished", good)],
        "noop_async": [("enqueued", ready), ("started", running), ("finished", good)],
        "third_time": [("enqueued", ready), *[("started", running)] * 3, ("finished", good)],
        "discards": [("enqueued", ready), ("started", running), ("finished", bad)],
    }


# -- the app


class Own(Payload, kind="own", queue="own"):
    """A job beside the tasks."""


async def test_an_app_runs_tasks_beside_handlers_of_its_own(samples, backend, pg):
    from streamworker.integrations.django.task_worker import TasksApp

    app, group, seen = TasksApp(), Handlers[Any](), []

    @group.handler
    async def own(payload: Own) -> None:
        seen.append(payload)

    app.include(group)
    assert app.queues == ["default", "own"]
    assert {"own", samples.noop.module_path} <= {each.kind for each in app.registrations}
    async with app, working(app):
        await app.enqueue(Own())
        result = samples.noop.enqueue()
        await ended(result)
        await eventually(lambda: seen == [Own()])


async def test_a_kind_chooses_no_module_but_those_of_apps(backend, samples):
    from streamworker.integrations.django.task_worker import TasksApp

    app = TasksApp()
    for kind in (
        "os.system",
        "tests.postgres.working.settings_for",
        f"{MODULES[0]}.RELEASE",
        f"{MODULES[0]}.nothing",
        "x",
        ".",
    ):
        assert app.handler_of(kind, "default") is None
    with override_settings(INSTALLED_APPS=["tests.postgres.django"], TASKS=tasks_setting(modules=[])):
        late = TasksApp()
        assert samples.noop.module_path not in {each.kind for each in late.registrations}
        found = late.handler_of(samples.noop.module_path, "default")
        assert found is not None and found is late.handler_of(samples.noop.module_path, "default")


async def test_encryption_is_refused(backend):
    from streamworker.integrations.django.task_worker import TasksApp

    with pytest.raises(ConfigurationError, match="would seal results"):
        TasksApp(encryption=Keys("k", {"k": b"0" * 32}))


async def test_options_of_the_backend_and_of_a_task(samples, backend):
    def limits(task: Any) -> Any:
        found = task_backends["default"].limits_of(task)
        return found.max_attempts, found.timeout

    assert limits(samples.noop) == (1, 300.0) and limits(samples.third_time) == (3, 300.0)
    with override_settings(TASKS=tasks_setting(max_attempts=7, timeout=None)):
        assert limits(samples.noop) == (7, None) and limits(samples.third_time) == (3, 300.0)
    for wrong in ({"max_attempts": 0}, {"max_tries": 3}, {"modules": "shop.jobs"}):
        with (
            override_settings(TASKS=tasks_setting(**wrong)),
            pytest.raises(ImproperlyConfigured, match="OPTIONS of streamworker are wrong"),
        ):
            _ = task_backends["default"]
    with pytest.raises(ConfigurationError, match="max_attempts"):
        run_options(max_attempts=0)


# -- checks, and a ledger that is elsewhere


def complaints() -> list[str]:
    return [each.id for each in task_backends["default"].check()]


async def test_what_check_says(backend, monkeypatch):
    assert complaints() == []
    for change, expected in (
        (tasks_setting(queues=["a b", "mail:high"]), ["streamworker.E001"] * 2),
        (tasks_setting(database="nowhere"), ["streamworker.E002"]),
        (tasks_setting(database=None, atomic=True), ["streamworker.E003"]),
    ):
        with override_settings(TASKS=change):
            assert complaints() == expected
    monkeypatch.setenv("STREAMWORKER_LEDGER", "on")  # it is in Django's database
    with override_settings(TASKS=tasks_setting()):
        assert complaints() == []
    monkeypatch.setenv("DATABASE_URL", url_of("default") or "")
    with override_settings(TASKS=tasks_setting()):
        assert complaints() == []
    monkeypatch.setenv("DATABASE_URL", "postgresql://user@db.example:5432/other")
    with override_settings(TASKS=tasks_setting()):
        assert complaints() == ["streamworker.W001"]
    monkeypatch.setenv("DATABASE_URL", "mysql://x")
    with override_settings(TASKS=tasks_setting()):
        assert complaints() == ["streamworker.E004"]


@pytest.mark.parametrize("chosen", [{"database": None}], indirect=True)
async def test_without_a_database_of_djangos_tasks_go_to_redis(
    samples, backend, at_work, monkeypatch, raw, database_url, pg
):
    """At once, whatever becomes of the transaction; results are in the ledger, if there is one."""
    assert not backend.supports_get_result
    with pytest.raises(NotImplementedError):
        backend.get_result("1")
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        await sync_to_async(samples.double.enqueue)(1)
        raise ZeroDivisionError
    assert raw.xlen("stream:{default}") == 1
    monkeypatch.setenv("DATABASE_URL", database_url)
    with override_settings(TASKS=tasks_setting(database=None)):
        result = await samples.double.aenqueue(21)
        with pytest.raises(TaskResultDoesNotExist):  # the ledger knows it once it runs
            await result.arefresh()
        from streamworker.integrations.django.task_worker import TasksApp

        async with working(TasksApp()) as worker:
            await eventually(
                lambda: pg.fetchval("select count(*) = 2 from streamworker.jobs where status = 'completed'")
            )
            await result.arefresh()
    assert (result.return_value, result.worker_ids) == (42, [worker.worker_id])


async def test_the_url_of_a_database(monkeypatch, backend):
    def of(**params: Any) -> str | None:
        monkeypatch.setattr(connections["default"], "get_connection_params", lambda: params)
        return url_of("default")

    assert of(
        dbname="shop", user="me", password="p@/ss", host="db", port="5433", sslmode="require", cursor_factory=object
    ) == ("postgresql://me:p%40%2Fss@db:5433/shop?sslmode=require")
    assert of(dbname="shop", host="::1") == "postgresql://[::1]/shop"
    assert of(dbname="shop", user="me") == "postgresql://me@/shop?host=%2Fvar%2Frun%2Fpostgresql"
    assert of(dbname="shop", service="x") is None


def test_a_task_has_one_payload_type():
    made = call_class("shop.tasks.charge")
    assert made is call_class("shop.tasks.charge") and made.__kind__ == "shop.tasks.charge"
    assert msgspec.json.encode(made([1], {"a": None})) == b'{"args":[1],"kwargs":{"a":null}}'
