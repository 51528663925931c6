"""Tasks that the tests of this folder enqueue."""

from __future__ import annotations

import asyncio
import threading

import django.db
from asgiref.sync import sync_to_async
from django.db import connection, transaction
from django.tasks import TaskContext, task

from streamworker import Discard
from streamworker.integrations.django import run_options

RELEASE = threading.Event()


@task
def noop(*args, **kwargs):
    return None


@task
async def noop_async(*args, **kwargs):
    return None


@task
def double(number):
    return 2 * number


@task
async def double_async(number):
    await asyncio.sleep(0)
    return 2 * number


@task
def fails_value_error():
    raise ValueError("This Task failed due to ValueError")


@task
async def fails_async():
    raise LookupError("no such row, password=hunter2")


@task
def fails_system_exit():
    raise SystemExit("This Task failed due to SystemExit")


@task
def complex_exception():
    raise ValueError(ValueError("This task failed"))


@task
def complex_return_value():
    return lambda: True


@task
def long_traceback(depth):
    if depth:
        return long_traceback.func(depth - 1)
    raise RuntimeError("deep\n\nraised builtins.KeyError:\nnot this")


@task(takes_context=True)
def task_id(context):
    return context.task_result.id


@task(takes_context=True)
def check_context(context, attempt):
    assert isinstance(context, TaskContext)
    assert context.attempt == attempt == context.run.attempt
    assert context.task_result.args == [attempt] and context.run.job.id == context.task_result.id


@task(takes_context=True)
@run_options(max_attempts=3)
def third_time(context):
    if context.attempt < 3:
        raise ValueError(f"attempt {context.attempt}")
    return [error.exception_class_path for error in context.task_result.errors]


@task(takes_context=True)
@run_options(max_attempts=3)
async def third_time_async(context):
    if context.attempt < 3:
        raise ValueError(f"attempt {context.attempt}")
    return len(context.task_result.worker_ids)


@task
@run_options(max_attempts=5)
def discards():
    raise Discard("the customer is gone")


@task
@run_options(timeout=0.2)
async def sleeps():
    await asyncio.sleep(60)


@task
def waits():
    assert RELEASE.wait(30)


@task
def insert(number, fails=False):
    with connection.cursor() as cursor:
        cursor.execute("insert into effect (n) values (%s)", [number])
    if fails:
        raise ValueError("no")
    return number


@task(takes_context=True)
def insert_once(context, number):
    with context.run.transaction(django.db.connection), connection.cursor() as cursor:
        cursor.execute("insert into effect (n) values (%s)", [number])


@task
async def insert_async(number):
    await sync_to_async(insert.func)(number)


@task
def enqueues(number):
    with transaction.atomic():
        return insert.enqueue(number).id
