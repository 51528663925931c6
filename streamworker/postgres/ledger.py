"""The ledger of one worker, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

from streamworker.postgres import JobKey, Known, RunRecord, Stored
from streamworker.postgres.failures import is_one_rows_fault, reason, translated, understood
from streamworker.postgres.pool import AnyPool, Database
from streamworker.postgres.recording import Recording
from streamworker.postgres.retention import Retention
from streamworker.postgres.rows import SEPARATOR, separable, stored_id, within_python
from streamworker.postgres.transaction import RunTransaction, complete
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


class PostgresLedger:
    """`Ledger` on PostgreSQL.

    Args:
        database: the ledger's own connections.
        pool: the pool of handlers' transactions.
        worker_id: whose runs these are.
    """

    def __init__(self, database: Database, pool: AnyPool, worker_id: str) -> None:
        self._database = database
        self._line = database.line()
        self._pool = pool
        self._worker_id = worker_id
        self._recording = Recording(database, worker_id)
        self._retention = Retention(database)

    async def open(self, queues: Sequence[str]) -> None:
        """Make the queues known.

        Raises:
            Unreachable: no server answers.
            ConfigurationError: this user may not write the ledger.
        """
        with understood("writing to the ledger"):
            await self._database.fetch(QUEUES, sorted(queues))

    async def lookup(self, jobs: Collection[JobKey]) -> dict[JobKey, Known]:
        """See `Ledger.lookup`."""
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
            rows = await self._line.fetch(LOOKUP, joined)
        else:
            rows = await self._line.fetch(LOOKUP_ARRAY, list(names))
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
        """See `Ledger.record`."""
        return await self._recording.record(runs)

    async def running(self, runs: Sequence[RunRecord]) -> None:
        """See `Ledger.running`."""
        await self._recording.running(runs)

    def transaction(self, run: RunRecord, deadline: float | None) -> RunTransaction:
        """See `Ledger.transaction`."""
        return RunTransaction(self._pool, self._database, run, self._worker_id, deadline)

    async def complete(self, run: RunRecord, connection: Any) -> None:
        """See `Ledger.complete`."""
        await complete(connection, run, self._worker_id)

    def abandon(self) -> None:
        """See `Ledger.abandon`."""
        self._database.abandon()

    async def tick(self) -> float:
        """See `Ledger.tick`."""
        return await self._retention.tick()
