"""What does recording the history cost? No-op jobs per second, and CPU a job, with it and without it, in turns."""

from __future__ import annotations

import time

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Bench, settings

SLOTS = 100
LEAST = 0.97
"""Share of the throughput without a history that is promised with it."""


async def ask(url: str, options: Options) -> list[Row]:
    """Both, once a round; the order changes with each round, so that neither is always the first."""
    client = redis.Redis.from_url(url)
    jobs = options.jobs(200_000)
    rates: dict[str, list[float]] = {"off": [], "on": []}
    costs: dict[str, list[float]] = {"off": [], "on": []}
    for number in range(options.rounds):
        for history in ("off", "on") if number % 2 else ("on", "off"):
            await client.flushall()
            bench = Bench(settings(url, concurrency=SLOTS, history=history))
            here = time.process_time()
            rates[history].append(await bench.throughput(jobs))
            costs[history].append((time.process_time() - here) / jobs * 1e6)
    await client.aclose()
    costs_row = Row(
        question="history, CPU a no-op job", what="on", unit="us", values=costs["on"], against=costs["off"],
        versus="off", less=True,
    )  # fmt: skip
    return [*measure.rows_of("history, no-op jobs", "/s", rates, "off", on=LEAST), costs_row]


if __name__ == "__main__":
    measure.main(ask, __doc__)
