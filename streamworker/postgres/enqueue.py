"""Enqueue in the caller's transaction: a job is a row with the status ``queued``, and a relay adds it to Redis.

The connection is the user's, with the user's type codecs: everything goes as text and is cast by the server, and COPY
uses its text format, so that no codec of theirs touches our values. Nothing here awaits anything but the connection: on
one that blocks, it all runs without an event loop.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

import msgspec

from streamworker import codec
from streamworker.errors import UsageError
from streamworker.job import Enqueued, Job
from streamworker.postgres import SqlConnection
from streamworker.postgres.sqlstate import schema_expected

COPY_FROM: Final = 20
"""Least jobs for which COPY is worth its extra round trip."""
BATCH: Final = 1000
"""Most jobs of one statement."""
CHANNEL: Final = "streamworker"
DEEPEST: Final = 1000
"""Brackets that a payload may open and surely fit the server's stack as jsonb."""

# One statement whatever the jobs need. Keys are taken in one order: two transactions cannot wait for each other.
ENQUEUE: Final = """
with given as (
  select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
                       $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[],
                       $16::text[]) with ordinality
    as job (id, queue_name, kind, payload, level, delay, run_at, max_attempts, headers, document, key, key_ttl,
            expires_in, expires_at, order_key, fair_key, at)
), taken as materialized (
  select given.*, case when key is not null then
      streamworker.take_key(queue_name, key, id, make_interval(secs => key_ttl::double precision))
    end as earlier
  from (select * from given order by queue_name, key, at) as given
), placed as materialized (
  select taken.*, case when order_key is not null then streamworker.take_place(queue_name, order_key) end as place
  from (select * from taken where earlier is null order by queue_name, order_key, at) as taken
), added as (
  insert into streamworker.jobs (id, queue_name, kind, payload, level, run_at, max_attempts, headers, document,
    expires_at, order_key, fair_key, place)
  select id, queue_name, kind, payload::jsonb, level,
    case when delay is null then run_at::timestamptz
      else clock_timestamp() + make_interval(secs => delay::double precision) end,
    max_attempts::integer, headers::jsonb, decode(document, 'hex'),
    case when expires_in is null then expires_at::timestamptz
      else clock_timestamp() + make_interval(secs => expires_in::double precision) end,
    order_key, fair_key, place
  from placed
), told as materialized (
  select pg_notify('streamworker', case when bool_or(delay is null and run_at is null) then '' else 'later' end)
  from taken
)
select taken.earlier from taken, told order by taken.at
"""
# A job that was never sent to its queue is rewritten; a row that another transaction changes meanwhile is waited for.
REPLACE: Final = """
update streamworker.jobs as waiting set
    kind = $3, payload = $4::jsonb, level = $5, max_attempts = $8::integer, headers = $9::jsonb,
    document = decode($10, 'hex'), updated_at = clock_timestamp(),
    run_at = case when $14::text is not null
        then least(clock_timestamp() + make_interval(secs => $14::double precision),
          waiting.created_at + make_interval(secs => $15::text::double precision))
      when $6::text is null then $7::text::timestamptz
      else clock_timestamp() + make_interval(secs => $6::double precision) end,
    expires_at = case when $12::text is null then $13::text::timestamptz
      else clock_timestamp() + make_interval(secs => $12::double precision) end,
    fair_key = $17::text, order_key = $16::text,
    place = case when waiting.order_key is not distinct from $16::text then waiting.place
      else streamworker.take_place($1::text, $16::text) end
  from streamworker.job_keys as known
  where known.queue_name = $1 and known.key = $2 and known.held is not null and waiting.id = known.job_id
    and waiting.queue_name = known.queue_name and waiting.status = 'queued' and waiting.hop = 0
  returning waiting.id, pg_notify('streamworker', '') is null, $11::text
"""
WAITING: Final = """
select job.id from streamworker.job_keys as known join streamworker.jobs as job
  on job.id = known.job_id and job.queue_name = known.queue_name
where known.queue_name = $1 and known.key = $2 and job.status in ('queued', 'dispatching')
"""
HOLD: Final = """
select streamworker.take_key($1::text, $2::text, $3::text,
  case when $4::text is null then make_interval(secs => $6::text::double precision) else interval '1 day' end,
  $4::text, $5::text::boolean)
"""
NOW: Final = "select extract(epoch from clock_timestamp())::text"
TELL: Final = "select pg_notify('streamworker', $1::text)"

_STRINGS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ESCAPES: Final = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_NUMBERS: Final = re.compile(rb"\d[eE]|-0(?!\.\d*[1-9])|\d{300}")
_SPECIAL: Final = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


Fetch: TypeAlias = Callable[..., Awaitable[Sequence[Any]]]
"""The rows of a statement."""


class QueuedRow(msgspec.Struct, frozen=True, gc=False):
    """A job as the values of its row: all text; ``None`` is null."""

    job: Job
    payload: str | None
    headers: str | None
    document: str | None


async def enqueue(connection: SqlConnection, jobs: Sequence[Job], *, max_bytes: int, key_ttl: float) -> list[Enqueued]:
    """Write jobs as rows, visible to the relay when the caller commits; answers in order.

    Args:
        connection: the caller's, inside a transaction.
        jobs: what `App.job` made.
        max_bytes: the largest document allowed.
        key_ttl: seconds a deduplication key is remembered unless the job says otherwise.

    Raises:
        UsageError: a key or a kind holds a NUL.
        JobTooLarge: a document is too large; nothing was written.
        ConfigurationError: the database has no schema streamworker, or is not encoded in UTF8.
        Exception: the library's own, as of any statement in the caller's transaction: a serialization failure.
    """
    rows = [queued_row(job, max_bytes, key_ttl) for job in jobs]
    answers: list[Enqueued] = []
    with schema_expected("enqueue"):
        if any(job.unique is not None for job in jobs):
            return await _enqueue_held(connection, rows, key_ttl)
        copying = len(rows) >= COPY_FROM and not any(job.key or job.order_key or job.fair_key for job in jobs)
        if copying and await _copied(connection, rows):
            return [Enqueued(job.id, new=True) for job in jobs]
        for start in range(0, len(rows), BATCH):
            answers += await _added(connection, rows[start : start + BATCH], key_ttl)
    return answers


async def _added(connection: SqlConnection, rows: Sequence[QueuedRow], key_ttl: float) -> list[Enqueued]:
    values = [row_values(row, key_ttl) for row in rows]
    earlier = await connection.fetch(ENQUEUE, *map(list, zip(*values, strict=True)))
    return [
        Enqueued(row.job.id, new=True) if found[0] is None else Enqueued(found[0], new=False)
        for row, found in zip(rows, earlier, strict=True)
    ]


async def _enqueue_held(connection: SqlConnection, rows: Sequence[QueuedRow], key_ttl: float) -> list[Enqueued]:
    """Add jobs of which some have keys that are held: first all keys, in their order, then the jobs as given."""
    answers: dict[int, Enqueued] = {}
    keyed = [index for index, row in enumerate(rows) if row.job.key is not None]
    for index in sorted(keyed, key=lambda n: (rows[n].job.queue, rows[n].job.key or "", n)):
        answer = await _held(connection, rows[index], key_ttl)
        if answer is not None:
            answers[index] = answer
    rest = [index for index in range(len(rows)) if index not in answers]
    free = [_without_key(rows[index]) for index in rest]
    for start in range(0, len(rest), BATCH):
        some = await _added(connection, free[start : start + BATCH], key_ttl)
        answers.update(zip(rest[start : start + BATCH], some, strict=True))
    return [answers[index] for index in range(len(rows))]


def _without_key(row: QueuedRow) -> QueuedRow:
    if row.job.key is None:
        return row
    return msgspec.structs.replace(row, job=msgspec.structs.replace(row.job, key=None))


async def _rewritten(fetch: Fetch, row: QueuedRow, key_ttl: float) -> Enqueued | None:
    """Rewrite the job that has a job's key, if it waits and was never sent to its queue; the answer then."""
    job, values = row.job, row_values(row, key_ttl)
    debounce = [None if each is None else repr(float(each)) for each in (job.debounce, job.debounce_max)]
    found = await fetch(REPLACE, job.queue, job.key, *values[2:10], job.id, *values[12:14], *debounce, *values[14:])
    return Enqueued(found[0][0], new=False, replaced=found[0][0]) if found else None


async def _held(connection: SqlConnection, row: QueuedRow, key_ttl: float) -> Enqueued | None:
    """Take the key of a job; the answer if the job is not added: an earlier one has it, or was rewritten."""
    job = row.job
    if job.replace and (answer := await _rewritten(connection.fetch, row, key_ttl)) is not None:
        return answer
    ttl = repr(float(key_ttl if job.key_ttl is None else job.key_ttl))
    earlier = await connection.fetch(HOLD, job.queue, job.key, job.id, job.unique, str(job.replace).lower(), ttl)
    return None if earlier[0][0] is None else Enqueued(earlier[0][0], new=False)


async def find_waiting(fetch: Fetch, job: Job, *, max_bytes: int, key_ttl: float) -> Enqueued | None:
    """The answer for a job that goes to Redis, if its deduplication key belongs to one that waits in the ledger.

    Args:
        fetch: the rows of one statement.
        job: one with a key; if it replaces, the one that waits is rewritten.
        max_bytes: the largest document allowed.
        key_ttl: seconds a deduplication key is remembered unless the job says otherwise.
    """
    with schema_expected("enqueue"):
        if (
            job.replace
            and (answer := await _rewritten(fetch, queued_row(job, max_bytes, key_ttl), key_ttl)) is not None
        ):
            return answer
        found = await fetch(WAITING, job.queue, job.key)
        return Enqueued(found[0][0], new=False) if found else None


def queued_row(job: Job, max_bytes: int, key_ttl: float) -> QueuedRow:
    """The row of a job, checked as at every enqueue."""
    for name, value in (
        ("key", job.key), ("kind", job.kind), ("order_key", job.order_key), ("fair_key", job.fair_key),
    ):  # fmt: skip
        if value is not None and "\x00" in value:
            raise UsageError(f"{name}={value!r} holds a NUL, which PostgreSQL cannot store")
    body = codec.pack(job, max_bytes=max_bytes, key_ttl=key_ttl).body
    codec.read(body)  # raw JSON in a payload may be invalid: refused here, not by a failed transaction
    payload = bytes(job.payload)
    headers = msgspec.json.encode(job.headers) if job.headers is not None else b""
    if fits_jsonb(payload) and fits_jsonb(headers):
        return QueuedRow(job, payload.decode(), headers.decode() or None, None)
    return QueuedRow(job, None, None, body.hex())


def fits_jsonb(text: bytes) -> bool:
    """Whether jsonb returns this JSON as it is: no NUL, no number that jsonb writes otherwise."""
    if _ESCAPES.search(text):
        return False
    bare = _STRINGS.sub(b"", text)
    if _NUMBERS.search(bare) or bare.count(b"[") + bare.count(b"{") > DEEPEST:
        return False
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def row_values(row: QueuedRow, key_ttl: float) -> tuple[str | None, ...]:
    """A row as the columns of `ENQUEUE`."""
    job = row.job
    return (
        job.id,
        job.queue,
        job.kind,
        row.payload,
        job.level,
        None if job.delay is None else repr(float(job.delay)),
        None if job.run_at is None else _utc(job.run_at),
        None if job.max_attempts is None else str(job.max_attempts),
        row.headers,
        row.document,
        job.key,
        repr(float(key_ttl if job.key_ttl is None else job.key_ttl)),
        None if job.expires_in is None else repr(float(job.expires_in)),
        None if job.expires_at is None else _utc(job.expires_at),
        job.order_key,
        job.fair_key,
    )


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


async def _copied(connection: SqlConnection, rows: Sequence[QueuedRow]) -> bool:
    """Whether the rows were added by COPY."""
    now: datetime | None = None
    # Counted by the clock that will judge it.
    if any(row.job.delay is not None or row.job.expires_in is not None for row in rows):
        now = datetime.fromtimestamp(float((await connection.fetch(NOW))[0][0]), UTC)
    columns = (
        "id", "queue_name", "kind", "payload", "level", "run_at", "max_attempts", "headers", "document", "expires_at",
    )  # fmt: skip
    lines = (
        "".join(copy_line(row, now) for row in rows[start : start + BATCH]).encode()
        for start in range(0, len(rows), BATCH)
    )
    if not await connection.copy("jobs", columns, lines):
        return False
    later = all(row.job.delay is not None or row.job.run_at is not None for row in rows)
    await connection.fetch(TELL, "later" if later else "")
    return True


def copy_line(row: QueuedRow, now: datetime | None) -> str:
    """One row for COPY."""
    job, run_at, expires_at = row.job, row.job.run_at, row.job.expires_at
    if job.delay is not None and now is not None:
        run_at = now + timedelta(seconds=job.delay)
    if job.expires_in is not None and now is not None:
        expires_at = now + timedelta(seconds=job.expires_in)
    values = (
        job.id,
        job.queue,
        job.kind,
        row.payload,
        job.level,
        None if run_at is None else _utc(run_at),
        None if job.max_attempts is None else str(job.max_attempts),
        row.headers,
        None if row.document is None else f"\\x{row.document}",
        None if expires_at is None else _utc(expires_at),
    )
    return copied(values)


def copied(values: Sequence[str | None]) -> str:
    """Values as one line of COPY's text format (PostgreSQL documentation, COPY, "Text Format")."""
    return "\t".join(r"\N" if value is None else value.translate(_SPECIAL) for value in values) + "\n"
