"""Where does the worker's time go? Its CPU for a no-op job, by part, from samples of where it stands.

A timer of the process's CPU interrupts it; the part is that of the innermost frame that belongs to one. A sample costs
little and falls anywhere, so that no part looks dearer for being called often, as it does under a tracing profiler.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import redis.asyncio as redis

from benchmarks import measure
from benchmarks.measure import Options, Row
from benchmarks.worker import Bench, settings

EVERY = 0.001
"""Seconds of CPU between samples; the system may make them longer."""
PARTS = {
    "connection: send, receive, parse": ("/redis/", "broker/redis/", "broker/scripts.py", "asyncio/streams.py"),
    "claim: script, claims, leases": ("broker/", "worker/fetcher.py", "worker/inflight.py", "worker/lease.py"),
    "decode: document, handler, payload": ("codec.py", "payload.py", "handlers.py", "policy.py"),
    "task and context of its own": ("worker/tasks.py", "worker/job_task.py", "worker/admission.py"),
    "call: executor, handler": ("worker/executor.py", "context.py", "benchmarks/", "worker/observers.py"),
    "settle: judge, fence, history": ("worker/settler.py", "broker/settle.py", "worker/history_recorder.py"),
    "event loop": ("asyncio/", "uvloop/", "threading.py", "anyio/"),
}
REST = "rest"


def part_of(frame: FrameType | None) -> str:
    """The part in which a process stands; of several the one whose name of a file is the longest."""
    while frame is not None:
        name = frame.f_code.co_filename
        found = [(len(mark), part) for part, marks in PARTS.items() for mark in marks if mark in name]
        if found:
            return max(found)[1]
        frame = frame.f_back
    return REST


@contextmanager
def sampled(counts: Counter[str]) -> Iterator[None]:
    """Count samples by part while the block runs."""

    def sample(_: int, frame: FrameType | None) -> None:
        counts[part_of(frame)] += 1

    before = signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, EVERY, EVERY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


async def ask(url: str, options: Options) -> list[Row]:
    """Microseconds of a no-op job in each part, in stream mode."""
    client = redis.Redis.from_url(url)
    jobs = options.jobs(200_000)
    figures: dict[str, list[float]] = {part: [] for part in (*PARTS, REST)}
    for _ in range(options.rounds):
        await client.flushall()
        bench = Bench(settings(url))
        await bench.fill(jobs)
        counts = Counter[str]()
        here = time.process_time()
        with sampled(counts):
            await bench.drained()
        here = time.process_time() - here
        for part, values in figures.items():
            values.append(here / jobs * 1e6 * counts[part] / max(1, counts.total()))
    await client.aclose()
    return [
        Row(question="of a no-op job's CPU, Python", what=part, unit="us", values=values, less=True)
        for part, values in figures.items()
        if any(values)
    ]


if __name__ == "__main__":
    measure.main(ask, __doc__)
