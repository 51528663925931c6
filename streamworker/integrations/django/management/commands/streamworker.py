"""``manage.py streamworker COMMAND …``: the command line of streamworker, with Django's settings.

This process becomes ``python -m streamworker COMMAND …``: its options, its signals, its exit codes.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, Final

import django
from django.conf import ENVIRONMENT_VARIABLE
from django.core.management import base
from django.db import connections

from streamworker.integrations.django import LEDGER_URLS, is_set, url_of

APP: Final = "streamworker.integrations.django.task_worker:app"
_USAGE: Final = "usage: manage.py streamworker COMMAND ..., such as: manage.py streamworker worker --concurrency 20\n"


class Command(base.BaseCommand):
    """The command line of streamworker: worker, jobs, queues, dead, dashboard, check and all others."""

    help = "The command line of streamworker, with Django's settings: streamworker worker runs a worker for tasks."

    def run_from_argv(self, argv: list[str]) -> None:
        """Become ``streamworker``.

        Args:
            argv: of ``manage.py``, whose own options (``--settings``, ``--pythonpath``) are in force by now.
        """
        words = _without_own(argv[2:])
        if not words:
            self.stderr.write(_USAGE)
            sys.exit(2)
        os.environ.update(environment())
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "streamworker", *words])  # noqa: S606

    def handle(self, *args: Any, **options: Any) -> None:
        """Called by ``call_command``, whose caller this process has to stay.

        Raises:
            CommandError: always.
        """
        raise base.CommandError("start it as a program: manage.py streamworker COMMAND ...")


def environment() -> dict[str, str]:
    """What streamworker reads of Django, where its own variables do not say otherwise."""
    said: dict[str, str] = {ENVIRONMENT_VARIABLE: os.environ[ENVIRONMENT_VARIABLE]}
    # `-m` puts the working directory onto the path, and manage.py may be called from another.
    said["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in sys.path if path.strip()))
    if django.VERSION >= (6,) and not is_set("STREAMWORKER_APP"):
        said["STREAMWORKER_APP"] = APP
    if not is_set(*LEDGER_URLS):
        alias = _database()
        url = None if alias is None else url_of(alias)
        said |= {} if url is None else {LEDGER_URLS[0]: url}
    return said


def _database() -> str | None:
    """The alias of the ledger's database: that of the backend of tasks, or else the default one."""
    if django.VERSION >= (6,):
        tasks = import_module("django.tasks").task_backends
        for backend in (tasks[alias] for alias in tasks):
            if hasattr(backend, "chosen"):
                return backend.database  # type: ignore[no-any-return]
    return "default" if connections["default"].vendor == "postgresql" else None


def _without_own(words: list[str]) -> list[str]:
    """The words without those that are ``manage.py``'s own."""
    left, rest = [], iter(words)
    for word in rest:
        if word in ("--settings", "--pythonpath"):
            next(rest, None)
        elif not word.startswith(("--settings=", "--pythonpath=")):
            left.append(word)
    return left
