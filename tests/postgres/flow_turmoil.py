"""Random flows, while workers, Redis and PostgreSQL are killed: each node that must run ran to its one commit, no other did.

``python -m tests.postgres.flow_turmoil --flows 2000 --mode list`` is the whole of it. When nothing moves any more, every flow
is compared with a model that knows nothing of the SQL; then what died is healed, all flows are retried, and compared again.
``--mutant`` releases successors after the ack instead of in the commit that ends a node: it must lose some.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

from streamworker import App, Settings
from tests.postgres import graphs
from tests.postgres.stacks import ERRORS
from tests.postgres.turmoil import Deed, Turmoil

APP = """
import asyncio

from streamworker import App, Backoff, Context, Discard
from tests.postgres.graphs import Act, grown

app = App()

@app.handler(max_attempts=1000, backoff=Backoff(base=0.1, cap=1), timeout=20)
async def act(payload: Act, ctx: Context) -> None:
    if payload.dies and not await ctx.database.fetchval("select count(*) from healed"):
        raise Discard("as drawn")
    async with ctx.transaction() as pg:
        await pg.execute("insert into effect (flow, n) values ($1, $2)", payload.flow, payload.n)
        if payload.grow:
            await app.start(grown(payload), connection=pg, inside=ctx)
"""
MUTANT = """
import os
import asyncpg
from streamworker.broker.lists import ListBroker
from streamworker.broker.stream import StreamBroker
from streamworker.worker.settler import Settler

ended = []
add = Settler.add

def noted(self, run):
    ended.append(run.job_id)
    add(self, run)

async def release(ids):
    pg = await asyncpg.connect(os.environ["DATABASE_URL"])
    await pg.execute(
        "select streamworker.flow_go_on(array(select node from streamworker.jobs where id = any($1::text[])"
        " and status in ('completed', 'dead')))", ids)
    await pg.close()

def late(kind):
    settle = kind.settle
    async def settled(self, *args, **options):
        ids = ended[:]
        ended.clear()
        answer = await settle(self, *args, **options)
        await asyncio.sleep(0.05)
        await release(ids)
        return answer
    kind.settle = settled

Settler.add = noted
late(StreamBroker)
late(ListBroker)
"""
LATE = """
create or replace function streamworker.node_changed() returns trigger language plpgsql as $$
begin
  update streamworker.flow_nodes set outcome = case new.status when 'completed' then 'ok' when 'dead' then
    case if_failed when 'hold' then 'held' else 'failed' end end where node = new.node;
  return null;
end
$$
"""


class FlowTurmoil(Turmoil):
    """Flows, and what happens to those who run them.

    Args:
        directory: for data and logs.
        flows: how many.
        most: nodes of one.
        workers: processes at a time.
        seed: of what is left to chance.
        mode: stream or list.
        mutant: release after the ack.
    """

    def __init__(
        self,
        directory: Path,
        *,
        flows: int,
        most: int,
        workers: int,
        seed: int,
        mode: str = "stream",
        mutant: bool = False,
    ) -> None:
        super().__init__(
            directory,
            jobs=0,
            workers=workers,
            seed=seed,
            leases=("1",) if flows < 200 else ("2", "2", "4"),
            mode=mode,
        )
        chance = random.Random(seed)
        self.drawn = {f"flow-{n}": graphs.draw(chance, most) for n in range(flows)}
        self.known = {name: graphs.foretell(specs) for name, specs in self.drawn.items()}
        self.jobs = sum(len(graphs.effects(specs, self.known[name])) for name, specs in self.drawn.items())
        self.settings = {"STREAMWORKER_MAX_DELIVERIES": "1000"}
        self.mutant = mutant
        (directory / "turmoil_app.py").write_text(APP + (MUTANT if mutant else ""))

    async def prepare(self) -> None:
        await super().prepare()
        pg = await self.connect()
        await pg.execute(
            "alter table effect add column flow text; alter table wanted add column flow text; create table healed (n int)"
        )
        if self.mutant:
            await pg.execute(LATE)
        await pg.close()

    def lose_group(self) -> None:
        with self.redis.client() as client:
            client.delete("stream:{acts}", "queue:{acts}")
        self.tell("lost a queue")

    async def produce(self) -> None:
        app, left = App(settings=Settings()), list(self.drawn)
        while left:
            try:
                pg = await self.connect()
                transaction = pg.transaction()
                await transaction.start()
                answer = await app.start(graphs.flow_of(left[0], self.drawn[left[0]]), connection=pg)
                if answer.new:
                    await pg.execute("insert into wanted (flow) values ($1)", left[0])
                if self.random.random() < 0.1:
                    await transaction.rollback()
                else:
                    await transaction.commit()
                    left.pop(0)
                await pg.close()
            except ERRORS:
                await anyio.sleep(0.1)

    async def open(self) -> int:
        return int(
            await self.ask(
                "select (select count(*) from streamworker.jobs where status in ('queued', 'dispatching', 'dispatched', 'running',"
                " 'retrying')) + (select count(*) from streamworker.flow_checks)"
            )
        )

    async def wrong(self) -> list[str]:
        """What is not as foretold."""
        pg = await self.connect()
        try:
            rows: dict[str, Counter[int]] = defaultdict(Counter)
            for row in await pg.fetch("select flow, n from effect"):
                rows[row["flow"]][row["n"]] += 1
            found: dict[str, dict[int, str]] = defaultdict(dict)
            for row in await pg.fetch(
                "select flow.key, node.name, node.outcome, node.unrun from streamworker.flow_nodes as node"
                " join streamworker.flows as flow on flow.id = node.flow_id"
                " where node.job_id is not null and node.name !~ '/'"
            ):
                unrun = row["unrun"] and row["outcome"] == "failed"
                found[row["key"]][int(row["name"])] = "unrun" if unrun else row["outcome"] or "blocked"
            status = dict(await pg.fetch("select key, status from streamworker.flows"))
        finally:
            await pg.close()
        wrong = []
        for name, specs in self.drawn.items():
            known = self.known[name]
            for what, is_, should in (
                ("outcomes", found[name], known),
                ("rows", rows[name], Counter(graphs.effects(specs, known))),
                ("status", status.get(name), graphs.status(specs, known)),
            ):
                if is_ != should:
                    wrong.append(f"{name} {what}: {_difference(is_, should)}")
        return wrong

    async def heal(self) -> None:
        """What died succeeds from here on, and every flow is retried."""
        self.known = {name: graphs.foretell(specs, self.known[name]) for name, specs in self.drawn.items()}
        await self.ask("insert into healed values (1) returning 1")
        await self.ask("select count(streamworker.retry_flow(id)) from streamworker.flows")
        self.tell("healed and retried")

    async def verdict(self) -> dict[str, Any]:
        return {
            "open": await self.open(),
            "done": await self.done(),
            "expected": self.jobs,
            "wrong": (await self.wrong())[:10],
        }


def _difference(is_: Any, should: Any) -> str:
    if not isinstance(is_, dict):
        return f"{is_} and not {should}"
    keys = [key for key in {*is_, *should} if is_.get(key) != should.get(key)]
    return ", ".join(f"{key} is {is_.get(key)} and not {should.get(key)}" for key in sorted(keys)[:5])


async def at_progress(turmoil: FlowTurmoil, deeds: list[tuple[float, Deed]]) -> None:
    """Do each deed when that part of the rows is there, or when nothing moves any more."""
    for part, deed in sorted(deeds, key=lambda each: each[0]):
        quiet_since = time.monotonic()
        while await turmoil.done() < part * turmoil.jobs or not turmoil.ready():
            turmoil.replace_the_dead()
            if await turmoil.open():
                quiet_since = time.monotonic()
            if time.monotonic() - quiet_since > 3:
                return
            await anyio.sleep(0.05)
        doing = deed()
        if doing is not None:
            await doing


async def all_in_all(
    turmoil: FlowTurmoil,
    timeout: float,
    *nemeses: Callable[[], Awaitable[None]],
    again: Callable[[], Awaitable[None]] | None = None,
) -> list[str]:
    """Prepare, start the flows, let things happen, and judge; twice."""
    await turmoil.prepare()
    turmoil.replace_the_dead()
    async with anyio.create_task_group() as group:
        group.start_soon(turmoil.produce)
        for nemesis in nemeses:
            group.start_soon(nemesis)
    await turmoil.finish(timeout)
    wrong = await turmoil.wrong()
    if wrong or turmoil.mutant:
        return wrong
    await turmoil.heal()
    if again is not None:
        await again()
    await turmoil.finish(timeout)
    return await turmoil.wrong()


async def main(given: argparse.Namespace) -> int:
    flows, most, workers, seed, timeout, mode, mutant = (
        given.flows, given.most, given.workers, given.seed, given.timeout, given.mode, given.mutant,
    )  # fmt: skip
    directory = Path(tempfile.mkdtemp(prefix="flow-turmoil-"))
    turmoil = FlowTurmoil(directory, flows=flows, most=most, workers=workers, seed=seed, mode=mode, mutant=mutant)

    async def again_and_again() -> None:
        while not turmoil.over.is_set():
            await anyio.sleep(given.kill_every)
            turmoil.kill_worker()

    async def milestones() -> None:
        deeds: list[tuple[float, Deed]] = [
            *((part, turmoil.flush) for part in (0.2, 0.5, 0.8)),
            *((part, turmoil.restart_postgres) for part in (0.35, 0.65)),
            *((part, turmoil.save_redis) for part in (0.1, 0.4, 0.7)),
            *((part, turmoil.fail_over) for part in (0.14, 0.45, 0.76)),
            *((part, turmoil.lose_group) for part in (0.05, 0.25, 0.6)),
            *((part, turmoil.freeze_worker) for part in (0.3, 0.55, 0.85)),
            *((part, turmoil.read_only) for part in (0.17, 0.9)),
        ]
        await at_progress(turmoil, deeds)
        turmoil.over.set()

    async def once_more() -> None:
        for deed in (
            turmoil.kill_worker,
            turmoil.flush,
            turmoil.kill_worker,
            turmoil.restart_postgres,
            turmoil.kill_worker,
        ):
            await anyio.sleep(0.7)
            deed()

    good = False
    try:
        wrong = await all_in_all(turmoil, timeout, again_and_again, milestones, again=once_more)
        good = not wrong
        took, nodes = time.monotonic() - turmoil.started, sum(map(len, turmoil.drawn.values()))
        print(
            f"{'ok' if good else 'BAD'} in {took:.0f} s: {flows} flows of {nodes} nodes, {await turmoil.done()} commits, "
            f"{len(turmoil.told)} events: {wrong[:20]}",
            flush=True,
        )
        return 0 if good else 1
    finally:
        turmoil.close()
        if good or mutant:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            print("\n".join(turmoil.told), f"\nlogs are in {directory}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flows", type=int, default=2000)
    parser.add_argument("--most", type=int, default=200, help="nodes of one flow")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument(
        "--kill-every", type=float, default=1, help="seconds; 1 is too often where a worker needs them to start"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--timeout", type=float, default=600, help="seconds for what is left at the end")
    parser.add_argument("--mode", default="stream", choices=["stream", "list"])
    parser.add_argument("--mutant", action="store_true", help="release after the ack: must be found")
    sys.exit(anyio.run(main, parser.parse_args()))
