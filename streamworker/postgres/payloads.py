"""`PayloadStore` in PostgreSQL: a row of ``streamworker.payloads`` each."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from streamworker.payload import STORED
from streamworker.postgres.encoding import stored_id
from streamworker.postgres.sqlstate import schema_expected, understood
from streamworker.relay.payload_sweeper import reference_in

PUT: Final = """
insert into streamworker.payloads (id, namespace, data) values ($1::text, $3::text, decode($2::text, 'base64'))"""
# Read once an hour at most is noted: each note makes the row anew.
GET: Final = """
with noted as (
  update streamworker.payloads set used_at = now() where id = $1::text and used_at < now() - interval '1 hour'
)
select data from streamworker.payloads where id = $1::text"""
DELETE: Final = "delete from streamworker.payloads where id = any($1::text[])"
IDLE: Final = """
select id from streamworker.payloads
where namespace = $1::text and used_at < now() - make_interval(secs => $2::text::double precision)
order by used_at limit 1000"""
KEEP: Final = "update streamworker.payloads set used_at = now() where id = any($1::text[])"


class PostgresStore:
    """`SweptStore` in PostgreSQL.

    Args:
        fetch: executes a statement: of the ledger's `Database`, or of a connection in the caller's transaction.
        namespace: of the jobs.
        foreign: the connection is the caller's, of any library.
    """

    def __init__(
        self, fetch: Callable[..., Awaitable[Sequence[Any]]], namespace: str, *, foreign: bool = False
    ) -> None:
        self._fetch = fetch
        self._namespace = namespace
        self._foreign = foreign

    async def put(self, id: str, data: bytes, /) -> None:  # noqa: A002
        with schema_expected("enqueue") if self._foreign else understood("storing a payload"):
            await self._fetch(PUT, id, b64encode(data).decode(), self._namespace)

    async def get(self, id: str, /) -> bytes | None:  # noqa: A002
        with understood("reading a stored payload"):
            rows = await self._fetch(GET, id)
        return bytes(rows[0][0]) if rows else None

    async def delete(self, ids: Sequence[str], /) -> None:
        with understood("deleting stored payloads"):
            await self._fetch(DELETE, list(ids))

    async def idle(self, seconds: float, /) -> list[str]:
        with understood("looking for stored payloads that no job has"):
            return [row[0] for row in await self._fetch(IDLE, self._namespace, repr(float(seconds)))]

    async def keep(self, ids: Sequence[str], /) -> None:
        with understood("keeping stored payloads"):
            await self._fetch(KEEP, list(ids))


_OPEN: Final = "'queued', 'dispatching', 'dispatched', 'running', 'retrying', 'waiting', 'blocked'"
# Of jobs that may still run, in a flow also when the flow is retried: others keep a reference to what is gone.
REFERENCES: Final = f"""
select payload::text, document from streamworker.jobs
where (status in ({_OPEN}, 'dead') or node is not null and status in ('cancelled', 'expired'))
  and (payload ? '{STORED}' or document is not null)"""  # noqa: S608 - our own text
# Of jobs that Redis knows no more. A job that died at a later hop has a later dead letter; when that is deleted,
# only a flow that is retried needs the payload.
IN_USE: Final = f"""
select job.payload::text, job.document
from unnest($1::text[], $2::bigint[]) as ended(id, hop) join streamworker.jobs as job on job.id = ended.id
where (job.status in ({_OPEN}) or job.node is not null and job.status in ('dead', 'cancelled', 'expired')
    or job.status = 'dead' and job.hop > ended.hop)
  and (job.payload ? '{STORED}' or job.document is not null)"""  # noqa: S608 - our own text


async def referring(fetch: Callable[..., Awaitable[Sequence[Any]]]) -> list[bytes]:
    """Documents of the ledger's jobs that may still run and refer to stored payloads, and some others."""
    with understood("looking for jobs with stored payloads"):
        rows = await fetch(REFERENCES)
    return _documents(rows)


async def needed(fetch: Callable[..., Awaitable[Sequence[Any]]], jobs: Mapping[str, int]) -> frozenset[str]:
    """Ids of the stored payloads of those jobs that the ledger may queue again, whatever Redis knows.

    A row with the id may be that of another queue, which keeps more than has to be kept, for a while.

    Args:
        fetch: executes a statement.
        jobs: ids of jobs that have ended in Redis, to the hops at which they did.
    """
    with understood("looking for jobs with stored payloads"):
        rows = await fetch(IN_USE, [stored_id(each) for each in jobs], list(jobs.values()))
    return frozenset(reference_in(body) for body in _documents(rows))


def _documents(rows: Sequence[Any]) -> list[bytes]:
    return [b'{"payload":%b}' % row[0].encode() if row[1] is None else bytes(row[1]) for row in rows]
