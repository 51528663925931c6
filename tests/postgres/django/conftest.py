"""Django with a backend of streamworker, on the servers of a test; and workers that run its tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test.utils import override_settings

from streamworker import QueueWorker
from tests.postgres.stacks import Django
from tests.postgres.working import working

BACKEND = "streamworker.integrations.django.StreamworkerBackend"
MODULES = ["tests.postgres.django.sample_tasks"]

Backend = Callable[..., Any]
Working = Callable[[], AbstractAsyncContextManager[QueueWorker]]


def tasks_setting(*, queues: list[str] | None = None, **options: Any) -> dict[str, Any]:
    """``TASKS`` with one backend."""
    more = {} if queues is None else {"QUEUES": queues}
    return {"default": {"BACKEND": BACKEND, "OPTIONS": {"modules": MODULES, **options}, **more}}


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The options of the backend; a test changes them by parametrizing this fixture indirectly."""
    return getattr(request, "param", {})


@pytest.fixture
async def backend(
    chosen: dict[str, Any], database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """The default backend; Django's database is the ledger's."""
    pytest.importorskip("django.tasks", reason="django.tasks needs Django 6, and that Python 3.12")
    from django.tasks import task_backends

    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    for name, value in {"LEASE": "2", "GRACE": "5", "CONCURRENCY": "10"}.items():
        monkeypatch.setenv(f"STREAMWORKER_{name}", value)
    async with Django().source(database_url):
        await sync_to_async(Django.close)()  # of the thread of `aenqueue`, which outlives a test
        with override_settings(TASKS=tasks_setting(**chosen)):
            yield task_backends["default"]
        await sync_to_async(Django.close)()


@pytest.fixture
def at_work(backend: Any) -> Working:
    """Runs a worker for the tasks."""
    from streamworker.integrations.django.task_worker import TasksApp

    @asynccontextmanager
    async def run() -> AsyncIterator[QueueWorker]:
        async with working(TasksApp()) as worker:
            yield worker

    return run
