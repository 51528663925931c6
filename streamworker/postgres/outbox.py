"""`Outbox` on PostgreSQL: a relay claims queued rows, notes what it dispatched, and queues what Redis lost again.

Each statement is a transaction of its own: no row is locked during a command to Redis, and a row that another
transaction has locked is skipped. A row that no worker could decode becomes dead with its reason; the others go on.
`listen` tells of commits, on a connection of its own, past any pooler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import anyio
import asyncpg
import msgspec

from streamworker import codec
from streamworker.codec import NOTHING, OLD_HEADERS
from streamworker.errors import InvalidJob
from streamworker.job import HELD, LEVELS, Job, Level
from streamworker.postgres.encoding import text, within_python
from streamworker.postgres.enqueue import CHANNEL
from streamworker.postgres.flow_graph import LOOK
from streamworker.postgres.ledger_schedules import LedgerSchedules
from streamworker.postgres.pool import Database, connect
from streamworker.postgres.sqlstate import is_one_rows_fault, reason, translated, understood
from streamworker.relay import KnownQueue, LedgerGauge, LedgerKey, Lost, Taken
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.relay")

LIMIT: Final = 200
"""Most jobs of one level in one batch."""
BYTES: Final = 8 * 1_048_576
"""Bytes of one batch, approximately; a single job may have more."""
TAKEOVER: Final = 10.0
"""Seconds after which another relay takes over rows that are still ``dispatching``. Longer than `relay.VALID`."""
PAGE: Final = 100_000
"""Ids of open jobs in one page of a comparison."""
LARGEST: Final = 64 * 1_048_576
"""Most bytes of a document on its way to Redis, whatever the limits of the workers."""
UNREADABLE: Final = "no worker can read it"
LOST_BATCH: Final = 500
LOOKS: Final = 200
"""Most notes that one look at flows takes: it must end within a statement.s timeout, or none ever would."""
KEY_BATCH: Final = 1000
WAKES: Final = 500
"""Most waiting jobs, and most signals, of one statement."""

# asyncpg cannot hold every time that PostgreSQL can, so the server sorts.
_RETURNED: Final = f"""returning job.id, job.queue_name, job.kind, job.payload::text as payload, job.level,
  job.attempt_count, job.max_attempts, job.hop, job.headers::text as headers, job.document,
  {within_python("job.created_at")} as created_at, {within_python("job.expires_at")} as expires_at, job.status,
  job.order_key, job.fair_key, case when job.order_key is not null then
    (select epoch from streamworker.job_queues where name = job.queue_name) end as known,
  (select array[known.key, known.held, extract(epoch from known.expires_at - clock_timestamp())::text]
    from streamworker.job_keys as known
    where known.job_id = job.id and known.queue_name = job.queue_name limit 1) as key,
  coalesce(job.run_at, job.created_at) as due"""  # noqa: S608 - words of ours, here and below
_IN_ORDER: Final = """
select id, queue_name, kind, payload, level, attempt_count, max_attempts, hop, headers, document, created_at,
  expires_at, status, order_key, fair_key, known, key
from taken
order by array_position(array['high', 'normal', 'low'], level), due, id"""
_NEXT_HOP: Final = f"least(job.hop, {2**63 - 2}) + 1"
# One that has waited may hold an order key in Redis: it is sent, and the worker lets it expire.
_LATE: Final = "(job.expires_at <= clock_timestamp() and (job.hop = 0 or job.document is null))"
_DEAD: Final = "status = 'dead', last_error = $3, finished_at = clock_timestamp(), updated_at = clock_timestamp()"


# Of the jobs with one order key the relay takes one at a time, and none while its queue is compared with Redis: those
# that Redis lost come first. One that is not due yet takes its place when it is.
_FIRST: Final = """not exists (
      select from streamworker.jobs as before
      where before.queue_name = jobs.queue_name and before.order_key = jobs.order_key and before.place < jobs.place
        and before.status in ('queued', 'dispatching') and coalesce(before.run_at, before.created_at) <= now()
    ) and not exists (
      select from streamworker.job_queues as queue where queue.name = jobs.queue_name and queue.recheck_at is not null
    )"""


def _due(level: Level) -> str:
    return f"""{level} as materialized (
  select id, queue_name, coalesce(run_at, created_at) as due,
    1 + coalesce(pg_column_size(payload), 0) + coalesce(pg_column_size(document), 0) as bytes
  from streamworker.jobs
  where status = 'queued' and level = '{level}' and coalesce(run_at, created_at) <= now()
    and (order_key is null or {_FIRST})
  order by coalesce(run_at, created_at) limit $1 for update skip locked
)"""  # noqa: S608 - words of ours, here and below


_QUEUED: Final = f"""{", ".join(map(_due, LEVELS))}, due as (
  select id, queue_name, sum(bytes) over (order by rank, due, id, queue_name) - bytes as before from (
    select 1 as rank, * from high union all select 2, * from normal union all select 3, * from low
  ) as found
)"""  # noqa: S608
_STUCK: Final = f"""stuck as materialized (
  select id, queue_name from streamworker.jobs
  where status = 'dispatching' and updated_at < now() - make_interval(secs => $2)
    and (order_key is null or {_FIRST})
  order by updated_at limit $1 for update skip locked
)"""  # noqa: S608
CLAIM: Final = f"""
with {_QUEUED}, taken as (
  update streamworker.jobs as job
  set hop = {_NEXT_HOP}, deliveries = 0, updated_at = clock_timestamp(),
    status = case when {_LATE} then 'expired' else 'dispatching' end,
    finished_at = case when {_LATE} then clock_timestamp() end
  from due where job.id = due.id and job.queue_name = due.queue_name and due.before < $2
  {_RETURNED}
){_IN_ORDER}
"""  # noqa: S608
RETAKE: Final = f"""
with {_STUCK}, taken as (
  update streamworker.jobs as job set updated_at = clock_timestamp() from stuck
  where job.id = stuck.id and job.queue_name = stuck.queue_name
  {_RETURNED}
){_IN_ORDER}
"""  # noqa: S608
# Returns no column: the row is one that cannot be decoded.
DEAD_QUEUED: Final = f"""
with {_QUEUED}
update streamworker.jobs as job set {_DEAD} from due
where job.id = due.id and job.queue_name = due.queue_name and due.before < $2 returning 1
"""  # noqa: S608
DEAD_STUCK: Final = f"""
with {_STUCK}
update streamworker.jobs as job set {_DEAD} from stuck
where job.id = stuck.id and job.queue_name = stuck.queue_name returning 1
"""  # noqa: S608
DEAD: Final = """
update streamworker.jobs as job
set status = 'dead', last_error = odd.reason, finished_at = clock_timestamp(), updated_at = clock_timestamp()
from (
  select * from unnest($1::text[], $2::bigint[], $3::text[], $4::text[]) as odd (id, hop, reason, queue_name)
  order by id, queue_name
) as odd
where job.id = odd.id and job.queue_name = odd.queue_name and job.hop = odd.hop and job.status = 'dispatching'
"""
_SOONEST: Final = """(select extract(epoch from coalesce(run_at, created_at)) from streamworker.jobs
  where status = 'queued' and level = '%s' order by coalesce(run_at, created_at) limit 1)"""
# The waiting ones come from an index of those whose time will come, and from one of signals that no relay has seen.
NEXT: Final = f"""
select least({", ".join(_SOONEST % level for level in LEVELS)}) - extract(epoch from clock_timestamp()),
  case when exists (select from streamworker.job_signals where not seen) then 0
    else (select extract(epoch from run_at) from streamworker.jobs
      where status = 'waiting' and run_at is not null order by run_at limit 1) - extract(epoch from clock_timestamp())
  end
"""  # noqa: S608
# The row of a job is locked before its signal counts as seen: a run that ends meanwhile finds the signal when it lets
# the job wait. A job whose row is locked, or a later signal of its name, is looked at again.
WAKE: Final = """
with due as materialized (
  select id, queue_name from streamworker.jobs where status = 'waiting' and run_at is not null and run_at <= now()
  order by run_at limit $1 for update skip locked
), sent as materialized (
  select job_id, queue_name, name from streamworker.job_signals where not seen
  order by sent_at limit $1 for update skip locked
), free as materialized (
  select job.id, job.queue_name, job.status, job.waits_for, sent.name
  from streamworker.jobs as job join sent on job.id = sent.job_id and job.queue_name = sent.queue_name
  for update of job skip locked
), woken as (
  update streamworker.jobs as job
  set status = 'queued', waits_for = null, run_at = clock_timestamp(), updated_at = clock_timestamp()
  from (
    select id, queue_name from due
    union select id, queue_name from free where status = 'waiting' and waits_for = name
  ) as wakes
  where job.id = wakes.id and job.queue_name = wakes.queue_name
  returning 1
), seen as (
  update streamworker.job_signals as signal set seen = true from sent
  where signal.job_id = sent.job_id and signal.queue_name = sent.queue_name and signal.name = sent.name and (
    (sent.job_id, sent.queue_name, sent.name) in (select id, queue_name, name from free)
    or not exists (select from streamworker.jobs as job where job.id = sent.job_id and job.queue_name = sent.queue_name)
  )
  returning 1
)
select (select count(*) from woken) + (select count(*) from seen)
"""
# A locked row belongs to a run that is faster than the note; it is returned, to be noted later.
NOTE: Final = """
with sent as materialized (
  select * from unnest($1::text[], $2::bigint[], $3::text[], $4::text[]) as sent (id, hop, epoch, queue_name)
), open as materialized (
  select job.id, job.queue_name from streamworker.jobs as job join sent using (id, queue_name)
  where job.hop = sent.hop and job.status = 'dispatching'
), free as materialized (
  select job.id, job.queue_name, sent.epoch from streamworker.jobs as job join sent using (id, queue_name)
  where job.hop = sent.hop and job.status = 'dispatching'
  order by job.id, job.queue_name for update of job skip locked
), noted as (
  update streamworker.jobs as job set status = 'dispatched', epoch = free.epoch, updated_at = clock_timestamp()
  from free where job.id = free.id and job.queue_name = free.queue_name returning job.id, job.queue_name
)
select queue_name, id from open where (id, queue_name) not in (select id, queue_name from noted)
"""
# Not sent, so its hop is the one before. One with an order key keeps its place, and the others of the key behind it.
PUT_OFF: Final = """
update streamworker.jobs as job set
  hop = case when job.order_key is null then greatest(job.hop - 1, 0) else job.hop end,
  status = case when job.order_key is null then 'queued' else job.status end,
  run_at = case when job.order_key is null then clock_timestamp() + interval '1 second' else job.run_at end,
  updated_at = clock_timestamp()
    - case when job.order_key is null then interval '0' else make_interval(secs => $4) end
from (
  select * from unnest($1::text[], $2::bigint[], $3::text[]) as held (id, hop, queue_name) order by id, queue_name
) as held
where job.id = held.id and job.queue_name = held.queue_name and job.hop = held.hop and job.status = 'dispatching'
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
update streamworker.job_queues set rechecks = rechecks - $3::integer,
  recheck_at = case when rechecks > $3::integer then now() + make_interval(secs => $2) end
where name = $1 and recheck_at is not null
"""
OPEN: Final = """
select id from streamworker.jobs
where queue_name = $1 and id > $2 and status in ('dispatched', 'running', 'retrying') and updated_at < $3
order by id limit $4
"""
# With the next hop, so that no late record of the lost entry counts. A locked row is skipped and returned as locked:
# its run may be frozen in its transaction, and must not hold up the others.
LOST: Final = f"""
with lost as materialized (
  select job.id from streamworker.jobs as job
  where job.id = any($1::text[]) and job.queue_name = $3 and job.status in ('dispatched', 'running', 'retrying')
    and job.updated_at < $2
), free as materialized (
  select job.id from streamworker.jobs as job
  where job.id = any($1::text[]) and job.queue_name = $3 and job.status in ('dispatched', 'running', 'retrying')
    and job.updated_at < $2
  order by job.id for update skip locked
), again as (
  update streamworker.jobs as job
  set status = 'queued', hop = {_NEXT_HOP}, deliveries = 0, worker_id = null, updated_at = clock_timestamp(),
    run_at = case when job.status = 'retrying' then job.run_at else coalesce(job.run_at, now()) end
  from free where job.id = free.id and job.queue_name = $3
  returning job.id
)
select id, id in (select id from again) as queued from lost
"""  # noqa: S608
RUN_NOW: Final = """
update streamworker.jobs set run_at = now(), updated_at = clock_timestamp()
where status = 'queued' and coalesce(run_at, created_at) > now() and queue_name = any($1) returning 1
"""
GAUGES: Final = "select gauge, label, value from streamworker.gauges()"
QUEUED: Final = """
select count(*) filter (where due), count(*) filter (where not due)
from (select coalesce(run_at, created_at) <= now() as due from streamworker.jobs
      where status = 'queued' and queue_name = any($1)) as queued
"""
HAS_SCHEMA: Final = "select to_regclass('streamworker.jobs') is not null"
CLOCK: Final = "select clock_timestamp()"
TELL: Final = "select pg_notify('streamworker', '')"
PRUNE_KEYS: Final = """
with old as materialized (
  select queue_name, key, held is not null and exists (
    select from streamworker.jobs as job where job.id = known.job_id and job.queue_name = known.queue_name
      and job.status not in ('completed', 'dead', 'cancelled', 'expired')
  ) as open
  from streamworker.job_keys as known where expires_at < now() order by expires_at limit $1 for update skip locked
), later as (
  update streamworker.job_keys as known set expires_at = now() + interval '1 day' from old
  where old.open and known.queue_name = old.queue_name and known.key = old.key
)
delete from streamworker.job_keys as known using old
where not old.open and known.queue_name = old.queue_name and known.key = old.key
"""


class PostgresOutbox:
    """`Outbox` on PostgreSQL.

    Args:
        database: of the ledger.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._schedules = LedgerSchedules(database)

    async def _ask(self, what: str, statement: str, *values: Any) -> list[asyncpg.Record]:
        with understood(what):
            return await self._database.fetch(statement, *values)

    async def is_there(self) -> bool:
        """Whether the database has the schema."""
        ((there,),) = await self._ask("looking for the schema streamworker", HAS_SCHEMA)
        return bool(there)

    # -- dispatching

    async def claim(self) -> list[Taken]:
        return await self._taken("taking queued jobs", CLAIM, DEAD_QUEUED, BYTES, 1)

    async def retake(self, older: float = TAKEOVER) -> list[Taken]:
        return await self._taken("taking over dispatched jobs", RETAKE, DEAD_STUCK, older, older)

    async def _taken(self, what: str, take: str, kill: str, some: float, one: float) -> list[Taken]:
        """Take jobs, in order; those that no worker could decode become dead.

        Args:
            what: for the error: what is being done.
            take: the statement.
            kill: the statement that makes the first row that ``take`` would return dead.
            some: second value of ``take`` for a batch.
            one: the same for a single job.
        """
        # Claimed rows whose reply is lost are taken over later; `RETAKE` must change nothing if its reply is lost.
        fetch = self._database.fetch if take is CLAIM else self._received
        try:
            rows = await fetch(take, LIMIT, some)
        except Exception as error:
            if not is_one_rows_fault(error):
                raise translated(error, what) from error
        else:
            return await self._readable(rows)
        taken: list[Taken] = []
        for _ in range(LIMIT):  # one of them cannot be received: one at a time
            try:
                rows = await self._received(take, 1, one)
            except Exception as error:
                if not is_one_rows_fault(error):
                    raise translated(error, what) from error
                log.error("relay_job_dead", error=reason(error), hint="its row cannot be read")
                await self._ask(
                    "marking a job dead that cannot be read", kill, 1, one, f"{UNREADABLE}: {reason(error)}"
                )
                continue
            if not rows:
                break
            taken += await self._readable(rows)
        return taken

    async def _received(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """The rows of a statement that is rolled back unless all of them arrive."""
        async with self._database.session(alone=False) as connection:
            return await connection.fetch(statement, *values)

    async def _readable(self, rows: Sequence[asyncpg.Record]) -> list[Taken]:
        taken: list[Taken] = []
        odd: list[tuple[str, int, str, str]] = []
        for row in rows:
            if row["status"] == "expired":
                log.info("relay_job_expired", job_id=row["id"], kind=row["kind"], queue=row["queue_name"])
                continue
            try:
                body = document(row)
            except InvalidJob as error:
                whose = {"job_id": row["id"], "kind": row["kind"], "queue": row["queue_name"]}
                log.error("relay_job_dead", **whose, error=str(error))
                odd.append((row["id"], row["hop"], text(f"{UNREADABLE}: {error}"), row["queue_name"]))
            else:
                known, key = row["known"] or "", key_of(row)
                taken.append(Taken(row["id"], row["queue_name"], row["level"], row["hop"], body, known, key))
        if odd:
            await self._ask("marking jobs dead that cannot be read", DEAD, *map(list, zip(*odd, strict=True)))
        return taken

    async def next_due(self) -> tuple[float | None, float | None]:
        ((queued, waiting),) = await self._ask("looking for queued jobs", NEXT)
        return _from_now(queued), _from_now(waiting)

    async def wake(self) -> int:
        ((changed,),) = await self._ask("waking jobs that wait", WAKE, WAKES)
        return int(changed)

    async def gauges(self) -> list[LedgerGauge]:
        return [LedgerGauge(*row) for row in await self._ask("counting flows", GAUGES)]

    async def run_now(self, queues: Sequence[str]) -> int:
        return len(await self._ask("making queued jobs due", RUN_NOW, list(queues)))

    async def queued(self, queues: Sequence[str]) -> tuple[int, int]:
        ((due, later),) = await self._ask("counting queued jobs", QUEUED, list(queues))
        return due, later

    async def note(self, jobs: Sequence[Taken], epochs: Sequence[str]) -> set[tuple[str, str]]:
        ids, hops, queues = [job.id for job in jobs], [job.hop for job in jobs], [job.queue for job in jobs]
        rows = await self._ask("noting dispatched jobs", NOTE, ids, hops, list(epochs), queues)
        return {(row["queue_name"], row["id"]) for row in rows}

    async def put_off(self, jobs: Sequence[Taken]) -> None:
        ids, hops, queues = [job.id for job in jobs], [job.hop for job in jobs], [job.queue for job in jobs]
        await self._ask("putting jobs off whose keys are held", PUT_OFF, ids, hops, queues, TAKEOVER - 1)

    # -- queues

    async def meet(self, queues: Mapping[str, str]) -> None:
        await self._ask("noting queues", MEET, list(queues), list(queues.values()))

    async def queues(self) -> list[KnownQueue]:
        return [KnownQueue(*row) for row in await self._ask("looking at queues", QUEUES)]

    async def observe(
        self, known: KnownQueue, *, epoch: str, relayed: int, server: str, recheck: tuple[float, int] | None
    ) -> bool:
        after, times = recheck if recheck is not None else (None, 0)
        old = (known.epoch, known.relayed, known.server)
        return bool(await self._ask("noting queues", OBSERVE, known.name, epoch, relayed, server, *old, after, times))

    # -- what Redis lost

    async def recheck(self, queue: str, within: float) -> datetime | None:
        rows = await self._ask("taking a comparison", RECHECK, queue, within)
        return rows[0][0] if rows else None

    async def rechecked(self, queue: str, again: float, *, done: bool = True) -> None:
        await self._ask("noting a comparison", RECHECKED, queue, again, int(done))

    async def now(self) -> datetime:
        ((now,),) = await self._ask("asking for the time", CLOCK)
        moment: datetime = now
        return moment

    async def open_ids(self, queue: str, after: str, before: datetime) -> list[str]:
        return [row[0] for row in await self._ask("looking for open jobs", OPEN, queue, after, before, PAGE)]

    async def lost(self, queue: str, ids: Sequence[str], before: datetime) -> Lost:
        queued: list[str] = []
        locked: list[str] = []
        for start in range(0, len(ids), LOST_BATCH):
            some = list(ids[start : start + LOST_BATCH])
            for row in await self._ask("queueing lost jobs again", LOST, some, before, queue):
                (queued if row["queued"] else locked).append(row["id"])
        if queued:
            await self._ask("telling relays", TELL)
        return Lost(queued, locked)

    async def look(self) -> int:
        ((count,),) = await self._ask("looking at flows", LOOK, LOOKS)
        return int(count)

    @property
    def schedules(self) -> LedgerSchedules:
        return self._schedules

    async def prune_keys(self) -> None:
        await self._ask("deleting old keys", PRUNE_KEYS, KEY_BATCH)


def key_of(row: asyncpg.Record) -> LedgerKey | None:
    """The deduplication key that a row's job has."""
    if row["key"] is None:
        return None
    name, until, seconds = row["key"]
    return LedgerKey(name, until, HELD if until is not None else max(0.0, float(seconds)))


def _from_now(seconds: Any) -> float | None:
    return None if seconds is None else max(0.0, float(seconds))


def document(row: asyncpg.Record) -> bytes:
    """The document of a row, for Redis. Without ``run_at``: the job is due by the database's clock.

    Raises:
        InvalidJob: no worker could decode it.
    """
    hop, attempts, key = codec.written_hop(row["hop"]), row["attempt_count"], key_of(row)
    if row["document"] is not None:
        patch = {"id": row["id"], "hop": hop, "attempt_count": attempts or None, "run_at": None,
                 "expires_at": row["expires_at"]}  # fmt: skip
        if key is not None:
            patch |= {"key": key.name, "unique": key.until}
        body = codec.rewrite(row["document"], patch, state=NOTHING)
    else:
        body = _packed(row, hop, attempts, key)
    if len(body) > LARGEST:
        raise InvalidJob(f"the document has {len(body)} bytes and {LARGEST} are the most for any worker")
    codec.check_depth(body)
    codec.read(body)
    return body


def _packed(row: asyncpg.Record, hop: int, attempts: int, key: LedgerKey | None) -> bytes:
    try:
        headers = None if row["headers"] is None else msgspec.json.decode(row["headers"])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidJob(f"the headers cannot be read: {error}") from None
    if isinstance(headers, dict):  # earlier versions kept state of workers in the headers of rows
        headers = {name: value for name, value in headers.items() if name not in OLD_HEADERS} or None
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
        expires_at=row["expires_at"],
        headers=headers,
        order_key=row["order_key"],
        fair_key=row["fair_key"],
        key=key.name if key is not None else None,
        unique=key.until if key is not None else None,
    )
    # The limit was checked at enqueue; for rows that another driver wrote the worker's limit holds.
    return codec.pack(job, max_bytes=2**62, key_ttl=0).body


RETRY: Final = 2.0
"""Seconds between tries to connect again; meanwhile the relay polls."""
PROBE: Final = 30.0
"""Seconds after which a silent connection is probed."""


async def listen(url: str, on_message: Callable[[str], None], on_state: Callable[[bool], None]) -> None:
    """Call ``on_message`` for every notification. Never returns; cancel it.

    Args:
        url: of the database, past any connection pooler.
        on_message: called with the message.
        on_state: called with whether notifications arrive, when that changes.
    """
    logged = False
    while True:
        try:
            connection = await connect(url, "relay, listening")
            try:
                gone = anyio.Event()
                connection.add_termination_listener(lambda _, gone=gone: gone.set())
                with understood("listening for jobs"):
                    await connection.add_listener(CHANNEL, lambda _c, _p, _n, message: on_message(str(message)))
                    on_state(True)
                    logged = False
                    while not gone.is_set():
                        with anyio.move_on_after(PROBE):
                            await gone.wait()
                            break
                        await connection.execute("select 1", timeout=PROBE)
            finally:
                on_state(False)
                connection.terminate()
        except Exception as error:  # noqa: BLE001 - a hint that fails must not end the relay
            if not logged:
                log.info("listen_lost", error=str(error), hint="queued jobs are looked for twice a second meanwhile")
            logged = True
        await anyio.sleep(RETRY)
