"""``manage.py streamworker``: the command line in Django's environment; its signals and exit codes are those of `streamworker`."""

from __future__ import annotations

import json
import signal

import pytest

pytest.importorskip("django.tasks", reason="django.tasks needs Django 6, and that Python 3.12")

from django.core.management import CommandError, call_command
from django.test.utils import override_settings

from tests.conftest import eventually
from tests.postgres.django.project import Project

# Each starts programs that import Django.
pytestmark = pytest.mark.timeout(240)

INSERT, SLEEP = "shop.tasks.insert", "shop.tasks.sleep"


@pytest.fixture
async def project(tmp_path, database_url, redis_url, pg):
    await pg.execute("create table effect (n integer)")
    return Project(tmp_path, database_url, redis_url)


def enqueue(project, kind, *args, queue="default"):
    payload = json.dumps({"args": args})
    done = project.manage("streamworker", "enqueue", kind, payload, "--queue", queue)
    assert done.returncode == 0, done.stderr


async def in_transaction(pg, kind, *args, queue="default"):
    await pg.fetchval("select streamworker.enqueue($1, $2::text::jsonb, $3)", kind, json.dumps({"args": args}), queue)


async def is_working(raw, count=1):
    await eventually(lambda: len(list(raw.scan_iter("streamworker:worker:*"))) == count, 90)


async def rows(pg):
    return sorted(row["n"] for row in await pg.fetch("select n from effect"))


@pytest.mark.parametrize("options", [(), pytest.param(("--processes", "2"), marks=pytest.mark.all)], ids=["one", "two"])
async def test_a_worker_runs_tasks_until_it_is_told_to_stop(project, pg, raw, options):
    """Its queues are those of TASKS, its database is Django's: neither is said again. Rows of psql are tasks, too."""
    await in_transaction(pg, INSERT, 1)
    with project.started("streamworker", "worker", *options, "--settings", "site_settings") as worker:
        await is_working(raw, 2 if options else 1)
        enqueue(project, INSERT, 2)
        await eventually(lambda: at_end(pg, 2), 90)
        await in_transaction(pg, SLEEP, 1, queue="mail")
        await eventually(
            lambda: pg.fetchval(
                "select status in ('dispatched', 'running') from streamworker.jobs where kind = $1", SLEEP
            )
        )
        await eventually(lambda: raw.xpending("stream:{mail}", "workers")["pending"] == 1)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0, (project.directory / "out.log").read_text()
    assert await rows(pg) == [1, 2]
    assert await pg.fetchval("select status from streamworker.jobs where kind = $1", SLEEP) == "completed"


async def at_end(pg, count):
    return await pg.fetchval("select count(*) = $1 from streamworker.jobs where status = 'completed'", count)


@pytest.mark.all
async def test_a_killed_worker_loses_no_task(project, pg, raw):
    with project.started("streamworker", "worker") as first:
        await is_working(raw)
        await in_transaction(pg, SLEEP, 2, queue="mail")
        await eventually(
            lambda: raw.xlen("stream:{mail}") == 1 and raw.xpending("stream:{mail}", "workers")["pending"] == 1
        )
        first.kill()
        first.wait()
    with project.started("streamworker", "worker") as second:
        await eventually(lambda: at_end(pg, 1), 90)
        second.send_signal(signal.SIGTERM)
        assert second.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "usage: manage.py streamworker COMMAND"),
        (("nonsense",), 2, "nonsense"),
        (("worker", "--lease", "x"), 78, "--lease"),
        (("worker", "--redis-url", "redis://127.0.0.1:1/0", "--burst"), 69, "127.0.0.1:1"),
        (("jobs", "show", "nothing"), 1, "nothing"),
    ],
)
async def test_exit_codes_are_those_of_streamworker(project, words, code, said):
    done = project.manage("streamworker", *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr + done.stdout and "Traceback" not in done.stderr


async def test_settings_without_a_backend_are_named(project):
    settings = project.directory / "site_settings.py"
    settings.write_text(settings.read_text() + "\nTASKS = {}\n")
    done = project.manage("streamworker", "worker", "--burst")
    assert done.returncode == 78, done.stderr
    assert "TASKS of Django's settings has no backend of streamworker" in done.stderr


async def test_a_database_url_of_the_environment_goes_before(project):
    done = project.manage("streamworker", "jobs", "list", DATABASE_URL="postgresql://nobody@127.0.0.1:1/nowhere")
    assert done.returncode == 69 and "('127.0.0.1', 1)" in done.stderr


async def test_a_program_that_calls_the_command_is_not_replaced(backend):
    with (
        override_settings(INSTALLED_APPS=["streamworker.integrations.django"]),
        pytest.raises(CommandError, match="as a program"),
    ):
        call_command("streamworker")
