"""What does a worker cost that has nothing to do: client commands, CPU of Redis and its own?"""

from __future__ import annotations

import asyncio
import time

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Bench, settings
from streamworker import QueueWorker


async def ask(url: str, options: Options) -> list[Row]:
    """One idle worker at the default lease, watched for half a minute after it settled."""
    seconds = max(10.0, 30 * options.scale)
    client = redis.Redis.from_url(url)
    bench = Bench(settings(url))
    worker = QueueWorker(bench.app, redis=None, database=None, services=None)
    task = asyncio.create_task(worker.start())
    await asyncio.sleep(3)
    before, own, begin = await load(client), time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds)
    after, spent = await load(client), time.perf_counter() - begin
    own = time.process_time() - own
    await worker.stop()
    await task
    await client.aclose()
    commands, cpu = ((b - a) / spent for a, b in zip(before, after, strict=True))
    return [
        Row(question="idle worker", what="commands", unit="/s", values=[commands], goal=1.0, less=True),
        Row(question="idle worker", what="CPU of Redis", unit="ms/s", values=[cpu * 1000], less=True),
        Row(question="idle worker", what="CPU of the worker", unit="ms/s", values=[own / spent * 1000], less=True),
    ]


async def load(client: redis.Redis) -> tuple[float, float]:
    """(commands clients sent, CPU seconds of the server) so far.

    The server counts what scripts call as well. Scripts count once here; what is left is the blocking read: the claim
    script, which asks for one hash a queue, reads each of the three levels.
    """
    stats, cpu = await client.info("commandstats"), await client.info("cpu")
    calls = {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in stats.items()}
    reads = calls.get("xreadgroup", 0) - 3 * calls.get("hmget", 0)
    sent = calls.get("evalsha", 0) + calls.get("eval", 0) + max(0, reads)
    return float(sent), float(cpu["used_cpu_sys"] + cpu["used_cpu_user"])


if __name__ == "__main__":
    measure.main(ask, __doc__)
