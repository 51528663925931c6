"""`Archive` on PostgreSQL: operators list, show, cancel, retry and prune jobs of the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, overload

import msgspec

from streamworker import codec
from streamworker.encryption import FIELD
from streamworker.errors import ConfigurationError, InvalidJob, UsageError
from streamworker.job import Enqueued, Job, KeyUse
from streamworker.postgres import Attempt, AuditRow, JobRecord, KeptLog, StepRow, Wanted
from streamworker.postgres.encoding import stored_id, within_python
from streamworker.postgres.enqueue import NOW, find_waiting, fits_jsonb
from streamworker.postgres.flow_graph import PostgresFlows
from streamworker.postgres.ledger import BATCH, PRUNABLE, PRUNE
from streamworker.postgres.ledger_history import LedgerHistory
from streamworker.postgres.ledger_schedules import LedgerSchedules
from streamworker.postgres.payloads import PostgresStore
from streamworker.postgres.pool import Database, open_database
from streamworker.postgres.sqlstate import understood
from streamworker.postgres.waits import send_signal

PAGE: Final = 500
_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_TIMES: Final = ("created_at", "run_at", "expires_at", "started_at", "finished_at")
_COLUMNS: Final = f"""
job.id, job.queue_name, job.kind, job.level, job.status, job.attempt_count, job.max_attempts, job.hop, job.deliveries,
job.worker_id, job.last_error, job.waits_for,
{", ".join(f"{within_python(f'job.{name}')} as {name}" for name in _TIMES)}"""

FIND: Final = f"""
select {_COLUMNS}, result::text, payload::text, headers::text, document
from streamworker.jobs as job where id = $1 and ($2::text is null or queue_name = $2)
order by queue_name limit 20"""  # noqa: S608 - our own text

ATTEMPTS: Final = f"""
select hop, deliveries, attempt, worker_id, {within_python("started_at")} as started_at,
  {within_python("finished_at")} as finished_at, outcome, error
from streamworker.job_logs where job_id = $1 and queue_name in ($2, '') order by hop, deliveries"""  # noqa: S608

LOGS: Final = """
select job_id, queue_name as queue, hop, deliveries, lines::text, attempt
from streamworker.job_logs where job_id = $1 and queue_name in ($2, '') and lines is not null
order by hop, deliveries"""

STEPS: Final = f"""
select step.position, step.kind, step.name,
  case when step.kind = 'sleep' then case when step.until <= clock_timestamp() then 'done' else 'waiting' end
    when step.kind <> 'wait' then 'done'
    when signal.timed_out then 'timed out' when signal.name is not null then 'done' else 'waiting' end as state,
  case when step.kind = 'wait' then signal.data::text else step.value::text end as value, step.worker_id,
  {within_python("step.started_at")} as started_at,
  {within_python("coalesce(signal.sent_at, step.recorded_at)")} as recorded_at,
  {within_python("step.until")} as until
from streamworker.job_steps as step left join streamworker.job_signals as signal
  on step.kind = 'wait' and signal.job_id = step.job_id and signal.queue_name = step.queue_name
    and signal.name = step.name
where step.job_id = $1 and step.queue_name = $2 order by step.position"""  # noqa: S608 - our own text

# A job that waits in Redis is claimed once more and acknowledged unrun: workers look every job up before they run it.
CANCEL: Final = """
update streamworker.jobs
set status = 'cancelled', finished_at = now(), updated_at = now(), waits_for = null
where id = $1 and queue_name = $2
  and status in ('blocked', 'queued', 'dispatching', 'dispatched', 'retrying', 'waiting')
returning id"""

_CHANGED: Final = """
with changed as (
  update streamworker.jobs
  set payload = coalesce($3::text::jsonb, payload), document = {document}, level = $4,
    run_at = case when $5::float8 is null then run_at when $5 = 0 then null else to_timestamp($5) end,
    queue_name = coalesce($6::text, queue_name), updated_at = now()
  where id = $1 and queue_name = $2 and {condition}
  returning id
), stored as (
  delete from streamworker.payloads where exists (select from changed) and id = (
    select payload->'streamworker_stored'->>'id' from streamworker.jobs
    where id = $1 and queue_name = $2 and $3::text is not null
      and payload->'streamworker_stored'->'id' is distinct from $3::text::jsonb->'streamworker_stored'->'id'
  )
), logs as (
  update streamworker.job_logs set queue_name = $6
  where job_id = $1 and queue_name = $2 and $6::text is not null and exists (select from changed)
), steps as (
  update streamworker.job_steps set queue_name = $6
  where job_id = $1 and queue_name = $2 and $6::text is not null and exists (select from changed)
)
select id from changed"""
CHANGE: Final = _CHANGED.replace("{document}", "case when $3::text is null then document end").replace(
    "{condition}", "status in ('queued', 'dispatching', 'dispatched', 'retrying')"
)
# The row is waited for, and judged anew when a relay or another change lets it go.
CHANGE_QUEUED: Final = (
    _CHANGED.replace("{document}", "$7::bytea")
    .replace(
        "{condition}",
        "status = 'queued' and level = $10 and payload::text is not distinct from $8::text"
        " and document is not distinct from $9::bytea",
    )
    .replace("select id from changed", "select pg_notify('streamworker', '') from changed")
)
STAYS: Final = """
select order_key is not null or fair_key is not null or node is not null or exists (
  select from streamworker.job_keys as known where known.job_id = job.id and known.queue_name = job.queue_name
) from streamworker.jobs as job where id = $1 and queue_name = $2"""

AUDITED: Final = ("who", "source", "action", "queue", "job_id", "kind", "details", "result")
KEEP_AUDIT: Final = """
insert into streamworker.audit (who, source, action, queue_name, job_id, kind, details, result)
select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[])"""
AUDIT: Final = """
select *, extract(epoch from at)::float8 as moment from streamworker.audit
where id < $5 and ($1::text is null or queue_name = $1) and ($2::text is null or job_id = $2)
  and ($3::text is null or who = $3) and ($4::float8 is null or at >= to_timestamp($4))
order by id desc limit $6"""

FREE_KEYS: Final = """
with freed as (delete from streamworker.job_keys where queue_name = $1 and job_id = any($2::text[]) returning key)
select count(*) from freed"""

# With the next hop, so that no earlier run can record anything any more. A job that was completed runs from its start;
# one that died goes on after the steps that it has done.
RETRY: Final = """
with completed as (
  delete from streamworker.job_steps as step using streamworker.jobs as job
  where job.id = $1 and job.queue_name = $2 and job.status = 'completed'
    and step.job_id = job.id and step.queue_name = job.queue_name
), sent as (
  delete from streamworker.job_signals as signal using streamworker.jobs as job
  where job.id = $1 and job.queue_name = $2 and job.status = 'completed'
    and signal.job_id = job.id and signal.queue_name = job.queue_name
), again as (
  update streamworker.jobs
  set status = 'queued', attempt_count = 0, hop = hop + 1, deliveries = 0, run_at = null, worker_id = null,
    started_at = null, finished_at = null, last_error = null, result = null, updated_at = now()
  where id = $1 and queue_name = $2 and status in ('completed', 'dead', 'cancelled')
    and (expires_at is null or expires_at > now())
  returning id
)
select pg_notify('streamworker', '') from again"""


# Rows of other tables are deleted although the job has none of its own any more; but none of a job that runs.
_OTHER_TABLES: Final = ("job_logs", "job_steps", "job_signals", "job_keys")
ERASE: Final = f"""
with held as materialized (
  select id from streamworker.jobs where queue_name = $1 and id = any($2::text[]) and status = 'running' for update
), jobs as (
  delete from streamworker.jobs where queue_name = $1 and id = any($2::text[]) and id not in (select id from held)
  returning 1
), {
    ", ".join(
        f"{table} as (delete from streamworker.{table} where queue_name = $1 and job_id = any($2::text[]) "
        "and job_id not in (select id from held) returning 1)"
        for table in _OTHER_TABLES
    )
}
select (select count(*) from jobs) as jobs, {
    ", ".join(f"(select count(*) from {table}) as {table}" for table in _OTHER_TABLES)
}"""  # noqa: S608 - our own text

_ID: Final = "[A-Za-z0-9._-]{1,40}"
_SEALED_IN: Final = (
    ("jobs.payload", f"payload->'{FIELD}'->>'key'"),
    ("jobs.result", f"result->'{FIELD}'->>'key'"),
    ("job_steps.value", f"value->'{FIELD}'->>'key'"),
    ("job_signals.data", f"data->'{FIELD}'->>'key'"),
    ("jobs.last_error", rf"substring(last_error from '\[sealed ({_ID}) ')"),
    ("jobs.document", f"""substring(encode(document, 'escape') from '"key":"({_ID})","data"')"""),
    ("payloads.data", f"""substring(encode(substring(data from 1 for 200), 'escape') from '"key":"({_ID})","data"')"""),
    ("job_logs.lines", f"lines->'{FIELD}'->>'key'"),
    ("job_logs.error", rf"substring(error from '\[sealed ({_ID}) ')"),
)
KEY_USES: Final = " union all ".join(
    f"select '{place}', {key}, count(*) from streamworker.{place.partition('.')[0]} where {key} is not null group by 2"  # noqa: S608
    for place, key in _SEALED_IN
)


class PostgresArchive:
    """`Archive` on PostgreSQL.

    Args:
        database: of the ledger.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.flows: Final = PostgresFlows(database)
        self.history: Final = LedgerHistory(database)

    async def jobs(self, wanted: Wanted, *, payload: bool = False) -> AsyncIterator[JobRecord]:
        conditions, values = _conditions(wanted)
        more = ", payload::text, headers::text, document" if payload else ""
        after = ""
        while True:
            where = " and ".join([*conditions, *([after] if after else [])]) or "true"
            statement = (
                f"select {_COLUMNS}, job.created_at::text as made{more} from streamworker.jobs as job "  # noqa: S608
                f"where {where} order by job.created_at desc, job.id desc, job.queue_name desc limit {PAGE}"
            )
            with understood("reading the ledger"):
                rows = await self._database.fetch(statement, *values)
            for row in rows:
                yield record_of(row)
            if len(rows) < PAGE:
                return
            if not after:
                after = _behind(len(values), "text::timestamptz")
                values = [*values, None, None, None]
            values[-3:] = [rows[-1]["made"], rows[-1]["id"], rows[-1]["queue_name"]]

    async def find(self, job_id: str, queue: str | None = None) -> JobRecord | None:
        with understood("looking a job up"):
            rows = await self._database.fetch(FIND, stored_id(job_id), queue)
        if len(rows) > 1:
            names = ", ".join(row["queue_name"] for row in rows)
            raise UsageError(f"several queues have a job with the id {job_id} ({names}): say which queue is meant")
        return record_of(rows[0]) if rows else None

    async def find_waiting(self, job: Job, max_bytes: int, key_ttl: float) -> Enqueued | None:
        with understood("looking a key up"):
            return await find_waiting(self._database.fetch, job, max_bytes=max_bytes, key_ttl=key_ttl)

    async def attempts(self, queue: str, job_id: str) -> list[Attempt]:
        with understood("reading a job's attempts"):
            rows = await self._database.fetch(ATTEMPTS, stored_id(job_id), queue)
        return [Attempt(**row) for row in rows]

    def payloads(self, namespace: str) -> PostgresStore:
        return PostgresStore(self._database.fetch, namespace)

    async def logs(self, queue: str, job_id: str) -> list[KeptLog]:
        with understood("reading the log of a job"):
            rows = await self._database.fetch(LOGS, stored_id(job_id), queue)
        return [KeptLog(**row) for row in rows]

    async def erase(self, queue: str, ids: Sequence[str]) -> dict[str, int]:
        with understood("erasing jobs"):
            (row,) = await self._database.fetch(ERASE, queue, [stored_id(job_id) for job_id in ids])
        return {name: count for name, count in row.items() if count}

    async def key_uses(self) -> list[KeyUse]:
        with understood("looking for sealed values"):
            return [KeyUse(f"postgresql {row[0]}", row[1], row[2]) for row in await self._database.fetch(KEY_USES)]

    async def steps(self, queue: str, job_id: str) -> list[StepRow]:
        with understood("reading a job's steps"):
            rows = await self._database.fetch(STEPS, stored_id(job_id), queue)
        return [StepRow(**row) for row in rows]

    async def signal(self, job_id: str, name: str, data: str | None, queue: str | None) -> bool:
        return await send_signal(self._database, job_id, name, data, queue)

    async def now(self) -> float:
        with understood("asking for the time"):
            return float((await self._database.fetch(NOW))[0][0])

    async def cancel(self, queue: str, job_id: str) -> bool:
        with understood("cancelling a job"):
            return bool(await self._database.fetch(CANCEL, stored_id(job_id), queue))

    async def change(
        self, queue: str, job_id: str, *, payload: bytes | None, level: str, run_at: float | None, moved: str | None
    ) -> bool:
        text = None if payload is None else bytes(payload).decode()
        rows = await self._database.fetch(CHANGE, job_id, queue, text, level, run_at, moved)
        return bool(rows)

    async def change_queued(
        self, was: JobRecord, body: bytes, *, level: str, run_at: float | None, moved: str | None
    ) -> bool:
        payload, before = bytes(codec.read(body).payload), was.payload and bytes(was.payload).decode()
        if before is not None and not fits_jsonb(payload):
            raise InvalidJob(
                f"PostgreSQL cannot keep this payload as it is, and the job {was.id} waits there: cancel it, and "
                "enqueue another one"
            )
        with understood("changing a job"):
            if moved is not None and any(row[0] for row in await self._database.fetch(STAYS, was.id, was.queue)):
                raise UsageError(
                    f"the job {was.id} has a key of its queue, or is part of a flow, and has to stay there"
                )
            text = None if before is None else payload.decode()
            document = None if was.document is None else body
            values = (was.id, was.queue, text, level, run_at, moved, document, before, was.document, was.level)
            return bool(await self._database.fetch(CHANGE_QUEUED, *values))

    @property
    def schedules(self) -> LedgerSchedules:
        """Schedules that are kept as data."""
        return LedgerSchedules(self._database)

    async def keep_audit(self, rows: Sequence[AuditRow]) -> bool:
        there = await self._database.fetch("select to_regclass('streamworker.audit') is not null as there")
        if not there[0]["there"]:
            return False
        columns = [[getattr(row, name) and _storable(getattr(row, name)) for row in rows] for name in AUDITED]
        await self._database.fetch(KEEP_AUDIT, *columns)
        return True

    async def audit(
        self, *, queue: str | None = None, job_id: str | None = None, who: str | None = None, since: float | None = None
    ) -> AsyncIterator[AuditRow]:
        before = 2**62
        while True:
            with understood("reading the audit"):
                rows = await self._database.fetch(AUDIT, queue, job_id, who, since, before, PAGE)
            for row in rows:
                values = {name: row[name] for name in AUDITED if name != "queue"}
                yield AuditRow(queue=row["queue_name"], at=row["moment"], **values)
            if len(rows) < PAGE:
                return
            before = rows[-1]["id"]

    async def free_keys(self, queue: str, ids: Sequence[str]) -> int:
        with understood("forgetting the keys of jobs"):
            return int((await self._database.fetch(FREE_KEYS, queue, [stored_id(job_id) for job_id in ids]))[0][0])

    async def retry(self, queue: str, job_id: str) -> bool:
        with understood("queueing a job anew"):
            return bool(await self._database.fetch(RETRY, stored_id(job_id), queue))

    async def prunable(self, queue: str | None = None, *, older: float | None = None) -> int:
        with understood("counting old jobs"):
            return int((await self._database.fetch(PRUNABLE, queue, older))[0][0])

    async def prune(self, queue: str | None = None, *, older: float | None = None) -> int:
        with understood("forgetting old jobs"):
            return int((await self._database.fetch(PRUNE, BATCH, queue, older))[0][0])


def _conditions(wanted: Wanted) -> tuple[list[str], list[Any]]:
    """Conditions of the filter's set fields only, so that the plan can use the index that fits."""
    conditions: list[str] = []
    values: list[Any] = []

    def add(condition: str, value: Any) -> None:
        values.append(value)
        conditions.append(condition.format(len(values)))

    if wanted.queue is not None:
        add("queue_name = ${}", wanted.queue)
    if wanted.kind is not None:
        add("kind = ${}", wanted.kind)
    if wanted.since is not None:
        add("created_at >= ${}", wanted.since)
    if wanted.ids:
        add("id = any(${}::text[])", [stored_id(job_id) for job_id in sorted(wanted.ids)])
    if wanted.after is not None:
        conditions.append(_behind(len(values)))
        values += [wanted.after[0], stored_id(wanted.after[1]), wanted.after[2]]
    if wanted.statuses:
        # As literals, because the planner picks partial indexes by them; they come from a fixed list.
        words = ", ".join(f"'{status}'" for status in wanted.statuses)
        conditions.append(f"status in ({words})")
    return conditions, values


def _behind(count: int, moment: str = "timestamptz") -> str:
    """The condition of a page that begins after a row; its three values follow ``count`` others.

    A moment given as text is exactly the row's, also one that Python cannot hold.
    """
    at, job_id, queue = (f"${count + n}" for n in (1, 2, 3))
    return f"(created_at, id, queue_name) < ({at}::{moment}, {job_id}::text, {queue}::text)"


def record_of(row: Any) -> JobRecord:
    """A job out of a row of asyncpg, or a dict, with the columns of `FIND`, some of which may be missing."""
    result, payload, headers = row.get("result"), row.get("payload"), row.get("headers")
    return JobRecord(
        id=row["id"],
        queue=row["queue_name"],
        kind=row["kind"],
        level=row["level"],
        status=row["status"],
        attempts=row["attempt_count"],
        max_attempts=row["max_attempts"],
        hop=row["hop"],
        deliveries=row["deliveries"],
        created_at=row["created_at"],
        run_at=row["run_at"],
        expires_at=row["expires_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        worker_id=row["worker_id"],
        error=row["last_error"],
        waits_for=row["waits_for"],
        result=None if result is None else _decoded(result),
        payload=None if payload is None else msgspec.Raw(payload.encode()),
        headers=None if headers is None else _headers(headers),
        document=row.get("document"),
    )


def _decoded(json: str) -> Any:
    """The value, or its JSON text if Python cannot decode it: a number of 5,000 digits, or 1,500 brackets."""
    try:
        return msgspec.json.decode(json)
    except (msgspec.MsgspecError, RecursionError):
        return json


def _headers(json: str) -> dict[str, Any]:
    try:
        return {name: _decoded(bytes(raw).decode()) for name, raw in _fields(json).items()}
    except (msgspec.MsgspecError, RecursionError):  # not an object, or its names cannot be decoded
        return {}


def _storable(text: str) -> str:
    """Text without what PostgreSQL cannot store, and not longer than a line."""
    return text.replace("\0", "").encode(errors="backslashreplace").decode()[:2000]


SCHEMA_LOOK: Final = """
select to_regclass('streamworker.jobs') is not null as any, exists (
  select from pg_attribute
  where attrelid = to_regclass('streamworker.job_keys') and attname = 'held' and not attisdropped
) and to_regclass('streamworker.job_signals') is not null
  and to_regclass('streamworker.flow_checks') is not null and exists (
    select from pg_attribute
    where attrelid = to_regclass('streamworker.job_logs') and attname = 'lines' and not attisdropped
  ) and to_regclass('streamworker.payloads') is not null as all, current_setting('server_encoding') as encoding"""


@overload
async def open_archive(stack: AsyncExitStack, url: str) -> PostgresArchive: ...
@overload
async def open_archive(stack: AsyncExitStack, url: str, *, required: bool) -> PostgresArchive | None: ...
async def open_archive(stack: AsyncExitStack, url: str, *, required: bool = True) -> PostgresArchive | None:
    """What people ask the ledger, closed with ``stack``; ``None`` without its schema, unless it is ``required``.

    Raises:
        ConfigurationError: the schema is not there.
        Unreachable: PostgreSQL does not answer.
    """
    database = await open_database(url, name="jobs", connections=2)
    stack.callback(database.close)
    return PostgresArchive(database) if await schema_is_there(database, required=required) else None


async def schema_is_there(database: Database, *, required: bool) -> bool:
    """Whether the schema is there as this release needs it."""
    with understood("looking for the schema streamworker"):
        there = (await database.fetch(SCHEMA_LOOK))[0]
    if there["all"]:
        return True
    if required or there["any"]:
        what = "of an older release" if there["any"] else "not there"
        raise ConfigurationError(
            f"the schema streamworker is {what}: run `streamworker migrate up`, or set STREAMWORKER_LEDGER=off"
        )
    return False
