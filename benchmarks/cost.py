"""What does one job cost: CPU of the worker, CPU of Redis, and commands that a client sends? And to enqueue it in bulk?

CPU seconds and counts, unlike jobs per second, hardly depend on what else the machine does: the place to look first
when a change shall pay. Two processes on two cores can do no more jobs per second than the dearer side allows.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import redis.asyncio as redis

from benchmarks import measure, reference
from benchmarks.measure import Options, Row
from benchmarks.worker import Bench, settings

SLOTS = 100
GOALS = {("stream", "worker"): 7.0, ("stream", "Redis"): 5.0}
"""Microseconds."""
Costs = dict[str, list[float]]


async def spent(client: redis.Redis) -> tuple[float, float]:
    """(CPU seconds of the server, client commands) so far; scripts count as one command, what they call is not sent."""
    cpu, stats = await client.info("cpu"), await client.info("commandstats")
    scripts = sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))
    plain = sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("client|id", "info"))
    sent = scripts + plain if scripts else sum(entry["calls"] for entry in stats.values())
    return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"]), float(sent)


async def costs(client: redis.Redis, jobs: int, work: Callable[[], Awaitable[None]], costs: Costs) -> None:
    """Note microseconds of CPU per job, here and in Redis, and commands per job, while ``work`` lasts."""
    await client.config_resetstat()
    server, _ = await spent(client)
    here = time.process_time()
    await work()
    here = time.process_time() - here
    after, sent = await spent(client)
    for name, value in (
        ("worker", here / jobs * 1e6),
        ("Redis", (after - server) / jobs * 1e6),
        ("commands", sent / jobs),
    ):
        costs.setdefault(name, []).append(value)


async def ask(url: str, options: Options) -> list[Row]:
    """No-op jobs in both modes and in the bare loop."""
    client = redis.Redis.from_url(url)
    jobs = options.jobs(60_000)
    figures: dict[str, Costs] = {"bare loop": {}, "stream": {}, "list": {}}
    bulk: Costs = {}
    for _ in range(options.rounds):
        for name, costs_of in figures.items():
            await client.flushall()
            if name == "bare loop":
                await reference.fill(client, jobs)
                await costs(client, jobs, lambda: reference.drain(url, jobs, slots=SLOTS, handler=_nothing), costs_of)
            else:
                bench = Bench(settings(url, mode=name, concurrency=SLOTS))
                await costs(client, jobs, lambda: bench.fill(jobs), bulk if name == "stream" else {})  # noqa: B023
                await costs(client, jobs, bench.drained, costs_of)
    await client.aclose()
    rows = []
    for what, unit in (("worker", "us"), ("Redis", "us"), ("commands", "")):
        question = {"worker": "CPU a no-op job, Python", "Redis": "CPU a no-op job, Redis"}.get(what, "commands a job")
        base = figures["bare loop"][what]
        rows.append(Row(question=question, what="bare loop", unit=unit, values=base, less=True))
        rows += [
            Row(
                question=question, what=name, unit=unit, values=figures[name][what], against=base, versus="bare loop",
                goal=GOALS.get((name, what)), less=True, absolute=True,
            )
            for name in ("stream", "list")
        ]  # fmt: skip
    return [
        *rows,
        *(
            Row(question=f"CPU of a job enqueued in bulk, {of}", what="enqueue_many", unit="us", values=bulk[side])
            for side, of in (("worker", "Python"), ("Redis", "Redis"))
        ),
    ]


async def _nothing(_: reference.Payload) -> None:
    pass


if __name__ == "__main__":
    measure.main(ask, __doc__)
