"""What Django's own tests of ``django.tasks`` hold a backend to, asserted of ours, with a real worker between.

Each test names those of Django that it corresponds to: of tests/tasks/test_tasks.py (``TaskTestCase``),
test_immediate_backend.py (``Immediate``), test_dummy_backend.py (``Dummy``) and test_custom_backend.py (``Custom``). The
texts are ours. Where Django's backends run a task within ``enqueue()``, a worker runs it here. Left out are tests of
Django alone: ``using()``, ``call()``, the decorator, pickling and comparing results.
"""

from __future__ import annotations

import dataclasses
import logging
from datetime import datetime, timedelta
from typing import Any

import pytest

pytest.importorskip("django.tasks", reason="django.tasks needs Django 6, and that Python 3.12")

from asgiref.sync import sync_to_async
from django.db import transaction
from django.tasks import TaskResultStatus, default_task_backend, task, task_backends
from django.tasks.exceptions import InvalidTask, InvalidTaskBackend, TaskResultDoesNotExist, TaskResultMismatch
from django.test.utils import override_settings
from django.utils import timezone

from streamworker.integrations.django import StreamworkerBackend
from tests.conftest import eventually
from tests.postgres.django.conftest import BACKEND, MODULES, tasks_setting


@pytest.fixture
def samples(backend: Any) -> Any:
    """The module of tasks, imported with the backend in force."""
    from tests.postgres.django import sample_tasks

    sample_tasks.RELEASE.clear()
    return sample_tasks


async def ended(result: Any) -> Any:
    """The result, when the task has."""

    async def has_ended() -> bool:
        await result.arefresh()
        return bool(result.is_finished)

    await eventually(has_ended)
    return result


def check_times(result: Any) -> None:
    assert result.started_at is not None and result.last_attempted_at is not None and result.finished_at is not None
    assert timezone.is_aware(result.started_at)
    assert result.enqueued_at <= result.started_at <= result.finished_at


async def test_the_backend_is_the_one_that_the_settings_name(backend):
    """TaskTestCase.test_using_correct_backend, test_get_backend; Custom.test_using_correct_backend, test_options"""
    assert default_task_backend == task_backends["default"] == backend
    assert isinstance(backend, StreamworkerBackend) and backend.alias == "default"
    assert backend.options == {"modules": MODULES}
    assert (backend.supports_defer, backend.supports_async_task, backend.supports_priority) == (True, True, True)
    assert backend.supports_get_result


async def test_a_task_is_enqueued(samples):
    """TaskTestCase.test_enqueue_task; Dummy.test_enqueue_task"""
    for each in (samples.noop, samples.noop_async):
        result = each.enqueue(1, two=3)
        assert result.status == TaskResultStatus.READY and not result.is_finished
        assert result.started_at is result.finished_at is result.last_attempted_at is None
        assert result.enqueued_at is not None
        with pytest.raises(ValueError, match="Task has not finished yet"):
            _ = result.return_value
        assert result.task == each and result.backend == "default"
        assert (result.args, result.kwargs, result.attempts, result.errors) == ([1], {"two": 3}, 0, [])


async def test_a_task_is_enqueued_by_async_code(samples):
    """TaskTestCase.test_enqueue_task_async; Dummy.test_enqueue_task_async"""
    for each in (samples.noop, samples.noop_async):
        result = await each.aenqueue()
        assert result.status == TaskResultStatus.READY and result.task == each
        assert (result.args, result.kwargs) == ([], {})
        assert await each.aget_result(result.id) == result


async def test_a_task_runs(samples, at_work):
    """Immediate.test_enqueue_task, test_enqueue_task_async"""
    enqueued = [
        samples.noop.enqueue(1, two=3), samples.noop_async.enqueue(1, two=3), await samples.noop.aenqueue(1, two=3),
    ]  # fmt: skip
    async with at_work() as worker:
        for result in enqueued:
            await ended(result)
            assert result.status == TaskResultStatus.SUCCESSFUL
            check_times(result)
            assert result.return_value is None
            assert (result.args, result.kwargs, result.attempts) == ([1], {"two": 3}, 1)
            assert result.worker_ids == [worker.worker_id] and result.errors == []


async def test_what_a_task_returns_is_its_result(samples, at_work):
    """Immediate.test_result, test_result_async; Immediate.test_successful_task_no_none_type_in_logs"""
    sync, asynchronous = samples.double.enqueue(21), samples.double_async.enqueue(1.5)
    async with at_work():
        assert (await ended(sync)).return_value == 42
        assert (await ended(asynchronous)).return_value == 3.0


async def test_an_argument_that_is_no_json_is_refused(samples):
    """TaskTestCase.test_enqueue_with_invalid_argument, test_aenqueue_with_invalid_argument"""
    with pytest.raises(TypeError, match="Unsupported type"):
        samples.noop.enqueue(datetime(2030, 1, 1))  # noqa: DTZ001
    with pytest.raises(TypeError, match="Unsupported type"):
        await samples.noop.aenqueue(datetime(2030, 1, 1))  # noqa: DTZ001


async def test_a_task_that_raises_has_failed(samples, at_work, caplog):
    """Immediate.test_catches_exception, test_failed_logs; TaskTestCase.test_task_error_*: the class can be resolved"""
    caplog.set_level("DEBUG", "django.tasks")
    for each, kind, message in (
        (samples.fails_value_error, ValueError, "This Task failed due to ValueError"),
        (samples.fails_system_exit, SystemExit, "This Task failed due to SystemExit"),
    ):
        caplog.clear()
        result = each.enqueue()
        async with at_work() as worker:
            await ended(result)
        assert result.status == TaskResultStatus.FAILED
        with pytest.raises(ValueError, match="Task failed"):
            _ = result.return_value
        check_times(result)
        (error,) = result.errors
        assert error.exception_class is kind
        assert error.traceback.startswith("Traceback (most recent call last):\n")
        assert error.traceback.endswith(f"{kind.__name__}: {message}\n")
        assert result.task == each and result.worker_ids == [worker.worker_id]
        told = [record for record in caplog.records if record.name.startswith("django.tasks")]
        assert [(record.levelno, record.getMessage().rpartition("state=")[2]) for record in told[1:]] == [
            (logging.INFO, "RUNNING"), (logging.ERROR, "FAILED"),
        ]  # fmt: skip
        assert all(result.id in record.getMessage() for record in told) and message in str(told[-1].exc_info)


async def test_a_complex_exception(samples, at_work):
    """Immediate.test_complex_exception"""
    result = samples.complex_exception.enqueue()
    async with at_work():
        await ended(result)
    assert result.status == TaskResultStatus.FAILED and result._return_value is None
    assert result.errors[0].exception_class is ValueError
    assert 'ValueError(ValueError("This task failed"))' in result.errors[0].traceback


async def test_a_return_value_that_is_no_json_fails_the_task(samples, at_work):
    """Immediate.test_complex_return_value"""
    result = samples.complex_return_value.enqueue()
    async with at_work():
        await ended(result)
    assert result.status == TaskResultStatus.FAILED and result._return_value is None
    assert result.errors[0].exception_class is TypeError and "Unsupported type" in result.errors[0].traceback


async def test_results_are_found_from_anywhere(samples, backend):
    """TaskTestCase.test_get_result, test_get_result_async, test_refresh_result; Dummy.test_get_result(_async)"""
    result = samples.noop.enqueue(1, two="3")
    assert backend.get_result(result.id) == result == samples.noop.get_result(result.id)
    assert await backend.aget_result(result.id) == result == await samples.noop.aget_result(result.id)
    before = dataclasses.asdict(result)
    result.refresh()
    assert dataclasses.asdict(result) == before
    await result.arefresh()
    assert dataclasses.asdict(result) == before


async def test_a_missing_result(samples, backend):
    """TaskTestCase.test_get_missing_result; Dummy.test_get_missing_result"""
    for given in ("123", 123, "a\0b"):
        with pytest.raises(TaskResultDoesNotExist):
            samples.noop.get_result(given)
        with pytest.raises(TaskResultDoesNotExist):
            await backend.aget_result(given)


async def test_a_result_of_another_task(samples):
    """TaskTestCase.test_get_incorrect_result, test_get_incorrect_result_async"""
    result = samples.noop_async.enqueue()
    with pytest.raises(TaskResultMismatch, match="Task does not match"):
        samples.noop.get_result(result.id)
    with pytest.raises(TaskResultMismatch, match="Task does not match"):
        await samples.noop.aget_result(result.id)


async def test_what_a_task_may_not_be(samples):
    """TaskTestCase.test_invalid_function, test_naive_datetime, test_invalid_priority, test_run_after_in_decorator,
    test_takes_context_without_taking_context"""
    for function in (any, lambda: 1):
        with pytest.raises(InvalidTask, match="must be defined at a module level"):
            task()(function)
    with pytest.raises(InvalidTask, match="run_after must be an aware datetime"):
        samples.noop.using(run_after=datetime(2030, 1, 1))  # noqa: DTZ001
    for priority in (-101, 101, 3.1):
        with pytest.raises(InvalidTask, match="priority must be a whole number between -100 and 100"):
            samples.noop.using(priority=priority)
    for priority in (-100, 0, 100):
        assert samples.noop.using(priority=priority).priority == priority
    with pytest.raises(InvalidTask, match="does not have a first argument of 'context'"):
        task(takes_context=True)(samples.double.func)
    with pytest.raises(TypeError, match="run_after cannot be defined statically"):
        task(run_after=timezone.now())(samples.double.func)


async def test_queues_are_those_of_the_settings(samples):
    """TaskTestCase.test_unknown_queue_name, test_using_queue_name; Immediate.test_validate_on_enqueue(_aenqueue)"""
    with pytest.raises(InvalidTask, match="Queue 'queue-2' is not valid for backend"):
        samples.noop.using(queue_name="queue-2")
    with override_settings(TASKS=tasks_setting(queues=[])):
        other = samples.noop.using(queue_name="queue-2")
        assert other.queue_name == "queue-2"
        with pytest.raises(InvalidTask, match="Queue 'a b' is not valid for backend: use 1 to 100 of"):
            samples.noop.using(queue_name="a b")
    with override_settings(TASKS=tasks_setting(queues=["queue-1"])):
        with pytest.raises(InvalidTask, match="Queue 'queue-2' is not valid for backend"):
            other.enqueue()
        with pytest.raises(InvalidTask, match="Queue 'queue-2' is not valid for backend"):
            await other.aenqueue()


async def test_unknown_backends(samples):
    """TaskTestCase.test_using_unknown_backend, test_using_missing_backend, test_no_backends"""
    with pytest.raises(InvalidTaskBackend, match="The connection 'unknown' doesn't exist"):
        samples.noop.using(backend="unknown")
    with override_settings(TASKS={"default": {"BACKEND": f"{BACKEND}s"}}), pytest.raises(InvalidTaskBackend):
        samples.noop.enqueue()
    with override_settings(TASKS={}), pytest.raises(InvalidTaskBackend):
        samples.noop.enqueue()


async def test_context(samples, at_work):
    """Immediate.test_takes_context, test_context"""
    named, checked = samples.task_id.enqueue(), samples.check_context.enqueue(1)
    async with at_work():
        assert (await ended(named)).return_value == named.id
        assert (await ended(checked)).status == TaskResultStatus.SUCCESSFUL, checked.errors


async def test_enqueueing_is_logged(samples, caplog):
    """Dummy.test_enqueue_logs; Immediate.test_enqueue_logs"""
    caplog.set_level("DEBUG", "django.tasks")
    result = samples.noop.enqueue()
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("django.tasks")]
    assert "enqueued" in message and result.id in message


async def test_a_task_that_runs_later(samples, at_work, pg):
    """TaskTestCase.test_using_run_after, test_chained_using; and it runs no sooner"""
    at = timezone.now() + timedelta(seconds=1)
    later = samples.noop.using(run_after=at).using(priority=10)
    result, first = later.enqueue(), samples.noop.enqueue()
    assert samples.noop.get_result(result.id).task == later
    async with at_work():
        await ended(first)
        assert not (await samples.noop.aget_result(result.id)).is_finished
        await ended(result)
    assert result.started_at >= at


async def test_the_transaction_of_the_caller(samples, backend, pg):
    """ImmediateBackendTransactionTestCase, the other way round: a task exists when, and only when, its rows do."""
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        lost = samples.noop.enqueue()
        assert backend.get_result(lost.id).status == TaskResultStatus.READY  # seen by its own transaction
        raise ZeroDivisionError
    with pytest.raises(TaskResultDoesNotExist):
        backend.get_result(lost.id)

    @sync_to_async
    def outer() -> Any:
        with transaction.atomic():
            kept = samples.noop.enqueue()
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                samples.noop.enqueue()
                raise ZeroDivisionError
        return kept

    kept = await outer()
    assert [row["id"] for row in await pg.fetch("select id from streamworker.jobs")] == [kept.id]
