"""Forgetting what is older than its queue's retention, in small batches; dead jobs are kept."""

from __future__ import annotations

import random
from typing import Final

from streamworker.postgres.failures import understood
from streamworker.postgres.pool import Database

BATCH: Final = 500
"""Most jobs one statement forgets."""
INTERVAL: Final = 60.0
"""Seconds between two looks of one worker, when there was nothing left to forget."""
BREATH: Final = 0.2
"""Seconds between two batches."""

# One worker at a time, whoever comes first; the others find nothing to do.
TIDY: Final = """
with turn as materialized (select pg_try_advisory_xact_lock(hashtext('streamworker.prune')) as ours),
old as materialized (
  select job.id, queue.name as queue_name from streamworker.job_queues as queue
    cross join lateral (
      select id from streamworker.jobs
        where queue_name = queue.name and status in ('completed', 'cancelled')
          and finished_at < now() - queue.retention
        order by finished_at limit $1
    ) as job
    where (select ours from turn)
    limit $1
), gone as (
  delete from streamworker.jobs as job using old
    where job.id = old.id and job.queue_name = old.queue_name and job.status in ('completed', 'cancelled')
    returning job.id, job.queue_name
), logs as (
  delete from streamworker.job_logs as log using gone
    where log.job_id = gone.id and log.queue_name in (gone.queue_name, '')
)
select count(*) from gone"""

PRUNE: Final = """
with old as materialized (
  select job.id, queue.name as queue_name from streamworker.job_queues as queue
    cross join lateral (
      select id from streamworker.jobs
        where queue_name = queue.name and status in ('completed', 'cancelled')
          and finished_at < now() - coalesce(make_interval(secs => $3::double precision), queue.retention)
        order by finished_at limit $1
    ) as job
    where $2::text is null or queue.name = $2::text
    limit $1
), gone as (
  delete from streamworker.jobs as job using old
    where job.id = old.id and job.queue_name = old.queue_name and job.status in ('completed', 'cancelled')
    returning job.id, job.queue_name
), logs as (
  delete from streamworker.job_logs as log using gone
    where log.job_id = gone.id and log.queue_name in (gone.queue_name, '')
)
select count(*) from gone"""


PRUNABLE: Final = """
select coalesce(sum(job.count), 0)::bigint from streamworker.job_queues as queue
  cross join lateral (
    select count(*) from streamworker.jobs
      where queue_name = queue.name and status in ('completed', 'cancelled')
        and finished_at < now() - coalesce(make_interval(secs => $2::double precision), queue.retention)
  ) as job
  where $1::text is null or queue.name = $1::text"""


class Retention:
    """Prunes one database.

    Args:
        database: which.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def tick(self) -> float:
        """Forget one batch; returns the seconds until the next."""
        with understood("forgetting old jobs"):
            rows = await self._database.fetch(TIDY, BATCH)
        if rows[0][0] >= BATCH:
            return BREATH
        return INTERVAL * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load
