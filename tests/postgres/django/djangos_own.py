"""Django's own tests of ``django.tasks`` with our backend in place of Django's: ``./dev django-tests``.

They are in Django's source distribution, which pip downloads for the version that is installed; so this is no part of
the suite. What cannot hold for a backend with a database and workers is named in `CANNOT`, and everything else has to
pass; test_contract.py asserts the same with a real worker between.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from typing import Any, Final

CANNOT: Final = {
    "test_get_missing_result": "it looks a result up without await in a coroutine; Django forbids that to a database",
    "test_refresh_result": "as the one before",
    "test_task_error_invalid_exception": "it runs a task inside enqueue(); ours run in workers",
    "test_task_error_unknown_module": "as the one before",
}
MODULES: Final = ("test_tasks", "test_custom_backend")
"""The others, test_dummy_backend and test_immediate_backend, are about what only these two backends do."""
RECORDING: Final = '''
from streamworker.integrations.django import StreamworkerBackend


class Recording(StreamworkerBackend):
    """Keeps its results in a list, which Django's tests look into."""

    def __init__(self, alias, params):
        super().__init__(alias, {**params, "OPTIONS": {"modules": ["tasks.tasks"], **params.get("OPTIONS", {})}})
        self.results = []

    def clear(self):
        self.results.clear()

    def enqueue(self, task, args, kwargs):
        result = super().enqueue(task, args, kwargs)
        self.results.append(result)
        return result
'''


def download(directory: Path) -> None:
    """Put ``tasks``, the package of Django's tests, into a directory, with our backend for Django's."""
    import django

    version = f"Django=={django.get_version()}"
    options = ["-q", "--no-deps", "--no-binary", ":all:", "-d", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, version], check=True)
    archive = next(directory.glob("*.tar.gz"))
    with tarfile.open(archive) as source:
        wanted = re.compile(r"[^/]+/tests/(tasks/[^/]+\.py)")
        for member in source.getmembers():
            if (match := wanted.fullmatch(member.name)) and (file := source.extractfile(member)):
                (directory / match[1]).parent.mkdir(exist_ok=True)
                text = file.read().decode()
                for name in ("Dummy", "Immediate"):
                    path = f"django.tasks.backends.{name.lower()}"
                    text = text.replace(f"{path}.{name}Backend", "recording.Recording")
                    text = text.replace(f"from {path} import", "from recording import Recording as")
                text = re.sub(r"(class \w+\(\w*TestCase\):)", r"\1\n    databases = '__all__'", text)
                (directory / match[1]).write_text(text)
    (directory / "recording.py").write_text(RECORDING)


def run(postgres_socket: Path) -> int:
    """Run them in a database that Django makes, by our migrations."""
    import django
    from django.conf import settings
    from django.test.runner import DiscoverRunner

    database = {"ENGINE": "django.db.backends.postgresql", "HOST": str(postgres_socket), "USER": "postgres"}
    settings.configure(
        DATABASES={"default": {**database, "NAME": "postgres"}},
        INSTALLED_APPS=["streamworker.integrations.django"],
        TASKS={"default": {"BACKEND": "recording.Recording"}},
        USE_TZ=True,
    )
    django.setup()
    seen: list[str] = []

    class Runner(DiscoverRunner):
        def build_suite(self, *args: Any, **options: Any) -> Any:
            suite = super().build_suite(*args, **options)
            for case in suite:
                name = case.id().rpartition(".")[2]
                seen.append(name)
                if name in CANNOT:
                    setattr(case, name, unittest.skip(CANNOT[name])(getattr(case, name)))
            return suite

    failures = Runner(verbosity=2, interactive=False).run_tests([f"tasks.{module}" for module in MODULES])
    return failures or len(CANNOT.keys() - set(seen))


def main() -> int:
    """Start servers, and run the tests in a process of their own."""
    from tests.conftest import Server
    from tests.postgres.servers import PostgresServer

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "redis").mkdir()
        download(directory)
        postgres = PostgresServer(directory / "pg")
        redis = Server(directory / "redis")
        try:
            paths = os.pathsep.join([str(directory), *filter(None, sys.path)])
            environment = {**os.environ, "PYTHONPATH": paths, "REDIS_URL": redis.url, "STREAMWORKER_LEDGER": "on"}
            command = [sys.executable, "-m", "tests.postgres.django.djangos_own", str(postgres.socket_dir)]
            return subprocess.run(command, env=environment).returncode
        finally:
            redis.kill()
            postgres.stop()


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])) if len(sys.argv) > 1 else main())
