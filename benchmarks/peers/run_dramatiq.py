# /// script
# requires-python = ">=3.10"
# dependencies = ["dramatiq[redis]==2.2.1", "hiredis==3.5.0"]
# ///
"""dramatiq: plain functions in a hundred threads, which is how it runs a hundred at once in a process."""

from __future__ import annotations

import threading

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from workload import CONCURRENCY, Workload

work = Workload()
broker = RedisBroker(url=work.url)
dramatiq.set_broker(broker)


@dramatiq.actor(actor_name="job", queue_name="bench")
def job(n: int) -> None:
    """The workload's job."""
    work.run_blocking(n)


for number in range(work.filled):
    job.send(number)
if work.paced:
    threading.Thread(target=work.produce_blocking, args=[job.send], daemon=True).start()
worker = dramatiq.Worker(broker, worker_threads=CONCURRENCY)
worker.start()
threading.Event().wait()
