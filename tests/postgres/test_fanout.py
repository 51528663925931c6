"""examples/everyday/fanout.py: fan-out and join, alone and while its workers are killed."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import asyncpg

from tests import forkserver
from tests.conftest import eventually

PROGRAM = Path(__file__).parents[2] / "examples/everyday/fanout.py"
MONTHS = 60


def environment(redis_url: str, database_url: str, mode: str) -> dict[str, str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))
    }
    settings = {"MODE": mode, "LEDGER": "on", "LEASE": "1", "CONCURRENCY": "5", "MAX_DELIVERIES": "50"}
    clean |= {f"STREAMWORKER_{name}": value for name, value in settings.items()}
    return {**clean, "REDIS_URL": redis_url, "DATABASE_URL": database_url}


def call(env: dict[str, str], *arguments: str) -> str:
    done = forkserver.run(arguments, module=PROGRAM.stem, cwd=PROGRAM.parent, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def fleet() -> Iterator[list[forkserver.Forked]]:
    workers: list[forkserver.Forked] = []
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_it_runs(ground, redis_url, database_url):
    assert call(environment(redis_url, database_url, ground.mode)) == "12 months, 780 in all"


async def test_the_join_happens_once_whoever_is_killed(ground, redis_url, database_url):
    env = environment(redis_url, database_url, ground.mode)
    chance = random.Random(9)
    year = call(env, "start", str(MONTHS))
    database = await asyncpg.connect(database_url)
    try:
        with fleet() as workers:

            def hire() -> None:
                workers.append(
                    forkserver.forked(
                        ["worker"], module=PROGRAM.stem, cwd=PROGRAM.parent, env=env, stderr=subprocess.DEVNULL
                    )
                )

            async def closed() -> int:
                return int(await database.fetchval("select count(*) from monthly where year = $1", year) or 0)

            hire()
            hire()
            for kills in range(1, 6):
                await eventually(partial(reached, closed, kills * MONTHS // 8), timeout=60)
                victim = workers.pop(chance.randrange(len(workers)))
                victim.kill()
                victim.wait()
                hire()

            async def summed() -> bool:
                return await database.fetchval("select total from yearly where id = $1", year) is not None

            await eventually(summed, timeout=90)
            assert await closed() == MONTHS
            expected = sum(10 * month for month in range(1, MONTHS + 1))
            # `total` is added to and not set: a second continuation would show.
            row = await database.fetchrow("select remaining, total from yearly where id = $1", year)
            assert tuple(row) == (0, expected)
            kinds = await database.fetch("select kind, count(*) from streamworker.jobs group by 1 order by 1")
            assert dict(kinds) == {"year.close": 1, "month.close": MONTHS, "year.sum": 1}
            await eventually(lambda: settled(database), timeout=60)
    finally:
        await database.close()


async def reached(closed, wanted: int) -> bool:
    return await closed() >= wanted


async def settled(database: asyncpg.Connection) -> bool:
    return not await database.fetchval("select count(*) from streamworker.jobs where status <> 'completed'")
