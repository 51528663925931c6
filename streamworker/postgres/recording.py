"""Recording of runs in batches: one statement for jobs and attempts, bisected if one row is at fault."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import anyio
import asyncpg

from streamworker.codec import FIRST_MOMENT, LAST_MOMENT
from streamworker.postgres import FINAL, LANES, RunRecord, Stored
from streamworker.postgres.encoding import ON_CONFLICT, PACK, PACK_NEW, headers_text, json_text, packed, stored_id, text
from streamworker.postgres.pool import Database
from streamworker.postgres.sqlstate import is_one_rows_fault, reason, sqlstate, translated, understood
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

Row: TypeAlias = tuple[Any, ...]

TRIES: Final = 5
"""How often a batch is tried that meets a deadlock (40P01) or a serialization failure (40001)."""
_AGAIN: Final = ("40P01", "40001")
_LOCKED: Final = ("55P03", "57014")
"""Lock not available, statement timeout: another transaction has locked one of the rows."""
WORTH_IT: Final = 40
"""Least jobs without a row, in a batch that has others too, that get a statement of their own."""
_MOST_INT: Final = 2**31 - 1

_ITEMS: Final = """unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::int[], $9::int[],
    $10::bigint[], $11::int[], $12::float8[], $13::float8[], $14::float8[], $15::text[], $16::text[], $17::text[],
    $18::bytea[], $19::text[], $20::float8[], $21::int[], $22::text[], $23::float8[])
  as item (id, queue_name, kind, payload, level, status, attempts, max_attempts,
    hop, deliveries, run_at, started, finished, error, result, headers,
    document, epoch, created, attempt, outcome, expires)"""

RECORD: Final = f"""
with items as materialized (select * from {_ITEMS}),
logged as (
  insert into streamworker.job_logs
      (job_id, queue_name, hop, deliveries, attempt, worker_id, started_at, finished_at, outcome, error)
    select id, queue_name, hop, deliveries, attempt, $1, to_timestamp(started), to_timestamp(finished), outcome, error
      from items
    on conflict do nothing
)
insert into streamworker.jobs as stored (id, queue_name, kind, payload, level, status, attempt_count, max_attempts, hop,
    deliveries, run_at, worker_id, created_at, started_at, finished_at, last_error, result, headers, document, epoch,
    expires_at)
  select id, queue_name, kind, payload::jsonb, level, status, attempts, max_attempts, hop,
      deliveries, to_timestamp(run_at), $1, coalesce(to_timestamp(created), now()), to_timestamp(started),
      case when status in ('completed', 'cancelled', 'expired', 'dead') then to_timestamp(finished) end, error,
      result::jsonb, headers::jsonb, document, epoch, to_timestamp(expires)
    from items
{ON_CONFLICT}"""  # noqa: S608 - our own text

WHY: Final = "select id, queue_name, status from streamworker.jobs where id = any($1::text[])"

TABLES: Final = "lock table streamworker.jobs, streamworker.job_logs in row exclusive mode"
"""Waits for a lock on a whole table, such as a migration's, as long as the session's lock_timeout."""
LOCKED: Final = """
with free as materialized (
  select id, queue_name from streamworker.jobs where id = any($1::text[]) for update skip locked
)
select id, queue_name from streamworker.jobs
where id = any($1::text[]) and (id, queue_name) not in (select id, queue_name from free)
"""

RUNNING: Final = f"""
insert into streamworker.jobs as stored (id, queue_name, kind, payload, level, status, attempt_count, max_attempts, hop,
    deliveries, worker_id, created_at, started_at, headers, document, epoch, expires_at)
  select id, queue_name, kind, payload::jsonb, level, status, attempts, max_attempts, hop,
      deliveries, $1, coalesce(to_timestamp(created), now()), to_timestamp(started), headers::jsonb, document, epoch,
      to_timestamp(expires)
    from {_ITEMS}
  on conflict (queue_name, id) do update set
      status = excluded.status, hop = excluded.hop, deliveries = excluded.deliveries, worker_id = excluded.worker_id,
      started_at = excluded.started_at, epoch = excluded.epoch, updated_at = now()
    where stored.status not in ('completed', 'cancelled', 'expired')
      and ((excluded.hop, excluded.deliveries) > (stored.hop, stored.deliveries)
        or (excluded.hop, excluded.deliveries) = (stored.hop, stored.deliveries)
        and stored.status in ('queued', 'dispatching', 'dispatched'))
  returning id"""  # noqa: S608 - our own text


def _at_fault(error: Exception) -> bool:
    """Whether one row is at fault, which bisection finds, and not the whole batch."""
    return sqlstate(error) in _LOCKED or is_one_rows_fault(error)


class Recording:
    """Records the runs of one worker.

    Args:
        database: of the ledger.
        worker_id: the worker.
    """

    def __init__(self, database: Database, worker_id: str) -> None:
        self._database = database
        self._kept = database.kept(LANES)
        self._worker_id = worker_id
        self._epochs: dict[bytes, str] = {}

    async def record(self, runs: Sequence[RunRecord]) -> list[Stored]:
        answers = [Stored.STORED] * len(runs)
        for batch in _rounds(runs):
            for part, new in _parted(batch):
                if not await self._pack(part, answers, new=new):
                    await self._store(RECORD, part, answers)
        return answers

    async def _pack(self, batch: Sequence[_Item], answers: list[Stored], *, new: bool) -> bool:
        """Record a batch with `PACK`; False if it needs `RECORD`."""
        values = packed([run for _, run, _ in batch], self._epochs)
        if values is None:
            return False
        try:
            if new and await self._all_new(values, len(batch)):
                return True
            stored = (await self._told(PACK, values))[0]["ids"]
        except Exception as error:
            if _at_fault(error):
                return False
            raise translated(error, "recording jobs") from error
        if stored is not None:
            await self._explain(batch, set(stored), answers)
        return True

    async def _all_new(self, values: Sequence[Any], count: int) -> bool:
        """Insert jobs that should have no row; False if one has a row, and nothing was recorded."""
        try:
            await self._told(PACK_NEW, values)
        except asyncpg.UniqueViolationError:
            log.debug("jobs_not_new", jobs=count)  # another worker was faster, or an earlier try of ours succeeded
            return False
        return True

    async def running(self, runs: Sequence[RunRecord]) -> None:
        answers = [Stored.STORED] * len(runs)
        for batch in _rounds(runs):
            await self._store(RUNNING, batch, answers)

    async def _unlocked(self, batch: Sequence[_Item], answers: list[Stored]) -> list[_Item]:
        """The rows of a batch that are not locked now; the others are answered BUSY.

        Raises:
            StreamworkerError: a table is locked, not a row: nothing can be recorded.
        """
        with understood("recording jobs"):
            async with self._database.session(alone=False) as connection:
                await connection.execute(TABLES)
                ids = sorted({stored_id(run.job_id) for _, run, _ in batch})
                locked = {(row["queue_name"], row["id"]) for row in await connection.fetch(LOCKED, ids)}
        free: list[_Item] = []
        for item in batch:
            index, run, _ = item
            if (run.queue, stored_id(run.job_id)) in locked:
                answers[index] = Stored.BUSY
            else:
                free.append(item)
        return free

    async def _store(self, statement: str, batch: Sequence[_Item], answers: list[Stored]) -> None:
        try:
            rows = [self._row(run, bare) for _, run, bare in batch]
            stored = await self._told(statement, list(zip(*rows, strict=True)))
        except Exception as error:
            if not _at_fault(error):
                raise translated(error, "recording jobs") from error
            if sqlstate(error) in _LOCKED:
                free = await self._unlocked(batch, answers)
                if len(free) < len(batch):
                    if free:
                        await self._store(statement, free, answers)
                    return
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._store(statement, batch[:middle], answers)
                await self._store(statement, batch[middle:], answers)
            else:
                await self._store_reduced(statement, batch[0], error, answers)
            return
        if len(stored) < len(batch):
            await self._explain(batch, {row["id"] for row in stored}, answers)

    async def _store_reduced(self, statement: str, item: _Item, error: Exception, answers: list[Stored]) -> None:
        """Store one row without the values at fault, or answer BUSY if it is locked."""
        index, run, bare = item
        if sqlstate(error) in _LOCKED:
            answers[index] = Stored.BUSY
        elif bare < 2:
            note = f"not everything of this run could be stored ({sqlstate(error) or type(error).__name__})"
            log.warning("ledger_row_reduced", job_id=run.job_id, kind=run.kind, queue=run.queue, reason=note)
            await self._store(statement, [(index, run, bare + 1)], answers)
        else:
            log.error("ledger_row_refused", job_id=run.job_id, kind=run.kind, queue=run.queue, error=reason(error))

    async def _explain(self, batch: Sequence[_Item], stored: set[str], answers: list[Stored]) -> None:
        """Answer for the rows that the statement did not change."""
        names = {(stored_id(run.job_id), run.queue): index for index, run, _ in batch}
        missing = {name: index for name, index in names.items() if name[0] not in stored}
        with understood("recording jobs"):
            for row in await self._kept.fetch(WHY, sorted({job_id for job_id, _ in missing})):
                index = missing.get((row["id"], row["queue_name"]))
                if index is None:  # another queue's job of that name
                    continue
                answers[index] = Stored.ENDED if row["status"] in FINAL else Stored.SUPERSEDED

    async def _told(self, statement: str, values: Sequence[Any]) -> list[asyncpg.Record]:
        """Execute the statement; again after a deadlock or a serialization failure."""
        for _ in range(TRIES - 1):
            try:
                return await self._kept.fetch(statement, self._worker_id, *values)
            except asyncpg.PostgresError as error:
                if error.sqlstate not in _AGAIN:
                    raise
                await anyio.sleep(random.uniform(0, 0.1))  # noqa: S311 - spreads load
        return await self._kept.fetch(statement, self._worker_id, *values)

    def _row(self, run: RunRecord, bare: int) -> Row:
        """The values of one run; ``bare`` leaves some out: 1 payload, headers, result; 2 all that may be null."""
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
            error, result, headers, None if whole else run.body, epoch, run.created if bare < 2 else None,
            min(run.attempt, _MOST_INT), run.outcome, moment(run.expires) if bare < 2 else None,
        )  # fmt: skip


def moment(seconds: float | None) -> float | None:
    """Epoch seconds that to_timestamp() takes, or None."""
    return None if seconds is None else min(max(seconds, FIRST_MOMENT), LAST_MOMENT)


_Item: TypeAlias = tuple[int, RunRecord, int]
"""(index in the answer, the run, how much of it is left out: see `_row`)"""


def _rounds(runs: Sequence[RunRecord]) -> list[list[_Item]]:
    """The runs in order of their ids, so that batches never deadlock; an id's second run is in a second round."""
    names = [run.job_id for run in runs]
    order = sorted(range(len(runs)), key=names.__getitem__)
    if len(set(names)) == len(names):
        return [[(index, runs[index], 0) for index in order]]
    rounds: list[list[_Item]] = []
    turns: dict[str, int] = {}
    for index in order:
        turn = turns.get(names[index], 0)
        turns[names[index]] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append((index, runs[index], 0))
    return rounds


def _parted(batch: list[_Item]) -> list[tuple[list[_Item], bool]]:
    """Parts of a batch for a statement each, and whether their jobs have no row yet."""
    new = [item for item in batch if item[1].new]
    if len(new) == len(batch):
        return [(batch, True)]
    if len(new) < WORTH_IT:
        return [(batch, False)]
    return [(new, True), ([item for item in batch if not item[1].new], False)]


def _error(run: RunRecord, result: str | None) -> str | None:
    """The run's error as text for PostgreSQL, with a note if its result cannot be stored."""
    error = None if run.error is None else text(run.error)
    if run.result is None or result is not None:
        return error
    note = "what the handler returned could not be stored as jsonb"
    return note if error is None else f"{error} ({note})"
