# /// script
# requires-python = ">=3.9"
# dependencies = ["celery[redis,gevent]==5.7.0", "hiredis==3.5.0"]
# ///
"""celery: a hundred greenlets, no results, no gossip, prefetching as its guide for short tasks says.

It acknowledges early, as it does by default: a killed worker loses what it had taken."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import threading  # noqa: E402 - after patching

from celery import Celery  # noqa: E402
from workload import CONCURRENCY, Workload  # noqa: E402

work = Workload()
app = Celery("bench", broker=work.url)
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=10,
    broker_connection_retry_on_startup=True,
    worker_redirect_stdouts=False,  # or the figures go to its log
)


@app.task(name="job")
def job(n: int) -> None:
    """The workload's job; its sleep is gevent's."""
    work.run_blocking(n)


for number in range(work.filled):
    job.delay(number)
if work.paced:
    threading.Thread(target=work.produce_blocking, args=[job.delay, 4.0], daemon=True).start()
quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR"]
app.worker_main(["--quiet", "worker", "--pool", "gevent", "--concurrency", str(CONCURRENCY), *quiet])
