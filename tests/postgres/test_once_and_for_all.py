"""Transactional jobs under kills, flushes and restarts: exactly one effect each, nothing dead. `turmoil` is the long form."""

from functools import partial

import django
import pytest

from tests.postgres.stacks import BY_DEFAULT, STACKS
from tests.postgres.turmoil import Turmoil, all_in_all, at_progress

OTHERS = {*BY_DEFAULT, "sqlalchemy-scoped-asyncpg", "sqlalchemy-scoped-blocking"} - {"asyncpg"}


# asyncpg forgets to close a connection whose server is killed while it comes about.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(240)
@pytest.mark.all
@pytest.mark.parametrize(
    ("stack", "jobs", "mode"),
    [
        ("asyncpg", 150, "stream"),
        ("asyncpg", 300, "list"),
        # Each adapter by one driver; session and connection of an adapter differ in nothing that a kill could show.
        *((each.name, 150, "stream") for each in STACKS if each.name in OTHERS),
        pytest.param(
            "django-tasks",
            150,
            "stream",
            marks=pytest.mark.skipif(django.VERSION < (6,), reason="needs Django 6"),
        ),
    ],
)
async def test_exactly_one_row_per_job_whatever_dies(tmp_path, stack, jobs, mode):
    turmoil = Turmoil(tmp_path, jobs=jobs, workers=2, seed=1, leases=("1",), stack=stack, mode=mode)
    deeds = [(0.15, turmoil.kill_worker), (0.3, turmoil.flush), (0.4, turmoil.kill_worker), (0.55, turmoil.restart_postgres),
             (0.7, turmoil.flush), (0.8, turmoil.kill_worker)]  # fmt: skip
    try:
        verdict = await all_in_all(turmoil, 180, partial(at_progress, turmoil, deeds))
        assert (verdict["wanted"], verdict["rows"], verdict["distinct"]) == (jobs, jobs, jobs), verdict
        assert verdict["states"] == f'{{ "completed" : {jobs} }}'
        assert len([what for what in turmoil.told if "flushed" in what]) == 2
    finally:
        turmoil.close()
        print("\n".join(turmoil.told))
