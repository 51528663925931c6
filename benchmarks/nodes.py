"""What does a job cost Redis, workers and producers when its queue is on 1, 2 or 4 servers?

``python -m benchmarks.nodes [--nodes 1 2 4] [--workers 2] [--jobs 40000] [--rates 500 2000 8000] [--rounds 3]``. Real
worker processes, producers in a process of their own, one partition a server. Two cores cannot show what four servers
do in a second, but what each process spends: CPU seconds hardly depend on what else the machine does.
`benchmarks.capacity` makes a model of it.

Loads: *one by one* and *in bulk*, jobs are enqueued while the queue is paused; *backlog*, they run until none is left;
*N/s*, jobs come at a rate which leaves workers idle, so that each claim finds few; *idle*, nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import redis.asyncio as redis
import uvloop

from benchmarks import measure, report
from benchmarks.measure import Row
from benchmarks.server import on_any_core, server
from benchmarks.worker import Noop, settings
from streamworker import App
from streamworker.broker.keys import QueueKeys, home_name
from streamworker.broker.partitions import partition_of
from streamworker.job import Enqueued

QUEUE = "bench"
PACE = 0.01
"""Seconds between two calls of a producer at a rate."""
WARM = 100
"""Jobs of a producer before it counts."""
IDLE = 4.0
"""Seconds of the load *idle*."""
UNITS = {"redis": "us", "worker": "us", "producer": "us", "trips": "", "producer trips": "", "share": "%", "bytes": "B"}
TICK = os.sysconf("SC_CLK_TCK")
app: App[None] = App()


@app.handler
async def noop(_: Noop) -> None:
    """Nothing."""


class Producing(msgspec.Struct):
    """What a producer says of itself.

    Attributes:
        cpu: seconds that its calls took.
        trips: round trips that they needed.
    """

    cpu: float = 0.0
    trips: int = 0


async def produce(jobs: int, bulk: int, rate: int) -> None:
    """Enqueue so many jobs, ``bulk`` a call or at a rate, and print what it took."""
    told = Producing()
    async with App(settings=msgspec.structs.replace(app.resolve(None), log_level="warning")) as producer:
        partitions = max((each.partitions for each in producer.resolve(None).partitions), default=1)
        await producer.enqueue_many([Noop(n=n) for n in range(WARM)])  # connections, and the numbers of partitions
        begin, sent = time.perf_counter(), 0
        while sent < jobs:
            due = min(jobs, int((time.perf_counter() - begin) * rate)) - sent if rate else min(bulk, jobs - sent)
            if due > 0:
                payloads = [Noop(n=n) for n in range(due)]
                spent = time.process_time()
                stored = await (producer.enqueue_many(payloads) if bulk > 1 else one(producer, payloads[0]))
                told.cpu += time.process_time() - spent
                told.trips += len({partition_of(each.id, partitions) for each in stored})
                sent += due
            if rate:
                await asyncio.sleep(PACE)
    sys.stdout.buffer.write(msgspec.json.encode(told))


async def one(producer: App[None], payload: Noop) -> list[Enqueued]:
    """Enqueue one job."""
    return [await producer.enqueue(payload)]


def spent_by(pids: list[int]) -> float:
    """CPU seconds of these processes and their children, as far as they live."""
    parents, seconds = dict[int, int](), dict[int, float]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            words = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], seconds[pid] = int(words[1]), (int(words[11]) + int(words[12])) / TICK
    total = 0.0
    for pid in seconds:
        above: int | None = pid
        while above is not None and above not in pids:
            above = parents.get(above)
        total += seconds[pid] if above is not None else 0.0
    return total


class State(msgspec.Struct):
    """Counters so far.

    Attributes:
        nodes: CPU seconds of each server.
        trips: round trips that all of them served, but for those of this process.
        sent: bytes in and out of all of them.
        workers: CPU seconds of all workers.
    """

    nodes: list[float]
    trips: int
    sent: int
    workers: float


class Fleet:
    """A queue over servers, and worker processes.

    Args:
        urls: of the servers.
        workers: how many.
    """

    def __init__(self, urls: list[str], workers: int) -> None:
        self.clients = [redis.Redis.from_url(url) for url in urls]
        self._keys = [QueueKeys(home_name(QUEUE, number)) for number in range(len(urls))]
        self._own = 0
        more = {"STREAMWORKER_PARTITIONS": f"{QUEUE}={'|'.join(urls[1:])}"} if len(urls) > 1 else {}
        self._environment = {**os.environ, "REDIS_URL": urls[0], "STREAMWORKER_LOG_LEVEL": "warning", **more}
        command = [sys.executable, "-m", "streamworker", "worker", "benchmarks.nodes:app"]
        self._workers = [
            subprocess.Popen(command, env=self._environment, preexec_fn=on_any_core) for _ in range(workers)
        ]
        self._app = App(settings=settings(urls[0], partitions=more.get("STREAMWORKER_PARTITIONS", ())))

    async def started(self) -> None:
        """Wait until each worker has waited at each server."""
        for client, keys in zip(self.clients, self._keys, strict=True):
            while not await client.exists(keys.base):  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.05)
            while len(await client.xinfo_consumers(keys.base, "workers")) < len(self._workers):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)

    async def state(self) -> State:
        infos = [await client.info() for client in self.clients]
        self._own += len(infos)
        return State(
            [info["used_cpu_user"] + info["used_cpu_sys"] for info in infos],
            sum(info["total_reads_processed"] for info in infos) - self._own,
            sum(info["total_net_input_bytes"] + info["total_net_output_bytes"] for info in infos),
            spent_by([each.pid for each in self._workers]),
        )

    async def produce(self, jobs: int, *, bulk: int = 1000, rate: int = 0) -> Producing:
        words = ["--produce", str(jobs), str(bulk), str(rate)]
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.nodes", *words, env=self._environment, stdout=subprocess.PIPE
        )
        answer, _ = await child.communicate()
        return msgspec.json.decode(answer, type=Producing)

    async def pause(self, paused: bool) -> None:
        async with self._app.operator() as operator:
            await (operator.pause(QUEUE, "for a benchmark") if paused else operator.resume(QUEUE))

    async def drained(self) -> None:
        """Wait until no job is left."""
        for client, keys in zip(self.clients, self._keys, strict=True):
            while await client.xlen(keys.base):
                self._own += 1
                await asyncio.sleep(0.05)
            self._own += 1

    async def connections(self) -> list[float]:
        """Connections to each server for each worker."""
        found = []
        for client in self.clients:
            names = [each["name"] for each in await client.client_list()]
            found.append(
                sum(name.startswith("worker-") or name == "streamworker" for name in names) / len(self._workers)
            )
        return found

    async def stop(self) -> None:
        for each in self._workers:
            each.terminate()
        for each in self._workers:
            await asyncio.to_thread(each.wait)
        for client in self.clients:
            await client.aclose()


def figures(before: State, after: State, jobs: int, produced: Producing) -> dict[str, float]:
    """What a job of a load cost."""
    nodes = [b - a for a, b in zip(before.nodes, after.nodes, strict=True)]
    return {
        "redis": sum(nodes) / jobs * 1e6,
        "share": 100 * max(nodes) / sum(nodes),
        "worker": (after.workers - before.workers) / jobs * 1e6,
        "producer": produced.cpu / jobs * 1e6,
        "trips": (after.trips - before.trips) / jobs,
        "producer trips": produced.trips / jobs,
        "bytes": (after.sent - before.sent) / jobs,
    }


async def round_of(fleet: Fleet, arguments: argparse.Namespace, told: Callable[[str, dict[str, float]], None]) -> None:
    """Each load once."""
    before = await fleet.state()
    await asyncio.sleep(IDLE)
    after = await fleet.state()
    idle = {
        "redis": sum(b - a for a, b in zip(before.nodes, after.nodes, strict=True)) / IDLE / arguments.workers * 1e6,
        "worker": (after.workers - before.workers) / IDLE / arguments.workers * 1e6,
        "trips": (after.trips - before.trips) / IDLE / arguments.workers,
    }
    told("idle", idle)
    await fleet.pause(True)
    await asyncio.sleep(0.5)
    jobs = 0
    for load, count, bulk in (("one by one", arguments.jobs // 10, 1), ("in bulk", arguments.jobs, 1000)):
        before = await fleet.state()
        produced = await fleet.produce(count, bulk=bulk)
        told(load, figures(before, await fleet.state(), count, produced) | {"worker": 0.0})
        jobs += count + WARM
    await fleet.pause(False)
    before = await fleet.state()
    await fleet.drained()
    told("backlog", figures(before, await fleet.state(), jobs, Producing()))
    for rate in arguments.rates:
        before, jobs = await fleet.state(), int(rate * arguments.seconds)
        produced = await fleet.produce(jobs, rate=rate)
        await fleet.drained()
        told(f"{rate}/s", figures(before, await fleet.state(), jobs, produced))


async def measured(arguments: argparse.Namespace) -> list[Row]:
    """Each number of nodes in turns."""
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(arguments.rounds):
        for nodes in arguments.nodes:
            question = f"{nodes} node{'s' * (nodes > 1)}"

            def told(load: str, values: dict[str, float], question: str = question, number: int = number) -> None:
                print(f"  round {number + 1}, {question}, {load}: {values}", file=sys.stderr)
                for name, value in values.items():
                    found.setdefault((f"{question}, {load}", name), []).append(round(value, 4))

            with ExitStack() as stack:
                fleet = Fleet([stack.enter_context(server(pinned=False)) for _ in range(nodes)], arguments.workers)
                try:
                    await fleet.started()
                    told(
                        "connections", {f"of a worker to node {n}": c for n, c in enumerate(await fleet.connections())}
                    )
                    await round_of(fleet, arguments, told)
                finally:
                    await fleet.stop()
    return [
        Row(question=question, what=what, unit=UNITS.get(what, ""), values=values, less=True)
        for (question, what), values in found.items()
    ]


def main() -> int:
    """Measure, and tell."""
    parser = argparse.ArgumentParser(prog="./dev bench-nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="servers of the queue")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=40_000, help="of a backlog")
    parser.add_argument("--rates", type=int, nargs="*", default=[500, 2000, 8000], help="jobs a second")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    measure.quiet()
    rows = uvloop.run(measured(arguments))
    report.table(rows)
    if arguments.json:
        report.as_json(rows, arguments.json, command="./dev bench-nodes")
    return 0


if __name__ == "__main__":
    if "--produce" in sys.argv:
        measure.quiet()
        uvloop.run(produce(*(int(word) for word in sys.argv[-3:])))
    else:
        sys.exit(main())
