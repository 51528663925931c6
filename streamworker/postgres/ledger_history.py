"""LedgerHistory: the history of runs in PostgreSQL.

A histogram is one number: each bucket has twelve decimal digits of it, the shortest times the lowest. So PostgreSQL
adds the tallies of workers, and of many spans, as it adds numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from streamworker.errors import ConfigurationError
from streamworker.postgres.enqueue import NOW
from streamworker.postgres.pool import Database
from streamworker.postgres.sqlstate import understood
from streamworker.telemetry.run_history import (
    DAY,
    HOUR,
    KEPT,
    MINUTE,
    Counts,
    HistoryQuery,
    HistoryRow,
    HistorySums,
    RunTally,
)

DIGITS: Final = 12
"""Decimal digits of a bucket."""

THERE: Final = "select to_regclass('streamworker.history') is not null as there"

# In the order of the key, so that two workers cannot wait for each other. A span is summed first: a statement may not
# change a row twice.
ADD: Final = """
with added as (
  insert into streamworker.history as known
    (span, at, queue_name, kind, started, done, failed, retried, run, wait)
  select span, to_timestamp(floor(item.at / span) * span) as begin, item.queue_name, item.kind,
    sum(item.started)::bigint, sum(item.done)::bigint, sum(item.failed)::bigint, sum(item.retried)::bigint,
    sum(item.run::numeric), sum(item.wait::numeric)
  from unnest($1::float8[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
      $8::text[], $9::text[]) as item (at, queue_name, kind, started, done, failed, retried, run, wait)
    cross join unnest($10::integer[]) as span
  group by 1, 2, 3, 4 order by 1, 2, 3, 4
  on conflict (span, at, queue_name, kind) do update set
    started = known.started + excluded.started, done = known.done + excluded.done,
    failed = known.failed + excluded.failed, retried = known.retried + excluded.retried,
    run = known.run + excluded.run, wait = known.wait + excluded.wait
)
select extract(epoch from clock_timestamp())::float8"""

_COUNTS: Final = "sum(started)::bigint, sum(done)::bigint, sum(failed)::bigint, sum(retried)::bigint"
_TIMES: Final = f"{_COUNTS}, sum(run)::text, sum(wait)::text"


def read_statement(query: HistoryQuery) -> str:
    """The statement of a query. The index finds a queue and a kind: the rows of all others are not read."""
    queue = "$5::text is null" if query.queue is None else "queue_name = $5"
    kind = "$6::text is null" if query.kind is None else "kind = $6"
    kinds = f"""
union all
select null, queue_name, kind, {_TIMES} from part group by queue_name, kind"""  # noqa: S608 - our own text
    return f"""
with part as materialized (
  select floor(extract(epoch from at)::float8 / $4::integer) * $4::integer as at, queue_name, kind, started, done,
    failed, retried, run, wait
  from streamworker.history
  where span = $1 and at >= to_timestamp($2) and at < to_timestamp($3) and {queue} and {kind}
)
select at, null, null, {_TIMES} from part group by at{kinds if query.kinds else ""}
union all
select at, queue_name, kind, {_COUNTS}, null, null from part group by at, queue_name, kind"""  # noqa: S608 - our own text


# One worker at a time, the first that takes the advisory lock; for the others the statement deletes nothing.
PRUNE: Final = f"""
with turn as materialized (select pg_try_advisory_xact_lock(hashtext('streamworker.prune')) as ours)
delete from streamworker.history where (select ours from turn) and (
  {" or ".join(f"(span = {span} and at < now() - interval '{kept} seconds')" for span, kept in KEPT.items())}
)"""  # noqa: S608 - numbers of ours


class LedgerHistory:
    """`HistoryWriter` and `HistoryReader` on PostgreSQL.

    Args:
        database: of the ledger.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._there = False

    async def add(self, rows: Sequence[HistoryRow]) -> float:
        await self._require()
        columns = zip(
            *(
                (row.at, row.queue, row.kind, row.tally.started, row.tally.done, row.tally.failed, row.tally.retried,
                 packed(row.tally.run), packed(row.tally.wait))
                for row in rows
            ),
            strict=True,
        )  # fmt: skip
        with understood("recording the history"):
            found = await self._database.fetch(ADD, *map(list, columns), [MINUTE, HOUR, DAY])
        return float(found[0][0])

    async def read(self, query: HistoryQuery) -> HistorySums:
        await self._require()
        with understood("reading the history"):
            rows = await self._database.fetch(
                read_statement(query), query.span, query.since, query.until, query.step, query.queue, query.kind
            )
        sums = HistorySums()
        for at, queue, kind, started, done, failed, retried, run, wait in rows:
            if run is None:
                sums.counts.setdefault((queue, kind), {})[at] = (started, done, failed, retried)
                continue
            tally = RunTally(started, done, failed, retried, unpacked(run), unpacked(wait))
            if queue is None:
                sums.steps[at] = tally
            else:
                sums.kinds[queue, kind] = tally
        return sums

    async def now(self) -> float:
        with understood("asking for the time"):
            return float((await self._database.fetch(NOW))[0][0])

    async def clock(self, queue: str) -> float:
        del queue  # all of them have one server
        return await self.now()

    async def prune(self) -> None:
        """Delete what is too old."""
        if await self._is_there():
            await self._database.fetch(PRUNE)

    async def _is_there(self) -> bool:
        if not self._there:
            with understood("looking for the history"):
                self._there = bool((await self._database.fetch(THERE))[0]["there"])
        return self._there

    async def _require(self) -> None:
        if not await self._is_there():
            raise ConfigurationError("the ledger has no history yet: run `streamworker migrate up`")


def packed(counts: Mapping[int, int]) -> str:
    """A histogram as the digits of a number."""
    if not counts:
        return "0"
    return "".join(f"{counts.get(bucket, 0):0{DIGITS}d}" for bucket in range(max(counts), -1, -1))


def unpacked(number: str) -> Counts:
    """The histogram of the digits of a number."""
    digits = number.rstrip("0")
    zeros = len(number) - len(digits)
    first = zeros // DIGITS
    digits = number[: len(number) - first * DIGITS]
    found = {}
    for bucket, end in enumerate(range(len(digits), 0, -DIGITS), first):
        count = int(digits[max(0, end - DIGITS) : end])
        if count:
            found[bucket] = count
    return found
