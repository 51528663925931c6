"""The workload that every contestant runs. Standard library only: this runs in each peer's own environment.

A contestant is a script ``run_NAME.py URL QUESTION JOBS``. It enqueues ``JOBS`` jobs with its own API, runs one worker
process with a hundred jobs at once, and its handler calls `Workload.begins` and `Workload.ends`. The last job prints
the figures as JSON and ends the process. Questions:

- ``noop``: jobs that do nothing, all enqueued before. Jobs/s from the start of the first job to the end of the last.
- ``waits``: the same with a handler that awaits 10 ms (or sleeps so long, where handlers are threads).
- ``latency``: a hundred jobs a second to an idle worker, from before the enqueueing to the handler's first line.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import count

CONCURRENCY = 100
RATE = 100
PAUSE = 0.01
WARM = 50
"""Jobs of the latency question that are not counted: connections are made, code is run for the first time."""


class Workload:
    """One question, from the command line."""

    def __init__(self) -> None:
        self.url, self.question, jobs = sys.argv[1:4]
        self.paced = self.question == "latency"
        self.jobs = int(jobs) + (WARM if self.paced else 0)
        self.pause = PAUSE if self.question == "waits" else 0.0
        self.filled = 0 if self.paced else self.jobs
        """How many jobs to enqueue before the worker starts."""
        self._sent = [0.0] * self.jobs
        self._waits = [0.0] * self.jobs
        self._first = 0.0
        self._ended = count(1)

    def begins(self, n: int) -> None:
        """The first line of job ``n``."""
        now = time.perf_counter()
        if self.paced:
            self._waits[n] = now - self._sent[n]
        elif not self._first:
            self._first = now

    def ends(self) -> None:
        """The last line of a job; that of the last job does not return."""
        if next(self._ended) == self.jobs:
            self._tell(time.perf_counter())

    async def run(self, n: int) -> None:
        """A whole job, for handlers that are coroutines."""
        self.begins(n)
        if self.pause:
            await asyncio.sleep(self.pause)
        self.ends()

    def run_blocking(self, n: int) -> None:
        """A whole job, for handlers that are plain functions."""
        self.begins(n)
        if self.pause:
            time.sleep(self.pause)
        self.ends()

    async def produce(self, enqueue: Callable[[int], Awaitable[object]], settle: float = 1.0) -> None:
        """Enqueue a hundred jobs a second, ``settle`` seconds from now, when the worker waits for them."""
        await asyncio.sleep(settle)
        begin = time.perf_counter()
        for n in range(self.jobs):
            await asyncio.sleep(max(0.0, begin + n / RATE - time.perf_counter()))
            self._sent[n] = time.perf_counter()
            await enqueue(n)

    def produce_blocking(self, enqueue: Callable[[int], object], settle: float = 1.0) -> None:
        """`produce`, for a thread."""
        time.sleep(settle)
        begin = time.perf_counter()
        for n in range(self.jobs):
            time.sleep(max(0.0, begin + n / RATE - time.perf_counter()))
            self._sent[n] = time.perf_counter()
            enqueue(n)

    def _tell(self, now: float) -> None:
        if self.paced:
            waits = sorted(wait * 1000 for wait in self._waits[WARM:])
            told = {"p50": statistics.median(waits), "p99": statistics.quantiles(waits, n=100)[98]}
        else:
            told = {"rate": self.jobs / (now - self._first)}
        print(json.dumps({**told, "cpu_us": time.process_time() / self.jobs * 1e6}), flush=True)
        os._exit(0)


async def together(*parts: Awaitable[object]) -> None:
    """Run until one of them ends, which is an error, or the last job ends the process."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()
