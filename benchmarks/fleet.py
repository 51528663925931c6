"""What does a fleet cost one Redis: a thousand idle consumers and two hundred busy ones?

``python -m benchmarks.fleet [--idle 0 250 500 1000] [--busy 200] [--rate 2000] [--seconds 30]``. Each consumer is the
broker of a real worker with its claim, tick, heartbeat and bell, on connections of its own, without the process
around it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import redis.asyncio as redis
import uvloop

from benchmarks import measure, report
from benchmarks.measure import Row
from benchmarks.server import server
from streamworker.broker import Broker, SettleRequest
from streamworker.broker.claim import StreamOptions
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.stream import StreamBroker
from streamworker.job import Claim, Done

LEASE = 15.0
QUEUE = "fleet"
IDLE_QUEUE = "quiet"
CHILDREN = 4
DONE = Done()


class Consumer:
    """One worker's side of the protocol.

    Args:
        url: of the server.
        name: the worker id.
        queue: which it reads.
    """

    def __init__(self, url: str, name: str, queue: str) -> None:
        self._broker: Broker = StreamBroker(RedisAddress(url), StreamOptions(queues=((queue, None),), lease=LEASE))
        self._name = name
        self._held: list[Claim] = []

    async def run(self) -> None:
        """Live until cancelled."""
        await self._broker.open()
        await self._broker.join(self._name)
        async with asyncio.TaskGroup() as group:
            for loop in (self._claim, self._tick, self._beat):
                group.create_task(loop())
            group.create_task(self._broker.listen(lambda _: None))

    async def _claim(self) -> None:
        while True:
            self._held = await self._broker.claim(10, 5.0, [])
            if self._held:
                await self._broker.settle([SettleRequest(claim, DONE) for claim in self._held])

    async def _tick(self) -> None:
        while True:
            wait = await self._broker.promote()
            await asyncio.sleep(max(0.01, wait))

    async def _beat(self) -> None:
        while True:
            await self._broker.beat({"hostname": self._name})
            await asyncio.sleep(LEASE / 3)


async def consumers(url: str, queue: str, first: int, count: int) -> None:
    """``count`` consumers in this process, until it is told to end."""
    async with asyncio.TaskGroup() as group:
        for number in range(first, first + count):
            group.create_task(Consumer(url, f"{queue}-{number}", queue).run())
            await asyncio.sleep(0.01)


async def produce(client: redis.Redis, rate: int, seconds: float) -> int:
    """About ``rate`` jobs a second, in small batches."""
    begin, sent = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        due = int((time.perf_counter() - begin) * rate) - sent
        pipe = client.pipeline(transaction=False)
        for _ in range(due):
            pipe.execute_command("XADD", f"stream:{{{QUEUE}}}", "*", "job", b'{"kind":"noop","payload":{}}')
        await pipe.execute()
        sent += due
        await asyncio.sleep(0.01)
    return sent


async def cost(client: redis.Redis, arguments: argparse.Namespace, busy: int) -> dict[str, float]:
    """What the server spends while the fleet lives."""
    before, cpu = await client.info("stats"), await client.info("cpu")
    begin = time.perf_counter()
    if busy:
        await produce(client, arguments.rate, arguments.seconds)
    else:
        await asyncio.sleep(arguments.seconds)
    seconds = time.perf_counter() - begin
    after, later, memory = await client.info("stats"), await client.info("cpu"), await client.info("memory")
    return {
        # Commands inside scripts are counted too: an upper bound of what clients send.
        "commands": (after["total_commands_processed"] - before["total_commands_processed"]) / seconds,
        "cpu": sum(later[k] - cpu[k] for k in ("used_cpu_user", "used_cpu_sys")) / seconds * 100,
        "memory": memory["used_memory"] / 1e6,
        "clients": float((await client.info("clients"))["connected_clients"]),
    }


async def size(url: str, idle: int, busy: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one size of fleet."""
    client = redis.Redis.from_url(url)
    await client.flushall()
    children = []
    for queue, total in ((IDLE_QUEUE, idle), (QUEUE, busy)):
        for number in range(CHILDREN):
            share = total // CHILDREN + (number < total % CHILDREN)
            if share:
                words = ["--consumers", url, queue, str(number * 10_000), str(share)]
                children.append(await asyncio.create_subprocess_exec(sys.executable, "-m", "benchmarks.fleet", *words))
    try:
        while (await client.info("clients"))["connected_clients"] < 4 * (idle + busy):  # noqa: ASYNC110 - others connect
            await asyncio.sleep(0.2)
        await asyncio.sleep(3)
        return await cost(client, arguments, busy)
    finally:
        for child in children:
            child.terminate()
            await child.wait()
        await client.aclose()


async def main(url: str, arguments: argparse.Namespace) -> list[Row]:
    """The curve as the fleet grows."""
    rows = []
    sizes: Sequence[tuple[int, int]] = [*((idle, 0) for idle in arguments.idle), (max(arguments.idle), arguments.busy)]
    for idle, busy in sizes:
        figures = await size(url, idle, busy, arguments)
        question = f"{idle} idle, {busy} busy" + (f" at {arguments.rate}/s" if busy else "")
        units = {"commands": "/s", "cpu": "% of a core", "memory": "MB", "clients": ""}
        rows += [
            Row(question=question, what=what, unit=units[what], values=[value], less=True)
            for what, value in figures.items()
        ]
        print(question, figures, file=sys.stderr)
    return rows


if __name__ == "__main__":
    measure.quiet()
    if "--consumers" in sys.argv:
        address, name, start, number = sys.argv[-4:]
        uvloop.run(consumers(address, name, int(start), int(number)))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--idle", type=int, nargs="+", default=[0, 100, 250, 500, 1000])
        parser.add_argument("--busy", type=int, default=200)
        parser.add_argument("--rate", type=int, default=2000)
        parser.add_argument("--seconds", type=float, default=30)
        parser.add_argument("--json", type=Path, help="write everything measured to this file")
        given = parser.parse_args()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        os.environ.setdefault("PYTHONUNBUFFERED", "1")
        with server() as where:
            found = uvloop.run(main(where, given))
        report.table(found)
        if given.json:
            report.as_json(found, given.json, command="./dev bench-fleet")
