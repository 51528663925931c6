"""A project of Django in a folder: its settings, an app with tasks, and ``manage.py``, run as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests import forkserver

ROOT = Path(__file__).parents[3]

MANAGE = """
import os
import sys

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_settings")
execute_from_command_line(sys.argv)
"""
SETTINGS = """
SECRET_KEY = "test"
USE_TZ = True
INSTALLED_APPS = ["streamworker.integrations.django", "shop"]
DATABASES = {{"default": {database!r}}}
TASKS = {{"default": {{"BACKEND": "streamworker.integrations.django.StreamworkerBackend", "QUEUES": ["default", "mail"]}}}}
{more}
"""
TASKS = """
import time

from django.db import connection
from django.tasks import task
from streamworker.integrations.django import run_options


@task
@run_options(max_attempts=50)
def insert(number):
    with connection.cursor() as cursor:
        cursor.execute("insert into effect (n) values (%s)", [number])


@task(queue_name="mail")
def sleep(seconds):
    time.sleep(seconds)
"""


def database_of(url: str) -> dict[str, Any]:
    """A database as Django's settings name it."""
    parts, query = urlsplit(url), dict(parse_qsl(urlsplit(url).query))
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path.removeprefix("/"),
        "USER": parts.username or "",
        "HOST": query.get("host") or parts.hostname or "",
        "PORT": str(query.get("port") or parts.port or ""),
        "OPTIONS": {"sslmode": "disable"},
    }


class Project:
    """The project.

    Args:
        directory: for its files.
        database_url: of its database.
        redis_url: where its workers find jobs.
        more: lines of settings.
    """

    def __init__(self, directory: Path, database_url: str, redis_url: str, *, more: str = "") -> None:
        self.directory = directory
        self.redis_url = redis_url
        (directory / "shop").mkdir()
        for name, text in {
            "manage.py": MANAGE,
            "site_settings.py": SETTINGS.format(database=database_of(database_url), more=more),
            "shop/__init__.py": "",
            "shop/tasks.py": TASKS,
        }.items():
            (directory / name).write_text(text)

    def environment(self, **more: str) -> dict[str, str]:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("STREAMWORKER_", "DJANGO_", "DATABASE_", "REDIS_"))
        }
        settings = {"REDIS_URL": self.redis_url, "STREAMWORKER_LEASE": "4", "STREAMWORKER_GRACE": "5"}
        return {**clean, **settings, "PYTHONPATH": f"{self.directory}{os.pathsep}{ROOT}", **more}

    def manage(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run ``manage.py`` from another folder, to its end."""
        program = str(self.directory / "manage.py")
        return forkserver.run(words, module=program, env=self.environment(**more), cwd=Path("/"), timeout=120)

    @contextmanager
    def started(self, *words: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run ``manage.py``, and kill what is left of it at the end."""
        with (self.directory / "out.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(self.directory / "manage.py"), *words],
                env=self.environment(**more), cwd="/", stdout=log, stderr=log,
            )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()
