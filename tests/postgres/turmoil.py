"""Jobs enqueued and done in PostgreSQL transactions, while workers, Redis and PostgreSQL are killed: exactly once all the same.

``./dev turmoil --jobs 20000`` is the whole of it: a worker is killed every second, some are frozen inside their transactions,
workers of the queue have different leases; Redis is flushed, falls back to what a lagging replica knew, and loses its group;
PostgreSQL is restarted and may not write for a while; and a producer of another queue does what its rights allow, to the
jobs of this one; ``--mode list`` is the same over lists. `test_once_and_for_all.py` runs a small one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import redis

from streamworker import App, Payload, Settings
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.postgres.migrate import Migrator
from tests import forkserver
from tests.conftest import Server
from tests.postgres.servers import PostgresServer
from tests.postgres.stacks import ERRORS, STACKS, stack_of

ROOT = Path(__file__).parents[2]

PROJECT = """
import os
from contextlib import asynccontextmanager

from streamworker import App, Backoff, Context
from tests.postgres.stacks import stack_of
from tests.postgres.turmoil import Noise, Write

stack = stack_of({stack!r})

@asynccontextmanager
async def lifespan():
    async with stack.source(os.environ["DATABASE_URL"]) as source:
        yield source

app = App(lifespan=lifespan)

@app.handler
async def noise(payload: Noise) -> None:
    pass

options = dict(max_attempts=100, backoff=Backoff(base=0.2, cap=2), timeout=20)
"""
ASYNC = """
@app.handler(**options)
async def write(payload: Write, ctx: Context) -> None:
    async with ctx.transaction({source}) as given:
        await stack.execute(given, f"insert into effect (n) values ({{payload.n}})")
"""
BLOCKING = """
@app.handler(**options)
def write(payload: Write, ctx: Context) -> None:
    with ctx.transaction({source}) as given:
        at_once(stack.execute(given, f"insert into effect (n) values ({{payload.n}})"))

from streamworker.loops import at_once
"""
DJANGO_TASKS = """
import os

from tests.postgres.stacks import stack_of
from tests.postgres.turmoil import Noise

stack_of("django-tasks").configure(os.environ["DATABASE_URL"])

from streamworker.integrations.django.task_worker import TasksApp

app = TasksApp()

@app.handler
async def noise(payload: Noise) -> None:
    pass
"""


class Write(Payload, kind="write", queue="writes"):
    """One row to insert."""

    n: int


class Noise(Payload, kind="noise", queue="public"):
    """What the hostile producer may enqueue."""


class Turmoil:
    """Servers, workers, a producer, and what happens to them.

    Args:
        directory: for data and logs.
        jobs: how many.
        workers: processes at a time.
        seed: of what is left to chance.
        leases: seconds, of which each worker gets one by chance.
        stack: the library that enqueues and writes, by its name in `stacks`.
        mode: stream or list.
    """

    def __init__(
        self,
        directory: Path,
        *,
        jobs: int,
        workers: int,
        seed: int = 0,
        leases: Sequence[str] = ("2", "2", "5"),
        stack: str = "asyncpg",
        mode: str = "stream",
    ) -> None:
        self.mode = mode
        keys = {"stream": QueueKeys, "list": ListKeys}[mode]
        self.writes, self.public = keys("writes"), keys("public")
        self.leases = leases
        self.directory = directory
        self.jobs = jobs
        self.random = random.Random(seed)
        self.postgres = PostgresServer(directory / "pg")
        (directory / "redis").mkdir()
        self.redis = Server(directory / "redis")
        self.processes: list[forkserver.Forked] = []
        self.count = workers
        self.told: list[str] = []
        self.started = time.monotonic()
        self.over = asyncio.Event()
        self._asking = anyio.Lock()
        self._connection: asyncpg.Connection | None = None
        self.stack = stack_of(stack)
        self.settings: dict[str, str] = {}
        """Of the workers, beside those that all have."""
        handler = (BLOCKING if self.stack.blocking else ASYNC).format(
            source="" if stack == "asyncpg" else "ctx.services"
        )
        program = DJANGO_TASKS if stack == "django-tasks" else PROJECT.format(stack=stack) + handler
        (directory / "turmoil_app.py").write_text(program)

    def tell(self, what: str) -> None:
        self.told.append(f"{time.monotonic() - self.started:7.1f}  {what}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        if self._connection is not None:
            self._connection.terminate()
        self.redis.kill()
        self.postgres.kill()

    # -- what happens

    def start_worker(self) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")}
        env |= {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{self.directory}", "REDIS_URL": self.redis.url, "DATABASE_URL": self.postgres.url(),
            "STREAMWORKER_LEASE": self.random.choice(self.leases), "STREAMWORKER_CONCURRENCY": "20", "STREAMWORKER_LEDGER": "on", "STREAMWORKER_GRACE": "5",
            "STREAMWORKER_MODE": self.mode,
        } | self.settings  # fmt: skip
        with (self.directory / "workers.log").open("ab") as log:
            words = ["worker", "turmoil_app:app"]
            # All stacks and what tests import: two thirds of a second of each worker's start.
            options = {"env": env, "cwd": self.directory, "preload": ["tests.postgres.turmoil"]}
            self.processes.append(forkserver.forked(words, stderr=log, stdout=log, **options))

    def replace_the_dead(self) -> None:
        for process in [each for each in self.processes if each.poll() is not None]:
            self.processes.remove(process)
        while len(self.processes) < self.count:
            self.start_worker()

    def ready(self) -> list[forkserver.Forked]:
        """Workers that give signs of life: on a busy machine it takes them longer to start than to be killed."""
        with self.redis.client() as client:
            pids = {int(client.hget(name, "pid") or 0) for name in client.scan_iter("streamworker:worker:*")}
        return [process for process in self.processes if process.pid in pids]

    def kill_worker(self) -> None:
        there = self.ready()
        if not there:
            return
        victim = self.random.choice(there)
        victim.kill()
        victim.wait()
        self.tell(f"killed worker {victim.pid}")
        self.replace_the_dead()

    async def freeze_worker(self) -> None:
        """Stop a worker with its transactions open, for longer than any lease; its successors must not wait for it."""
        there = self.ready()
        if not there:
            return
        victim = self.random.choice(there)
        victim.send_signal(signal.SIGSTOP)
        self.tell(f"froze worker {victim.pid}")
        await anyio.sleep(7)
        victim.send_signal(signal.SIGCONT)
        self.tell(f"worker {victim.pid} goes on")

    def save_redis(self) -> None:
        """What a replica knows that lags from here on."""
        with self.redis.client() as client:
            client.save()
        self.tell("the replica lags")

    def fail_over(self) -> None:
        """The master is lost, and the replica that lagged takes its place."""
        self.redis.kill()
        self.redis.start()
        self.tell("failed over to the replica that lagged")

    def lose_group(self) -> None:
        """Who holds what is lost: the group of a stream; of lists, which have none, what the queue's workers share."""
        with self.redis.client() as client, suppress(redis.ResponseError):
            if self.mode == "list":
                client.delete(self.writes.meta)
            else:
                client.xgroup_destroy(self.writes.ready("normal"), "workers")
        self.tell("destroyed the group")

    async def read_only(self) -> None:
        """PostgreSQL answers and may not write, as a standby, or where the provider found the disk full."""
        await self.ask("select 1")
        for verb, pause in (
            ("set default_transaction_read_only = on", 3.0),
            ("reset default_transaction_read_only", 0.0),
        ):
            while True:
                try:
                    pg = await asyncpg.connect(
                        self.postgres.url(), timeout=5, server_settings={"default_transaction_read_only": "off"}
                    )
                    await pg.execute(f"alter system {verb}")
                    await pg.execute("select pg_reload_conf()")
                    await pg.close()
                    break
                except ERRORS:
                    await anyio.sleep(0.1)
            self.tell(f"PostgreSQL: {verb}")
            await anyio.sleep(pause)

    async def hostile_producer(self) -> None:
        """May write to the queue public alone: odd documents, ids of the other queue's jobs, a dead stream that is none."""
        sent = 0
        while not self.over.is_set():
            await anyio.sleep(0.5)
            try:
                pg = await self.connect()
                ids = [
                    row["id"]
                    for row in await pg.fetch(
                        "select id from streamworker.jobs where queue_name = 'writes' order by random() limit 5"
                    )
                ]
                await pg.close()
                with self.redis.client() as client:
                    if sent < 3000:
                        for each in ids:
                            document = {
                                "id": each,
                                "kind": "noise",
                                "payload": {},
                                "hop": self.random.choice([0, 7, 2**53]),
                            }
                            client.execute_command(*self.public.adding("normal", json.dumps(document).encode()))
                        for odd in (
                            b"no json",
                            b"[]",
                            b'{"payload": 1}',
                            b'{"payload": {}, "kind": "noise", "hop": -1}',
                            b"\xff",
                        ):
                            client.execute_command(*self.public.adding("normal", odd))
                        sent += len(ids) + 5
                    if self.random.random() < 0.1:
                        client.set(self.public.dead, "x")
            except (*ERRORS, redis.RedisError):
                continue
        self.tell(f"the hostile producer sent {sent} documents")

    def flush(self) -> None:
        with self.redis.client() as client:
            client.flushall()
        self.tell("flushed Redis")

    def restart_postgres(self) -> None:
        self.random.choice([self.postgres.stop, self.postgres.kill])()
        self.postgres.start()
        self.tell("restarted PostgreSQL")

    # -- the producer and the judge

    async def connect(self) -> asyncpg.Connection:
        return await asyncpg.connect(self.postgres.url(), timeout=5)

    async def prepare(self) -> None:
        await Migrator(self.postgres.url()).up()
        pg = await self.connect()
        # No unique index: a second row would be seen, not prevented.
        await pg.execute("create table wanted (n int); create table effect (n int)")
        await pg.close()

    async def produce(self) -> None:
        """Enqueue all jobs, a few per transaction; some transactions are taken back."""
        app = App(settings=Settings())
        stack, n = self.stack, 0
        async with stack.source(self.postgres.url()) as source:
            while n < self.jobs:
                try:
                    async with stack.open(source) as given:
                        n = await self.ask("select coalesce(max(n) + 1, 0) from wanted")  # an answer may have been lost
                        batch = range(n, min(self.jobs, n + self.random.randint(1, 40)))
                        if not batch:
                            break
                        values = ", ".join(f"({each})" for each in batch)
                        await stack.execute(given, f"insert into wanted values {values}")
                        await stack.enqueue_all(app, given, [Write(n=each) for each in batch])
                        await (stack.rollback if self.random.random() < 0.1 else stack.commit)(given)
                except ERRORS:
                    await anyio.sleep(0.1)
                await anyio.lowlevel.checkpoint()

    async def ask(self, question: str) -> Any:
        """One value, however often PostgreSQL is restarted meanwhile; over one connection, which all who ask share."""
        async with self._asking:
            while True:
                try:
                    if self._connection is None:
                        self._connection = await self.connect()
                    return await self._connection.fetchval(question, timeout=5)
                except ERRORS:
                    if self._connection is not None:
                        self._connection.terminate()
                        self._connection = None
                    await anyio.sleep(0.1)

    async def done(self) -> int:
        return int(await self.ask("select count(*) from effect"))

    async def open(self) -> int:
        return int(
            await self.ask(
                "select count(*) from streamworker.jobs where queue_name = 'writes' and status not in ('completed', 'dead', 'cancelled')"
            )
        )

    async def finish(self, timeout: float) -> None:
        """Wait until nothing is open any more; workers that died are replaced."""
        deadline = time.monotonic() + timeout
        while await self.open():
            assert time.monotonic() < deadline, await self.verdict()
            self.replace_the_dead()
            await anyio.sleep(0.2)

    async def verdict(self) -> dict[str, Any]:
        return {
            "wanted": await self.ask("select count(*) from wanted"),
            "rows": await self.ask("select count(*) from effect"),
            "distinct": await self.ask("select count(distinct n) from effect"),
            "missing": await self.ask("select count(*) from wanted where n not in (select n from effect)"),
            "unwanted": await self.ask("select count(*) from effect where n not in (select n from wanted)"),
            "states": await self.ask(
                "select json_object_agg(status, count)::text from (select status, count(*) from streamworker.jobs where queue_name = 'writes' group by status) as states"
            ),
            "hops": await self.ask("select max(hop) from streamworker.jobs where queue_name = 'writes'"),
        }


PATIENCE = 10.0
"""Seconds without progress after which a worker is killed all the same: it may be the one that is in the way."""
Deed = Callable[[], Awaitable[None] | None]


async def at_progress(turmoil: Turmoil, deeds: list[tuple[float, Deed]]) -> None:
    """Do each deed when that part of the jobs is done."""
    for part, deed in sorted(deeds, key=lambda each: each[0]):
        while await turmoil.done() < part * turmoil.jobs or not turmoil.ready():
            turmoil.replace_the_dead()
            await anyio.sleep(0.05)
        doing = deed()
        if doing is not None:
            await doing


async def all_in_all(turmoil: Turmoil, timeout: float, *nemeses: Callable[[], Awaitable[None]]) -> dict[str, Any]:
    """Prepare, produce, let things happen, and judge."""
    await turmoil.prepare()
    turmoil.replace_the_dead()
    async with anyio.create_task_group() as group:
        group.start_soon(turmoil.produce)
        for nemesis in nemeses:
            group.start_soon(nemesis)
    await turmoil.finish(timeout)
    return await turmoil.verdict()


async def main(jobs: int, workers: int, seed: int, timeout: float, stack: str, mode: str) -> int:
    directory = Path(tempfile.mkdtemp(prefix="turmoil-"))
    turmoil = Turmoil(directory, jobs=jobs, workers=workers, seed=seed, stack=stack, mode=mode)

    async def every_second() -> None:
        """On a busy machine less often: workers that are killed before they have done anything show nothing."""
        done, killed = 0, 0.0
        while not turmoil.over.is_set():
            await anyio.sleep(1)
            before, done = done, await turmoil.done()
            if done > before or time.monotonic() - killed > PATIENCE:
                turmoil.kill_worker()
                killed = time.monotonic()

    async def milestones() -> None:
        await at_progress(
            turmoil,
            [
                *((part, turmoil.flush) for part in (0.2, 0.5, 0.8)),
                *((part, turmoil.restart_postgres) for part in (0.35, 0.65)),
                *((part, turmoil.save_redis) for part in (0.1, 0.4, 0.7)),
                *((part, turmoil.fail_over) for part in (0.14, 0.45, 0.76)),
                *((part, turmoil.lose_group) for part in (0.05, 0.25, 0.6)),
                *((part, turmoil.freeze_worker) for part in (0.3, 0.55, 0.85)),
                *((part, turmoil.read_only) for part in (0.17, 0.9)),
                (0.95, turmoil.over.set),
            ],
        )

    good = False
    try:
        verdict = await all_in_all(turmoil, timeout, every_second, milestones, turmoil.hostile_producer)
        good = (
            verdict["rows"] == verdict["distinct"] == verdict["wanted"] == jobs
            and set(verdict["states"])
            and "dead" not in verdict["states"]
        )
        print(
            f"{'ok' if good else 'BAD'} in {time.monotonic() - turmoil.started:.0f} s, {len(turmoil.told)} events: {verdict}",
            flush=True,
        )
        return 0 if good else 1
    finally:
        turmoil.close()
        if good:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            print("\n".join(turmoil.told), f"\nlogs are in {directory}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--timeout", type=float, default=600, help="seconds for what is left at the end")
    parser.add_argument(
        "--stack",
        default="asyncpg",
        choices=[*(each.name for each in STACKS), "django-tasks"],
        help="the library that writes",
    )
    parser.add_argument("--mode", default="stream", choices=["stream", "list"])
    given = parser.parse_args()
    sys.exit(anyio.run(main, given.jobs, given.workers, given.seed, given.timeout, given.stack, given.mode))
