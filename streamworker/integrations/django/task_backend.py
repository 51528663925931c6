"""`StreamworkerBackend`: a backend of ``django.tasks``, which Django 6 brings. `task_worker` runs what it enqueues.

A task is a job: its kind is the task's path (``shop.tasks.charge``), its payload are the arguments. What the contract
asks for and a job has no place for (the exact priority, ``run_after``) travels in the header `HEADER`.
Source of the contract: https://docs.djangoproject.com/en/6.0/ref/tasks/
"""

from __future__ import annotations

import os
import re
import traceback
import types
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime
from functools import cache, cached_property
from importlib import import_module
from inspect import iscoroutinefunction
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import msgspec
from django.apps import apps
from django.conf import settings as django_settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.tasks import DEFAULT_TASK_BACKEND_ALIAS, Task, TaskResult, TaskResultStatus
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TaskError
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued
from django.utils import timezone

from streamworker import codec
from streamworker.app import App
from streamworker.errors import ConfigurationError, InvalidJob
from streamworker.integrations.django import LEDGER_URLS, LIMITS, is_set, rows_of, url_of
from streamworker.job import Job
from streamworker.payload import KIND_NAME, Payload
from streamworker.policy import Backoff, Limits
from streamworker.postgres import Archive, Attempt, JobRecord
from streamworker.postgres.archive import ATTEMPTS, FIND, open_archive, record_of
from streamworker.postgres.encoding import stored_id
from streamworker.postgres.sqlstate import schema_expected
from streamworker.producer import BackgroundLoop, make_job
from streamworker.redact import ACCOUNT, cut, cut_lines, name_of, text_of
from streamworker.settings import Settings
from streamworker.settings.rules import QUEUE_NAME

HEADER: Final = "django"
"""The header of a task's job: a `TaskHeader`."""
MAX_TRACEBACK: Final = 3000
"""Characters of a traceback that are kept: its first lines and its last ones."""
_ACCOUNT: Final = re.compile(r"[^\n]*\n\nraised ([^\s:]+):\n(.*)", re.DOTALL)
_CLASSES: Final = {
    "raised": "streamworker.errors.Retry",
    "discarded": "streamworker.errors.Discard",
    "timed_out": "builtins.TimeoutError",
    "undecodable": "streamworker.errors.InvalidJob",
    "unknown_kind": "django.tasks.exceptions.InvalidTask",
    "cancelled": "streamworker.errors.JobCancelled",
    "expired": "streamworker.errors.JobExpired",
}
"""The exception that stands for an outcome that has none of its own."""
_NO_ERRORS: Final = frozenset({"ok", "snoozed", "interrupted", "recorded"})
_STATUSES: Final = {
    "running": TaskResultStatus.RUNNING,
    "completed": TaskResultStatus.SUCCESSFUL,
    "dead": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,
    "expired": TaskResultStatus.FAILED,
}


class TaskCall(Payload, kind="django.task", queue="default"):
    """The arguments of a task. Each task has a class of its own, whose kind is its path: `call_class`."""

    args: list[Any] = msgspec.field(default_factory=list)
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class TaskHeader(msgspec.Struct, omit_defaults=True):
    """What Django's contract asks for and a job has no place for.

    Attributes:
        backend: the alias of the backend that enqueued it.
        priority: -100 to 100.
        enqueued_at: when it was enqueued.
        run_after: not before this moment; a retry moves the job's own ``run_at``.
    """

    backend: str = DEFAULT_TASK_BACKEND_ALIAS
    priority: int = 0
    enqueued_at: datetime | None = None
    run_after: datetime | None = None


@cache
def call_class(path: str) -> type[TaskCall]:
    """The payload type of a task.

    Args:
        path: of the task.
    """
    made: Any = types.new_class("TaskCall", (TaskCall,), {"kind": path, "queue": "default"})
    return made  # type: ignore[no-any-return]


class BackendOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``OPTIONS`` of the backend.

    Attributes:
        database: alias of Django's database that holds the ledger: tasks are enqueued in its transactions. ``None``
            enqueues in Redis, apart from any transaction. Unless given, ``default`` if that is PostgreSQL.
        modules: where tasks are, beside the installed apps.
        atomic: each task runs in a transaction of ``database``, which commits together with "this task is done".
        max_attempts: see `django.run_options`.
        timeout: see `django.run_options`.
        backoff: see `django.run_options`.
    """

    database: str | msgspec.UnsetType | None = msgspec.UNSET
    modules: Sequence[str] = ()
    atomic: bool = False
    max_attempts: int = 1
    timeout: float | None = 300.0
    backoff: Backoff = Backoff()

    @property
    def limits(self) -> Limits:
        """Those of tasks that have none of their own."""
        return Limits(self.max_attempts, self.timeout, self.backoff)


class StreamworkerBackend(BaseTaskBackend):
    """``TASKS = {"default": {"BACKEND": "streamworker.integrations.django.StreamworkerBackend"}}``.

    Args:
        alias: its name in ``TASKS``.
        params: its settings there: ``QUEUES``, and ``OPTIONS``, see `BackendOptions`.

    Raises:
        ImproperlyConfigured: an option is unknown or wrong.
    """

    supports_defer = True
    supports_async_task = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        try:
            self.chosen: Final = BackendOptions(**self.options)
            _ = self.chosen.limits
            if isinstance(self.chosen.modules, str):
                raise TypeError("modules must be a list of names")
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"TASKS[{alias!r}]: the OPTIONS of streamworker are wrong: {error}") from None

    # -- where jobs and results are

    @cached_property
    def database(self) -> str | None:
        """The alias of the database in whose transactions tasks are enqueued."""
        if self.chosen.database is not msgspec.UNSET:
            return self.chosen.database
        return "default" if connections["default"].vendor == "postgresql" else None

    @cached_property
    def settings(self) -> Settings:
        """Those of the environment; the ledger is where Django's database is, unless ``DATABASE_URL`` says otherwise.

        Raises:
            ConfigurationError: one of them is wrong.
        """
        url = None if self.database is None or is_set(*LEDGER_URLS) else url_of(self.database)
        return Settings.load(os.environ if url is None else {**os.environ, LEDGER_URLS[0]: url})

    @property
    def supports_get_result(self) -> bool:
        """Results are in the ledger."""
        return self.database is not None or self.settings.database_url is not None

    # -- the contract

    def validate_task(self, task: Any) -> None:
        """Refuse a task that cannot be run.

        Raises:
            InvalidTask: it cannot.
        """
        super().validate_task(task)
        if not QUEUE_NAME.fullmatch(task.queue_name):
            raise InvalidTask(
                f"Queue '{task.queue_name}' is not valid for backend: use 1 to 100 of A-Z a-z 0-9 . _ : - and do not "
                "end in :high or :low."
            )
        if not KIND_NAME.fullmatch(task.module_path):
            raise InvalidTask("The path of the task has more than 200 characters.")
        if self.chosen.atomic and iscoroutinefunction(task.func):
            raise InvalidTask(
                "Backend with the option atomic does not support async Tasks: Django's atomic() has none."
            )

    def enqueue(self, task: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Enqueue a task: in the transaction of `database`, if there is one.

        Raises:
            InvalidTask: it cannot be run, or workers do not import it.
            StreamworkerError: see `App.enqueue`.
        """
        self.validate_task(task)
        if not self.importable(task.func.__module__):
            raise InvalidTask(
                f"Task {task.module_path} is in no app of INSTALLED_APPS, and workers import nothing else: add its "
                "app, or name its module in OPTIONS['modules']."
            )
        result = TaskResult(
            task=task,
            id=codec.new_id(),
            status=TaskResultStatus.READY,
            enqueued_at=timezone.now(),
            started_at=None,
            finished_at=None,
            last_attempted_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )
        self._send(self._job(result))
        task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> Any:
        """The result of a task, as the ledger has it.

        Raises:
            TaskResultDoesNotExist: this backend has enqueued no such task.
            NotImplementedError: there is no ledger.
        """
        if not self.supports_get_result:
            return super().get_result(result_id)
        record, attempts = self._found(str(result_id))
        if record is None:
            raise TaskResultDoesNotExist(result_id)
        header = header_of(_parts(record)[1])
        task = self.task_of(record.kind)
        if task is None:
            raise TaskResultDoesNotExist(f"{result_id}: there is no task {record.kind}")
        return _result_of(record, attempts, as_enqueued(task, header, record.queue))

    def check(self, **kwargs: Any) -> Iterator[Any]:
        """What Django's ``check`` says about this backend."""
        hint: str | None
        for name in sorted(self.queues):
            if not QUEUE_NAME.fullmatch(name):
                hint = "Use 1 to 100 of A-Z a-z 0-9 . _ : - and do not end in :high or :low."
                yield checks.Error(f"TASKS[{self.alias!r}]: {name!r} is no queue name.", hint, id="streamworker.E001")
        alias = self.database
        if alias is not None and (alias not in connections or connections[alias].vendor != "postgresql"):
            hint = "Name a database of PostgreSQL, or None to enqueue in Redis, apart from transactions."
            yield checks.Error(f"TASKS[{self.alias!r}]: the database {alias!r} is none.", hint, id="streamworker.E002")
            return
        if alias is None and self.chosen.atomic:
            hint = "Name the database of the ledger in OPTIONS['database']."
            yield checks.Error(f"TASKS[{self.alias!r}]: atomic needs a database.", hint, id="streamworker.E003")
        try:
            named = self.settings.database_url
        except ConfigurationError as error:
            yield checks.Error(str(error), id="streamworker.E004")
            return
        if alias is not None and named is not None and _differs(named, url_of(alias)):
            hint = (
                "Workers look for jobs in that of DATABASE_URL. If both are the same (behind a pooler), silence this "
                "check; if not, set OPTIONS['database'] to the alias of that one, or to None."
            )
            message = f"TASKS[{self.alias!r}]: DATABASE_URL and Django's database {alias!r} look like two databases."
            yield checks.Warning(message, hint, id="streamworker.W001")

    # -- tasks

    def importable(self, module: str) -> bool:
        """Whether workers import this module: it is one of an installed app, or of ``OPTIONS["modules"]``."""
        names = [*(config.name for config in apps.get_app_configs()), *self.chosen.modules]
        return any(module == name or module.startswith(f"{name}.") for name in names)

    def task_of(self, path: str) -> Any:
        """The task with this path; ``None`` if there is none. No other module is imported for it than `importable`."""
        module, _, name = path.rpartition(".")
        if not module or not self.importable(module):
            return None
        try:
            found = getattr(import_module(module), name, None)
        except ImportError:
            return None
        return found if isinstance(found, Task) and found.module_path == path else None

    def limits_of(self, task: Any) -> Limits:
        """Attempts, timeout and backoff of a task."""
        found: Limits = getattr(task.func, LIMITS, None) or self.chosen.limits
        return found

    # -- enqueueing and reading

    def _job(self, result: Any) -> Job:
        task = result.task
        header = TaskHeader(self.alias, task.priority, result.enqueued_at, task.run_after)
        run_at = task.run_after
        if run_at is not None and timezone.is_naive(run_at):
            run_at = timezone.make_aware(run_at)
        made = make_job(
            call_class(task.module_path)(result.args, result.kwargs),
            queue=task.queue_name,
            priority="high" if task.priority > 0 else "low" if task.priority < 0 else "normal",
            run_at=run_at,
            headers={HEADER: msgspec.to_builtins(header)},
        )
        return msgspec.structs.replace(made, id=result.id)

    def _send(self, job: Job) -> None:
        app, alias = producer(self.settings), self.database
        if alias is None:
            app.enqueue_blocking(job)
            return
        connection = connections[alias]
        if connection.in_atomic_block or not connection.get_autocommit():
            app.enqueue_blocking(job, connection=connection)
            return
        with transaction.atomic(using=alias):
            app.enqueue_blocking(job, connection=connection)

    def _found(self, job_id: str) -> tuple[JobRecord | None, list[Attempt]]:
        if self.database is None:
            record, attempts = _elsewhere(self.settings.database_url or "").call(lambda archive: _read(archive, job_id))
            return (record, attempts) if record is not None and self._is_own(record) else (None, [])
        with schema_expected("read results"):
            records = map(record_of, rows_of(self.database, FIND, stored_id(job_id), None))
            own = next(filter(self._is_own, records), None)
            return own, [] if own is None else self.attempts(own.queue, job_id)

    def _is_own(self, record: JobRecord) -> bool:
        """Whether this backend has enqueued it."""
        return bool(header_of(_parts(record)[1]).backend == self.alias)

    def attempts(self, queue: str, job_id: str) -> list[Attempt]:
        """The runs of a job that have ended; none where only a worker's own connections reach the ledger."""
        if self.database is None:
            return []
        return [Attempt(**row) for row in rows_of(self.database, ATTEMPTS, stored_id(job_id), queue)]


# -- of this process: backends are made anew in each thread


@cache
def producer(settings: Settings) -> App[None]:
    """The app that enqueues with these settings."""
    return App(settings=settings)


@cache
def _archive_loop(url: str, pid: int) -> BackgroundLoop[Any]:  # noqa: ARG001 - a forked child opens its own
    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            yield await open_archive(stack, url)

    return BackgroundLoop(opened)


def _elsewhere(url: str) -> BackgroundLoop[Any]:
    """The ledger that is no database of Django's."""
    return _archive_loop(url, os.getpid())


async def _read(archive: Archive, job_id: str) -> tuple[JobRecord | None, list[Attempt]]:
    record = await archive.find(job_id)
    return record, [] if record is None else await archive.attempts(record.queue, job_id)


# -- a job as the result of a task


def as_enqueued(task: Any, header: TaskHeader, queue: str) -> Any:
    """The task with the queue, priority and time that it was enqueued with."""
    with suppress(InvalidTask):  # a queue that the settings no longer name
        return replace(
            task, backend=header.backend, priority=header.priority, queue_name=queue, run_after=header.run_after
        )
    return task


def header_of(headers: Any) -> TaskHeader:
    """What a task's job says about it; the defaults for jobs that were enqueued by other means."""
    try:
        return msgspec.convert((headers or {}).get(HEADER, {}), TaskHeader)
    except (AttributeError, msgspec.ValidationError):
        return TaskHeader()


def error_of(error: BaseException) -> Any:
    """An error as Django's contract has it."""
    path = f"{type(error).__module__}.{type(error).__qualname__}"
    return TaskError(exception_class_path=path, traceback="".join(traceback.format_exception(error)))


def keep_account(error: BaseException, told: Any) -> None:
    """Let the ledger keep the class and the traceback of an error, behind its message.

    Args:
        error: of a task.
        told: the same, by `error_of`.
    """
    head = f"{name_of(error)}: {text_of(error)}".partition("\n")[0]
    account = f"{cut(head, 500)}\n\nraised {told.exception_class_path}:\n{cut_lines(told.traceback, MAX_TRACEBACK)}"
    error.__dict__[ACCOUNT] = account


def history_of(attempts: Sequence[Attempt]) -> tuple[list[str], list[Any]]:
    """(the workers that ran a task, the errors of its runs), in order."""
    workers = [each.worker_id or "" for each in attempts if each.started_at is not None]
    errors = [
        _told_error(each.outcome, each.error) for each in attempts if each.error and each.outcome not in _NO_ERRORS
    ]
    return workers, errors


def _told_error(outcome: str, text: str) -> Any:
    found = _ACCOUNT.fullmatch(text)
    if found is not None:
        return TaskError(exception_class_path=found[1], traceback=found[2])
    path = _CLASSES.get(outcome, "streamworker.errors.StreamworkerError")
    return TaskError(exception_class_path=path, traceback=f"{text}\n")


def _result_of(record: JobRecord, attempts: Sequence[Attempt], task: Any) -> Any:
    payload, headers = _parts(record)
    call = TaskCall() if payload is None else _decode(payload)
    status = _STATUSES.get(record.status, TaskResultStatus.READY)
    workers, errors = history_of(attempts)
    started = [each.started_at for each in attempts if each.started_at is not None]
    if status is TaskResultStatus.RUNNING:
        workers.append(record.worker_id or "")
        started += [record.started_at] if record.started_at is not None else []
    if status is TaskResultStatus.FAILED and not errors:
        errors.append(_told_error(record.status, record.error or record.status))
    result = TaskResult(
        task=task,
        id=record.id,
        status=status,
        enqueued_at=header_of(headers).enqueued_at or _moment(record.created_at),
        started_at=_moment(started[0] if started else record.started_at),
        finished_at=_moment(record.finished_at),
        last_attempted_at=_moment(started[-1] if started else record.started_at),
        args=call.args,
        kwargs=call.kwargs,
        backend=task.backend,
        errors=errors,
        worker_ids=workers,
    )
    if status is TaskResultStatus.SUCCESSFUL:
        object.__setattr__(result, "_return_value", record.result)
    return result


_decode: Final = msgspec.json.Decoder(TaskCall).decode


def _parts(record: JobRecord) -> tuple[msgspec.Raw | None, dict[str, Any] | None]:
    """Payload and headers, which are only in the document where the database cannot hold them."""
    if record.payload is None and record.document is not None:
        with suppress(InvalidJob):
            reading = codec.read(bytes(record.document))
            return reading.payload, reading.headers
    return record.payload, record.headers


def _moment(at: datetime | None) -> datetime | None:
    """As Django gives times: aware if ``USE_TZ`` is set."""
    if at is None or timezone.is_naive(at):
        return at
    return at if django_settings.USE_TZ else timezone.make_naive(at)


def _differs(one: str, other: str | None) -> bool:
    """Whether two URLs look like two databases."""
    return other is not None and _place(one) != _place(other)


def _place(url: str) -> tuple[str, str, str]:
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    host = query.get("host") or parts.hostname or "localhost"
    port = query.get("port") or str(parts.port or 5432)
    return "localhost" if host in ("127.0.0.1", "::1") else host, port, parts.path.removeprefix("/")
