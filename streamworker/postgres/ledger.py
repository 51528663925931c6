"""`Ledger` on PostgreSQL: look claimed jobs up, record runs, delete jobs past their retention."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from streamworker.postgres import JobKey, KeptLog, Known, RunRecord, StepHost, Stored
from streamworker.postgres.adapters import PoolTransaction, transaction_of
from streamworker.postgres.encoding import SEPARATOR, separable, stored_id, within_python
from streamworker.postgres.flow_graph import NodeParents
from streamworker.postgres.ledger_history import LedgerHistory
from streamworker.postgres.payloads import PostgresStore, needed
from streamworker.postgres.pool import AnyPool, Database
from streamworker.postgres.recording import Recording
from streamworker.postgres.sqlstate import is_one_rows_fault, reason, translated, understood
from streamworker.postgres.steps import JobSteps
from streamworker.postgres.transaction import BlockingRunTransaction, RunTransaction, complete
from streamworker.postgres.waits import park
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

LOOKUP_ARRAY: Final = f"""
select id, queue_name, status, hop, deliveries, attempt_count,
  extract(epoch from {within_python("run_at")})::float8 as run_at, last_error
from streamworker.jobs
where id = any($1::text[])"""  # noqa: S608 - our own text
LOOKUP: Final = LOOKUP_ARRAY.replace("$1::text[]", "string_to_array($1::text, e'\\x1f')")

QUEUES: Final = """
insert into streamworker.job_queues (name) select unnest($1::text[]) on conflict (name) do nothing"""


KEEP_LOGS: Final = """
update streamworker.job_logs as log set lines = item.lines::json
from unnest($1::text[], $2::text[], $3::bigint[], $4::int[], $5::text[])
  as item (job_id, queue_name, hop, deliveries, lines)
where log.job_id = item.job_id and log.queue_name = item.queue_name and log.hop = item.hop
  and log.deliveries = item.deliveries"""


YEAR: Final = 365 * 86_400.0


class PostgresLedger:
    """`Ledger` on PostgreSQL.

    Args:
        database: the ledger's own connections.
        pool: the pool of handlers' transactions.
        worker_id: the worker whose runs are recorded.
        audit: seconds for which actions of operators are kept.
    """

    def __init__(self, database: Database, pool: AnyPool, worker_id: str, *, audit: float = YEAR) -> None:
        self._database = database
        self._kept = database.kept()
        self._pool = pool
        self._worker_id = worker_id
        self._recording = Recording(database, worker_id)
        self._retention = Retention(database, audit)
        self.history: Final = LedgerHistory(database)

    async def open(self, queues: Sequence[str]) -> None:
        """Insert a row for each queue.

        Raises:
            Unreachable: no server answers.
            ConfigurationError: this user may not write the ledger.
        """
        with understood("writing to the ledger"):
            await self._database.fetch(QUEUES, sorted(queues))

    async def lookup(self, jobs: Collection[JobKey]) -> dict[JobKey, Known]:
        try:
            return await self._looked_up(jobs)
        except Exception as error:
            if not is_one_rows_fault(error):
                raise translated(error, "looking jobs up") from error
            keys = list(jobs)
            if len(keys) == 1:
                log.error("ledger_row_unreadable", queue=keys[0][0], job_id=keys[0][1], error=reason(error))
                return {}
        middle = len(keys) // 2
        return await self.lookup(keys[:middle]) | await self.lookup(keys[middle:])

    async def _looked_up(self, jobs: Collection[JobKey]) -> dict[JobKey, Known]:
        job_ids = [job_id for _, job_id in jobs]
        joined = SEPARATOR.join(job_ids)
        plain = separable(joined, len(job_ids))
        names = {} if plain else {stored_id(job_id): job_id for job_id in job_ids}
        if plain:
            rows = await self._kept.fetch(LOOKUP, joined)
        else:
            rows = await self._kept.fetch(LOOKUP_ARRAY, list(names))
        return {
            (row["queue_name"], names.get(row["id"], row["id"])): Known(
                row["status"],
                row["hop"],
                row["deliveries"],
                row["attempt_count"],
                row["run_at"],
                row["last_error"] or "",
            )
            for row in rows
        }

    async def record(self, runs: Sequence[RunRecord]) -> list[Stored]:
        return await self._recording.record(runs)

    async def park(self, runs: Sequence[RunRecord]) -> list[Stored]:
        return await park(self._database, runs, self._worker_id)

    def payloads(self, namespace: str) -> PostgresStore:
        """`PayloadStore` of the jobs of a namespace."""
        return PostgresStore(self._database.fetch, namespace)

    async def payloads_in_use(self, jobs: Mapping[str, int]) -> Collection[str]:
        return await needed(self._database.fetch, jobs)

    async def keep_logs(self, logs: Sequence[KeptLog]) -> None:
        columns = ([getattr(each, name) for each in logs] for name in ("queue", "hop", "deliveries", "lines"))
        with understood("keeping the logs of jobs"):
            await self._database.fetch(KEEP_LOGS, [stored_id(each.job_id) for each in logs], *columns)

    async def running(self, runs: Sequence[RunRecord]) -> None:
        await self._recording.running(runs)

    def transaction(
        self, run: RunRecord, deadline: float | None, source: Any = None
    ) -> RunTransaction | BlockingRunTransaction:
        made = PoolTransaction(self._pool) if source is None else transaction_of(source)
        if made.blocking:
            return BlockingRunTransaction(made, self._database, run, self._worker_id, deadline)
        return RunTransaction(made, self._database, run, self._worker_id, deadline)

    def steps(self, run: RunRecord, host: StepHost) -> JobSteps:
        return JobSteps(self._database, self._pool, run, self._worker_id, host)

    async def complete(self, run: RunRecord, connection: Any, *, blocking: bool = False) -> None:
        await complete(connection, run, self._worker_id, blocking=blocking)

    def parents(self, run: RunRecord) -> NodeParents:
        return NodeParents(self._database, run)

    def abandon(self) -> None:
        self._database.abandon()

    async def tick(self) -> float:
        seconds = await self._retention.tick()
        await self.history.prune()
        return seconds


BATCH: Final = 500
"""Most jobs that one statement deletes."""
INTERVAL: Final = 60.0
"""Seconds between two calls of one worker, when no job was left to delete."""
BATCH_PAUSE: Final = 0.2
"""Seconds between two batches."""

_FORGET: Final = """), gone as (
  delete from streamworker.jobs as job using old
    where job.id = old.id and job.queue_name = old.queue_name and job.status in ('completed', 'cancelled', 'expired')
    returning job.id, job.queue_name
), steps as (
  delete from streamworker.job_steps as step using gone
    where step.job_id = gone.id and step.queue_name = gone.queue_name
), signals as (
  delete from streamworker.job_signals as signal using gone
    where signal.job_id = gone.id and signal.queue_name = gone.queue_name
), logs as (
  delete from streamworker.job_logs as log using gone
    where log.job_id = gone.id and log.queue_name in (gone.queue_name, '')
)
select count(*) from gone"""
"""The end of a statement that prunes: it deletes the ``old`` jobs, and all that is kept with them."""

# One worker at a time, the first that takes the advisory lock; for the others the statement deletes nothing.
PRUNE_EXPIRED: Final = f"""
with turn as materialized (select pg_try_advisory_xact_lock(hashtext('streamworker.prune')) as ours),
old as materialized (
  select job.id, queue.name as queue_name from streamworker.job_queues as queue
    cross join lateral (
      select id from streamworker.jobs
        where queue_name = queue.name and status in ('completed', 'cancelled', 'expired') and node is null
          and finished_at < now() - queue.retention
        order by finished_at limit $1
    ) as job
    where (select ours from turn)
    limit $1
{_FORGET}"""  # noqa: S608 - a text of this module

PRUNE: Final = f"""
with old as materialized (
  select job.id, queue.name as queue_name from streamworker.job_queues as queue
    cross join lateral (
      select id from streamworker.jobs
        where queue_name = queue.name and status in ('completed', 'cancelled', 'expired') and node is null
          and finished_at < now() - coalesce(make_interval(secs => $3::double precision), queue.retention)
        order by finished_at limit $1
    ) as job
    where $2::text is null or queue.name = $2::text
    limit $1
{_FORGET}"""  # noqa: S608 - a text of this module


PRUNABLE: Final = """
select coalesce(sum(job.count), 0)::bigint from streamworker.job_queues as queue
  cross join lateral (
    select count(*) from streamworker.jobs
      where queue_name = queue.name and status in ('completed', 'cancelled', 'expired') and node is null
        and finished_at < now() - coalesce(make_interval(secs => $2::double precision), queue.retention)
  ) as job
  where $1::text is null or queue.name = $1::text"""


# A flow is forgotten as one: not before its jobs might be, and not while one of them is dead.
PRUNE_FLOWS: Final = """
with turn as materialized (select pg_try_advisory_xact_lock(hashtext('streamworker.prune')) as ours),
old as materialized (
  select flow.id from streamworker.flows as flow
    where (select ours from turn) and flow.finished_at < now() - (select max(retention) from streamworker.job_queues)
      and not exists (
        select from streamworker.flow_nodes as node join streamworker.jobs as job
          on job.id = node.job_id and job.queue_name = node.queue_name
          where node.flow_id = flow.id and node.outcome in ('failed', 'held') and job.status = 'dead'
      )
    order by flow.finished_at limit $1
)
select count(*) filter (where streamworker.delete_flow(id)) from old"""
FLOWS_BATCH: Final = 20


AUDIT_IS_THERE: Final = "select to_regclass('streamworker.audit') is not null as there"
PRUNE_AUDIT: Final = """
with turn as materialized (select pg_try_advisory_xact_lock(hashtext('streamworker.prune')) as ours),
old as materialized (
  select id from streamworker.audit
    where (select ours from turn) and at < now() - make_interval(secs => $1::double precision)
    order by at, id limit $2
), gone as (
  delete from streamworker.audit as audit using old where audit.id = old.id returning audit.id
)
select count(*) from gone"""


class Retention:
    """Deletes completed, cancelled and expired jobs, and flows, that are past the retention of their queue; and old
    actions of operators.

    Args:
        database: of the ledger.
        audit: seconds for which actions of operators are kept.
    """

    def __init__(self, database: Database, audit: float) -> None:
        self._database, self._audit = database, audit
        self._audit_is_there = False

    async def tick(self) -> float:
        """Delete one batch; returns the seconds until the next."""
        with understood("forgetting old jobs"):
            rows = await self._database.fetch(PRUNE_EXPIRED, BATCH)
            flows = await self._database.fetch(PRUNE_FLOWS, FLOWS_BATCH)
            audit = await self._prune_audit()
        if rows[0][0] >= BATCH or flows[0][0] >= FLOWS_BATCH or audit >= BATCH:
            return BATCH_PAUSE
        return INTERVAL * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load

    async def _prune_audit(self) -> int:
        if not self._audit_is_there:
            self._audit_is_there = bool((await self._database.fetch(AUDIT_IS_THERE))[0]["there"])
        return int((await self._database.fetch(PRUNE_AUDIT, self._audit, BATCH))[0][0]) if self._audit_is_there else 0
