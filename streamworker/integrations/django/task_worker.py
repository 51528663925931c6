"""`TasksApp`: the app whose handlers are the tasks of Django. ``manage.py streamworker worker`` runs it.

Without ``manage.py``: ``streamworker worker streamworker.integrations.django.task_worker:app``. A program that has
handlers of its own makes a `TasksApp` and registers them with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from inspect import iscoroutinefunction
from pkgutil import walk_packages
from typing import Any, Final

import django
import msgspec
from asgiref.sync import sync_to_async
from django.apps import apps
from django.db import connections
from django.tasks import Task, TaskContext, TaskResult, TaskResultStatus, task_backends
from django.tasks.signals import task_finished, task_started
from django.utils import timezone
from django.utils.json import normalize_json
from django.utils.module_loading import module_has_submodule

from streamworker.context import Context
from streamworker.errors import ConfigurationError, Discard, HandlerSignal, Retry, RunEnded
from streamworker.handlers import Registration
from streamworker.integrations.django import DjangoApp, closing, rows_of
from streamworker.integrations.django.task_backend import (
    StreamworkerBackend,
    TaskCall,
    as_enqueued,
    call_class,
    error_of,
    header_of,
    history_of,
    keep_account,
)
from streamworker.payload import decoder_of
from streamworker.postgres import Attempt

LATE: Final = 1000
"""Most kinds without a handler that are remembered."""
_STORE_RESULT: Final = """
update streamworker.jobs set result = $1::text::jsonb where queue_name = $2::text and id = $3::text returning id"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamworkerTaskContext(TaskContext):
    """What a task with ``takes_context=True`` is given.

    Attributes:
        run: the job's `Context`: ``context.run.transaction(connection)``, ``.progress()``, ``.cancelled``.
    """

    run: Context[Any]


class TasksApp(DjangoApp[Any]):
    """`DjangoApp` that runs the tasks of all `StreamworkerBackend` in ``TASKS``, beside handlers of its own.

    It imports the modules (and packages) ``tasks`` of all installed apps, and those of ``OPTIONS["modules"]``; a task
    in another module of an installed app is imported when it comes.

    Args:
        options: those of `App`.

    Raises:
        ConfigurationError: ``TASKS`` names none; or ``encryption`` is given.
    """

    def __init__(self, **options: Any) -> None:
        made = (task_backends[alias] for alias in task_backends)
        self.backends: Final = {each.alias: each for each in made if isinstance(each, StreamworkerBackend)}
        if not self.backends:
            raise ConfigurationError(
                "TASKS of Django's settings has no backend of streamworker: set its BACKEND to "
                "'streamworker.integrations.django.StreamworkerBackend'"
            )
        if options.get("encryption") is not None:
            raise ConfigurationError(
                "TasksApp(encryption=...) would seal results that Django could not read: give it to an App of its own"
            )
        self._first: Final = next(iter(self.backends.values()))
        super().__init__(**{"settings": self._first.settings, **options})
        self._late: Final = lru_cache(LATE)(self._look_for)
        for path, task in self._tasks():
            self._add(self._registration(path, task))

    @property
    def queues(self) -> list[str]:
        """Those of ``QUEUES``, and of all tasks and handlers."""
        named = (name for backend in self.backends.values() for name in sorted(backend.queues))
        return list(dict.fromkeys([*super().queues, *named]))

    def handler_of(self, kind: str | None, queue: str) -> Registration | None:
        """The handler of a kind, or the task with this path."""
        return super().handler_of(kind, queue) or (self._late(kind) if kind else None)

    def _look_for(self, kind: str) -> Registration | None:
        task = next(filter(None, (backend.task_of(kind) for backend in self.backends.values())), None)
        return None if task is None else closing(self._registration(kind, task))

    def _tasks(self) -> Iterator[tuple[str, Any]]:
        """The tasks of all modules that may have some, by their paths."""
        found: dict[str, Any] = {}
        for module in self._modules():
            for value in vars(module).values():
                if isinstance(value, Task) and any(b.task_of(value.module_path) for b in self.backends.values()):
                    found.setdefault(value.module_path, value)
        return iter(found.items())

    def _modules(self) -> Iterator[Any]:
        for config in apps.get_app_configs():
            if module_has_submodule(config.module, "tasks"):
                yield from _with_submodules(f"{config.name}.tasks")
        for name in dict.fromkeys(name for backend in self.backends.values() for name in backend.chosen.modules):
            yield from _with_submodules(name)

    def _registration(self, path: str, task: Any) -> Registration:
        backend = self.backends.get(task.backend, self._first)
        payload = call_class(path)
        is_async = iscoroutinefunction(task.func)
        return Registration(
            kind=path,
            queue=task.queue_name,
            payload=payload,
            function=_async_handler(backend, task) if is_async else _handler(backend, task),
            decode=decoder_of(payload),
            limits=backend.limits_of(task),
            is_async=is_async,
            wants_context=True,
        )


def _with_submodules(name: str) -> Iterator[Any]:
    module = import_module(name)
    yield module
    if hasattr(module, "__path__"):
        for each in walk_packages(module.__path__, f"{name}."):
            if not each.name.endswith(".__main__"):
                yield import_module(each.name)


# -- one run of a task


class _TaskRun:
    """One run: the result as Django's signals and contexts are given it.

    Args:
        backend: of the task.
        task: it.
        call: its arguments.
        ctx: of the job.
        earlier: the runs before this one.
    """

    def __init__(
        self, backend: StreamworkerBackend, task: Any, call: TaskCall, ctx: Context[Any], earlier: list[Attempt]
    ) -> None:
        self.sender: Final = type(backend)
        self._ctx = ctx
        header, now = header_of(ctx.job.headers), timezone.now()
        workers, errors = history_of(earlier)
        workers = [""] * (ctx.attempt - 1 - len(workers)) + workers
        started = [each.started_at for each in earlier if each.started_at is not None]
        self.result: Final = TaskResult(
            task=as_enqueued(task, header, ctx.job.queue),
            id=ctx.job.id,
            status=TaskResultStatus.RUNNING,
            enqueued_at=header.enqueued_at,
            started_at=started[0] if started else now,
            finished_at=None,
            last_attempted_at=now,
            args=call.args,
            kwargs=call.kwargs,
            backend=header.backend,
            errors=errors,
            worker_ids=[*workers, ctx.worker_id],
        )
        first = (StreamworkerTaskContext(task_result=self.result, run=ctx),) if task.takes_context else ()
        self.arguments: Final = (*first, *call.args)

    def succeeded(self, value: Any) -> None:
        """The task has returned."""
        object.__setattr__(self.result, "_return_value", value)
        self._finished(TaskResultStatus.SUCCESSFUL)

    def failed(self, error: BaseException) -> bool:
        """The task has raised; whether that is its end. What is recorded of the error has its class and traceback."""
        last = self._ctx.last_attempt
        if isinstance(error, RunEnded | asyncio.CancelledError | GeneratorExit):
            return False  # the worker's to judge
        if isinstance(error, HandlerSignal):
            last = isinstance(error, Discard) or (last and isinstance(error, Retry))
        else:
            told = error_of(error)
            keep_account(error, told)
            self.result.errors.append(told)
        if last:
            self._finished(TaskResultStatus.FAILED)
        return last

    def _finished(self, status: Any) -> None:
        object.__setattr__(self.result, "finished_at", timezone.now())
        object.__setattr__(self.result, "status", status)


def _earlier(backend: StreamworkerBackend, ctx: Context[Any]) -> list[Attempt]:
    """The runs before this one: nothing is asked in a first attempt."""
    return backend.attempts(ctx.job.queue, ctx.job.id) if ctx.attempt > 1 else []


def _handler(backend: StreamworkerBackend, task: Any) -> Callable[[TaskCall, Context[Any]], Any]:
    """A handler that runs a sync task, in a thread."""

    def handler(call: TaskCall, ctx: Context[Any]) -> Any:
        run = _TaskRun(backend, task, call, ctx, _earlier(backend, ctx))
        task_started.send_robust(run.sender, task_result=run.result)
        try:
            with _transaction(backend, ctx):
                value = normalize_json(task.func(*run.arguments, **call.kwargs))
                if backend.chosen.atomic and value is not None:
                    text = msgspec.json.encode(value).decode()
                    rows_of(backend.database or "", _STORE_RESULT, text, ctx.job.queue, ctx.job.id)
        except BaseException as error:
            if run.failed(error):
                task_finished.send_robust(run.sender, task_result=run.result)
            raise
        run.succeeded(value)
        task_finished.send_robust(run.sender, task_result=run.result)
        return value

    return handler


def _transaction(backend: StreamworkerBackend, ctx: Context[Any]) -> Any:
    """With the option ``atomic``: the transaction in which the task's writes commit with its end."""
    return ctx.transaction(connections[backend.database]) if backend.chosen.atomic else nullcontext()


def _async_handler(backend: StreamworkerBackend, task: Any) -> Callable[[TaskCall, Context[Any]], Any]:
    """A handler that runs an async task, on the event loop."""

    async def handler(call: TaskCall, ctx: Context[Any]) -> Any:
        earlier = await sync_to_async(_earlier)(backend, ctx) if ctx.attempt > 1 else []
        run = _TaskRun(backend, task, call, ctx, earlier)
        await task_started.asend_robust(run.sender, task_result=run.result)
        try:
            value = normalize_json(await task.func(*run.arguments, **call.kwargs))
        except BaseException as error:
            if run.failed(error):
                await task_finished.asend_robust(run.sender, task_result=run.result)
            raise
        run.succeeded(value)
        await task_finished.asend_robust(run.sender, task_result=run.result)
        return value

    return handler


def __getattr__(name: str) -> Any:
    """``app``: what a worker runs that is given nothing else; Django is set up for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    django.setup()
    globals()["app"] = made = TasksApp()
    return made
