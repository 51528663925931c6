"""The relay's side of PostgreSQL: queued rows are taken, dispatched and noted; what Redis lost is queued again.

Each statement is a transaction of its own: no row is locked while Redis is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import asyncpg
import msgspec

from streamworker import codec
from streamworker.errors import InvalidJob
from streamworker.handover import KnownQueue, Taken
from streamworker.job import LEVELS, Job, Level
from streamworker.postgres.failures import understood
from streamworker.postgres.pool import Database

LIMIT: Final = 200
"""Most jobs of one level in one batch."""
BYTES: Final = 8 * 1_048_576
"""Bytes of one batch, about; a single job may have more."""
TAKEOVER: Final = 10.0
"""Seconds after which rows that a relay left half dispatched are taken by another. Longer than an attempt is valid."""
PAGE: Final = 100_000
"""Ids of open jobs that are compared at once."""
FLIP: Final = 500
KEYS: Final = 1000

_COLUMNS: Final = """job.id, job.queue_name, job.kind, job.payload::text as payload, job.level, job.attempt_count,
  job.max_attempts, job.hop, job.headers::text as headers, job.document, job.created_at,
  coalesce(job.run_at, job.created_at) as due"""


def _due(level: Level) -> str:
    return f"""{level} as materialized (
  select id, coalesce(run_at, created_at) as due,
    coalesce(pg_column_size(payload), 0) + coalesce(pg_column_size(document), 0) as bytes
  from streamworker.jobs
  where status = 'queued' and level = '{level}' and coalesce(run_at, created_at) <= now()
  order by coalesce(run_at, created_at) limit $1 for update skip locked
)"""  # noqa: S608 - words of ours, here and below


CLAIM: Final = f"""
with {", ".join(map(_due, LEVELS))}, due as (
  select id, sum(bytes) over (order by rank, due, id) - bytes as before from (
    select 1 as rank, * from high union all select 2, * from normal union all select 3, * from low
  ) as found
)
update streamworker.jobs as job
set status = 'dispatching', hop = job.hop + 1, deliveries = 0, updated_at = clock_timestamp()
from due where job.id = due.id and due.before < $2
returning {_COLUMNS}
"""  # noqa: S608
RETAKE: Final = f"""
with stuck as materialized (
  select id from streamworker.jobs
  where status = 'dispatching' and updated_at < now() - make_interval(secs => $2)
  order by updated_at limit $1 for update skip locked
)
update streamworker.jobs as job set updated_at = clock_timestamp() from stuck where job.id = stuck.id
returning {_COLUMNS}
"""  # noqa: S608
_SOONEST: Final = """(select extract(epoch from coalesce(run_at, created_at)) from streamworker.jobs
  where status = 'queued' and level = '%s' order by coalesce(run_at, created_at) limit 1)"""
NEXT: Final = f"""
select least({", ".join(_SOONEST % level for level in LEVELS)}) - extract(epoch from clock_timestamp())
"""  # noqa: S608
NOTE: Final = """
update streamworker.jobs as job set status = 'dispatched', epoch = sent.epoch, updated_at = clock_timestamp()
from (select * from unnest($1::text[], $2::bigint[], $3::text[]) as sent (id, hop, epoch) order by id) as sent
where job.id = sent.id and job.hop = sent.hop and job.status = 'dispatching'
"""
MEET: Final = """
insert into streamworker.job_queues as known (name, epoch)
select * from unnest($1::text[], $2::text[]) as met (name, epoch) order by name
on conflict (name) do update set epoch = excluded.epoch where known.epoch = '' and excluded.epoch <> ''
"""
QUEUES: Final = """
select name, is_active, epoch, relayed, server, recheck_at is not null and recheck_at <= now() as due
from streamworker.job_queues
"""
OBSERVE: Final = """
update streamworker.job_queues set epoch = $2, relayed = $3, server = $4,
  epoch_since = case when epoch = $2 then epoch_since else now() end,
  recheck_at = case when $8::double precision is null then recheck_at else now() + make_interval(secs => $8) end,
  rechecks = case when $8::double precision is null then rechecks else $9 end
where name = $1 and epoch = $5 and relayed = $6 and server = $7
returning 1
"""
RECHECK: Final = """
update streamworker.job_queues set recheck_at = now() + make_interval(secs => $2)
where name = $1 and recheck_at <= now() returning clock_timestamp()
"""
RECHECKED: Final = """
update streamworker.job_queues set rechecks = rechecks - 1,
  recheck_at = case when rechecks > 1 then now() + make_interval(secs => $2) end
where name = $1 and recheck_at is not null
"""
OPEN: Final = """
select id from streamworker.jobs
where queue_name = $1 and id > $2 and status in ('dispatched', 'running', 'retrying') and updated_at < $3
order by id limit $4
"""
# The next hop at once: what a worker tells of the lost one from now on is not heard.
LOST: Final = """
update streamworker.jobs as job
set status = 'queued', hop = job.hop + 1, deliveries = 0, worker_id = null, updated_at = clock_timestamp(),
  run_at = case when job.status = 'retrying' then job.run_at else coalesce(job.run_at, now()) end
from (select * from unnest($1::text[]) as lost (id) order by id) as lost
where job.id = lost.id and job.status in ('dispatched', 'running', 'retrying') and job.updated_at < $2
returning job.id
"""
HASTEN: Final = """
update streamworker.jobs set run_at = now(), updated_at = clock_timestamp()
where status = 'queued' and coalesce(run_at, created_at) > now() and queue_name = any($1) returning 1
"""
QUEUED: Final = """
select count(*) filter (where due), count(*) filter (where not due)
from (select coalesce(run_at, created_at) <= now() as due from streamworker.jobs
      where status = 'queued' and queue_name = any($1)) as queued
"""
THERE: Final = "select to_regclass('streamworker.jobs') is not null"
CLOCK: Final = "select clock_timestamp()"
TELL: Final = "select pg_notify('streamworker', '')"
PRUNE_KEYS: Final = """
delete from streamworker.job_keys where (queue_name, key) in (
  select queue_name, key from streamworker.job_keys where expires_at < now() order by expires_at limit $1
  for update skip locked
)
"""
STATEMENTS: Final = {
    name: value
    for name, value in globals().items()
    if name.isupper() and isinstance(value, str) and not name.startswith("_")
}


class PostgresOutbox:
    """The `Outbox` of a relay.

    Args:
        database: the connections.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def _ask(self, what: str, statement: str, *values: Any) -> list[asyncpg.Record]:
        with understood(what):
            return await self._database.fetch(statement, *values)

    async def is_there(self) -> bool:
        """Whether the database has the schema."""
        ((there,),) = await self._ask("looking for the schema streamworker", THERE)
        return bool(there)

    # -- dispatching

    async def claim(self) -> list[Taken]:
        """See `Outbox.claim`."""
        return _taken(await self._ask("taking queued jobs", CLAIM, LIMIT, BYTES))

    async def retake(self, older: float = TAKEOVER) -> list[Taken]:
        """See `Outbox.retake`."""
        return _taken(await self._ask("taking over dispatched jobs", RETAKE, LIMIT, older))

    async def next_due(self) -> float | None:
        """See `Outbox.next_due`."""
        ((seconds,),) = await self._ask("looking for queued jobs", NEXT)
        return None if seconds is None else max(0.0, float(seconds))

    async def hasten(self, queues: Sequence[str]) -> int:
        """See `Outbox.hasten`."""
        return len(await self._ask("making queued jobs due", HASTEN, list(queues)))

    async def queued(self, queues: Sequence[str]) -> tuple[int, int]:
        """See `Outbox.queued`."""
        ((due, later),) = await self._ask("counting queued jobs", QUEUED, list(queues))
        return due, later

    async def note(self, jobs: Sequence[Taken], epochs: Sequence[str]) -> None:
        """See `Outbox.note`."""
        ids, hops = [job.id for job in jobs], [job.hop for job in jobs]
        await self._ask("noting dispatched jobs", NOTE, ids, hops, list(epochs))

    # -- queues

    async def meet(self, queues: Mapping[str, str]) -> None:
        """See `Outbox.meet`."""
        await self._ask("noting queues", MEET, list(queues), list(queues.values()))

    async def queues(self) -> list[KnownQueue]:
        """See `Outbox.queues`."""
        return [KnownQueue(*row) for row in await self._ask("looking at queues", QUEUES)]

    async def observe(
        self, known: KnownQueue, *, epoch: str, relayed: int, server: str, recheck: tuple[float, int] | None
    ) -> bool:
        """See `Outbox.observe`."""
        after, times = recheck if recheck is not None else (None, 0)
        old = (known.epoch, known.relayed, known.server)
        return bool(await self._ask("noting queues", OBSERVE, known.name, epoch, relayed, server, *old, after, times))

    # -- what Redis lost

    async def recheck(self, queue: str, within: float) -> datetime | None:
        """See `Outbox.recheck`."""
        rows = await self._ask("taking a comparison", RECHECK, queue, within)
        return rows[0][0] if rows else None

    async def rechecked(self, queue: str, again: float) -> None:
        """See `Outbox.rechecked`."""
        await self._ask("noting a comparison", RECHECKED, queue, again)

    async def now(self) -> datetime:
        """See `Outbox.now`."""
        ((now,),) = await self._ask("asking for the time", CLOCK)
        moment: datetime = now
        return moment

    async def open_ids(self, queue: str, after: str, before: datetime) -> list[str]:
        """See `Outbox.open_ids`."""
        return [row[0] for row in await self._ask("looking for open jobs", OPEN, queue, after, before, PAGE)]

    async def lost(self, ids: Sequence[str], before: datetime) -> list[str]:
        """See `Outbox.lost`."""
        found: list[str] = []
        for start in range(0, len(ids), FLIP):
            rows = await self._ask("queueing lost jobs again", LOST, list(ids[start : start + FLIP]), before)
            found += [row[0] for row in rows]
        if found:
            await self._ask("telling relays", TELL)
        return found

    async def prune_keys(self) -> None:
        """See `Outbox.prune_keys`."""
        await self._ask("deleting old keys", PRUNE_KEYS, KEYS)


def _taken(rows: Sequence[asyncpg.Record]) -> list[Taken]:
    ordered = sorted(rows, key=lambda row: (LEVELS.index(row["level"]), row["due"], row["id"]))
    return [Taken(row["id"], row["queue_name"], row["level"], row["hop"], document(row)) for row in ordered]


def document(row: asyncpg.Record) -> bytes:
    """What goes to Redis for a row. ``run_at`` is left out: the moment has come, by the database's clock."""
    hop, attempts = row["hop"], row["attempt_count"]
    if row["document"] is not None:
        try:
            patch = {"id": row["id"], "hop": hop, "attempt_count": attempts or None, "run_at": None}
            return codec.rewrite(row["document"], patch)
        except InvalidJob:  # its worker will say so
            return bytes(row["document"])
    job = Job(
        id=row["id"],
        queue=row["queue_name"],
        kind=row["kind"],
        payload=msgspec.Raw((row["payload"] or "{}").encode()),
        level=row["level"],
        attempts=attempts,
        max_attempts=row["max_attempts"],
        hop=hop,
        created_at=row["created_at"],
        headers=None if row["headers"] is None else msgspec.json.decode(row["headers"]),
    )
    # Limits were checked when it was enqueued; another driver's jobs meet the worker's.
    return codec.pack(job, max_bytes=2**62, key_ttl=0).body
