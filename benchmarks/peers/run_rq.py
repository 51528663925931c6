# /// script
# requires-python = ">=3.10"
# dependencies = ["rq==3.0.0", "hiredis==3.5.0"]
# ///
"""rq: the worker that does not fork, no results kept. One job at a time: a process of rq runs no more."""

from __future__ import annotations

import threading

import redis
from rq import Queue, SimpleWorker
from workload import Workload

work = Workload()
client = redis.Redis.from_url(work.url)
queue = Queue("bench", connection=client)


def job(n: int) -> None:
    """The workload's job."""
    work.run_blocking(n)


def send(n: int) -> None:
    """Enqueue one."""
    queue.enqueue("__main__.job", n, result_ttl=0)


for start in range(0, work.filled, 500):
    numbers = range(start, min(start + 500, work.filled))
    queue.enqueue_many([Queue.prepare_data("__main__.job", args=(n,), result_ttl=0) for n in numbers])
if work.paced:
    threading.Thread(target=work.produce_blocking, args=[send], daemon=True).start()
SimpleWorker([queue], connection=client).work(logging_level="ERROR")
