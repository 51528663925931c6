"""Recording runs in batches: one statement for jobs and attempts, bisected where one row is at fault."""

from __future__ import annotations

import random
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final, TypeAlias

import anyio
import asyncpg

from streamworker.postgres import FINAL, RunRecord, Stored
from streamworker.postgres.failures import is_outage, reason, sqlstate, translated
from streamworker.postgres.pool import Database
from streamworker.postgres.rows import created, headers_text, json_text, stored_id, text
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

Row: TypeAlias = tuple[Any, ...]

TRIES: Final = 5
"""How often a batch that met a deadlock or a conflict is tried before that counts as trouble."""
_AGAIN: Final = ("40P01", "40001")
_LOCKED: Final = ("55P03", "57014")
"""Lock not available, statement timeout: somebody holds one of the rows."""
_ROW_FAULTS: Final = ("22", "23", "54")
_MOST_INT: Final = 2**31 - 1

_ITEMS: Final = """unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::int[], $9::int[],
    $10::bigint[], $11::int[], $12::float8[], $13::float8[], $14::float8[], $15::text[], $16::text[], $17::text[],
    $18::bytea[], $19::text[], $20::float8[], $21::int[], $22::text[])
  as item (id, queue_name, kind, payload, level, status, attempts, max_attempts,
    hop, deliveries, run_at, started, finished, error, result, headers,
    document, epoch, created, attempt, outcome)"""

RECORD: Final = f"""
with items as materialized (select * from {_ITEMS}),
logged as (
  insert into streamworker.job_logs
      (job_id, hop, deliveries, attempt, worker_id, started_at, finished_at, outcome, error)
    select id, hop, deliveries, attempt, $1, to_timestamp(started), to_timestamp(finished), outcome, error from items
    on conflict do nothing
)
insert into streamworker.jobs as stored (id, queue_name, kind, payload, level, status, attempt_count, max_attempts, hop,
    deliveries, run_at, worker_id, created_at, started_at, finished_at, last_error, result, headers, document, epoch)
  select id, queue_name, kind, payload::jsonb, level, status, attempts, max_attempts, hop,
      deliveries, to_timestamp(run_at), $1, coalesce(to_timestamp(created), now()), to_timestamp(started),
      case when status in ('completed', 'dead') then to_timestamp(finished) end, error, result::jsonb, headers::jsonb,
      document, epoch
    from items
  on conflict (id) do update set
      status = excluded.status, kind = coalesce(nullif(stored.kind, ''), excluded.kind),
      attempt_count = excluded.attempt_count, hop = excluded.hop, deliveries = excluded.deliveries,
      run_at = coalesce(excluded.run_at, stored.run_at),
      worker_id = excluded.worker_id, started_at = coalesce(excluded.started_at, stored.started_at),
      finished_at = excluded.finished_at, last_error = excluded.last_error,
      result = coalesce(excluded.result, stored.result), epoch = excluded.epoch, updated_at = now()
    where (excluded.hop, excluded.deliveries) >= (stored.hop, stored.deliveries)
      and stored.status not in ('completed', 'cancelled')
      or (excluded.hop, excluded.deliveries) = (stored.hop, stored.deliveries)
      and stored.status = 'completed' and excluded.status = 'completed'
  returning id"""  # noqa: S608 - our own text

WHY: Final = "select id, status from streamworker.jobs where id = any($1::text[])"

RUNNING: Final = f"""
insert into streamworker.jobs as stored (id, queue_name, kind, payload, level, status, attempt_count, max_attempts, hop,
    deliveries, worker_id, created_at, started_at, headers, document, epoch)
  select id, queue_name, kind, payload::jsonb, level, status, attempts, max_attempts, hop,
      deliveries, $1, coalesce(to_timestamp(created), now()), to_timestamp(started), headers::jsonb, document, epoch
    from {_ITEMS}
  on conflict (id) do update set
      status = excluded.status, hop = excluded.hop, deliveries = excluded.deliveries, worker_id = excluded.worker_id,
      started_at = excluded.started_at, epoch = excluded.epoch, updated_at = now()
    where stored.status not in ('completed', 'cancelled')
      and ((excluded.hop, excluded.deliveries) > (stored.hop, stored.deliveries)
        or (excluded.hop, excluded.deliveries) = (stored.hop, stored.deliveries)
        and stored.status in ('queued', 'dispatching', 'dispatched'))
  returning id"""  # noqa: S608 - our own text


class Recording:
    """Records runs of one worker.

    Args:
        database: where.
        worker_id: whose.
    """

    def __init__(self, database: Database, worker_id: str) -> None:
        self._database = database
        self._worker_id = worker_id
        self._epochs: dict[bytes, str] = {}

    async def record(self, runs: Sequence[RunRecord]) -> list[Stored]:
        """See `Ledger.record`."""
        answers = [Stored.STORED] * len(runs)
        for batch in _rounds(runs):
            await self._store(RECORD, batch, answers)
        return answers

    async def running(self, runs: Sequence[RunRecord]) -> None:
        """See `Ledger.running`."""
        answers = [Stored.STORED] * len(runs)
        for batch in _rounds(runs):
            await self._store(RUNNING, batch, answers)

    async def _store(self, statement: str, batch: Sequence[_Item], answers: list[Stored]) -> None:
        try:
            missing = await self._told(statement, [self._row(run, bare) for _, run, bare in batch])
        except Exception as error:
            if is_outage(error):
                raise translated(error, "recording jobs") from error
            code = sqlstate(error)
            if not (code in _LOCKED or code[:2] in _ROW_FAULTS or isinstance(error, asyncpg.DataError | ValueError)):
                raise translated(error, "recording jobs") from error
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._store(statement, batch[:middle], answers)
                await self._store(statement, batch[middle:], answers)
                return
            index, run, bare = batch[0]
            if code in _LOCKED:
                answers[index] = Stored.BUSY
            elif bare < 2:
                note = f"not everything of this run could be stored ({sqlstate(error) or type(error).__name__})"
                log.warning("ledger_row_reduced", job_id=run.job_id, kind=run.kind, queue=run.queue, reason=note)
                await self._store(statement, [(index, run, bare + 1)], answers)
            else:
                log.error("ledger_row_refused", job_id=run.job_id, kind=run.kind, queue=run.queue, error=reason(error))
            return
        if missing:
            why = {row["id"]: row["status"] for row in await self._database.fetch(WHY, sorted(missing))}
            for index, run, _ in batch:
                status = why.get(stored_id(run.job_id))
                if status is not None:
                    answers[index] = Stored.ENDED if status in FINAL else Stored.SUPERSEDED

    async def _told(self, statement: str, rows: Sequence[Row]) -> set[str]:
        """Run the statement; returns the ids it left alone."""
        columns = list(zip(*rows, strict=True))
        for tries in range(TRIES):
            try:
                stored = await self._database.fetch(statement, self._worker_id, *columns)
            except asyncpg.PostgresError as error:
                if error.sqlstate not in _AGAIN or tries == TRIES - 1:
                    raise
                await anyio.sleep(random.uniform(0, 0.05) * (tries + 1))  # noqa: S311 - spreads load
            else:
                break
        if len(stored) == len(rows):
            return set()
        return {row[0] for row in rows} - {row["id"] for row in stored}

    def _row(self, run: RunRecord, bare: int) -> Row:
        """The values of one run; ``bare`` leaves out what may offend: 1 payload, headers, result; 2 all that can be."""
        payload = json_text(run.payload) if not bare else None
        headers = headers_text(run.headers) if run.headers and not bare else None
        result = json_text(run.result) if run.result is not None and not bare else None
        whole = payload is not None and (headers is not None or not run.headers)
        error = run.error
        if error is not None or (run.result is not None and result is None):
            error = _error(run, result) if bare < 2 else None
        epoch = self._epochs.get(run.epoch)
        if epoch is None:
            epoch = self._epochs[run.epoch] = text(run.epoch.decode(errors="backslashreplace"))
        return (
            stored_id(run.job_id), run.queue, text(run.kind) if bare < 2 else "", payload, run.level, run.status,
            min(run.attempts, _MOST_INT), None if run.max_attempts is None else min(run.max_attempts, _MOST_INT),
            run.hop, min(run.deliveries, _MOST_INT), run.run_at if bare < 2 else None, run.started, run.finished,
            error, result, headers, None if whole else run.body, epoch, created(run.body) if bare < 2 else None,
            min(run.attempt, _MOST_INT), run.outcome,
        )  # fmt: skip


_Item: TypeAlias = tuple[int, RunRecord, int]
"""(place in the answer, the run, how much of it is left out)"""


def _rounds(runs: Sequence[RunRecord]) -> list[list[_Item]]:
    """The runs in order of their ids, so that batches never deadlock; a job that comes twice goes another round."""
    rounds: list[list[_Item]] = []
    keyed = sorted(((run.job_id, index, run) for index, run in enumerate(runs)), key=itemgetter(0, 1))
    last, turn = None, 0
    for job_id, index, run in keyed:
        turn = turn + 1 if job_id == last else 0
        last = job_id
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append((index, run, 0))
    return rounds


def _error(run: RunRecord, result: str | None) -> str | None:
    """The run's error as it can be stored, with a note if its result is not."""
    error = None if run.error is None else text(run.error)
    if run.result is None or result is not None:
        return error
    note = "what the handler returned could not be stored as jsonb"
    return note if error is None else f"{error} ({note})"
