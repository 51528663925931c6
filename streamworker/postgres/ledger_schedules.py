"""LedgerSchedules: the durable record in PostgreSQL of schedules that are kept as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streamworker.postgres.pool import Database
from streamworker.postgres.sqlstate import understood
from streamworker.relay import KeptSchedule, ScheduleLook

THERE: Final = "select to_regclass('streamworker.schedules') is not null as there"
# In the order of the key, so that two processes cannot wait for each other. The last change counts.
KEEP: Final = """
insert into streamworker.schedules as known (queue_name, name, definition, changed_at)
select * from unnest($1::text[], $2::text[], $3::bytea[], $4::float8[]) as item (queue_name, name, definition, at)
order by queue_name, name
on conflict (queue_name, name) do update set definition = excluded.definition, changed_at = excluded.changed_at
where known.changed_at <= excluded.changed_at"""
OF_QUEUE: Final = "select name, definition, changed_at from streamworker.schedules where queue_name = $1"
TURN: Final = """
insert into streamworker.schedule_looks as look (at, whole_at) values (now(), now())
on conflict (one) do update set at = excluded.at,
  whole_at = case when look.whole_at < excluded.at - make_interval(secs => $2) then excluded.at else look.whole_at end
where look.at < excluded.at - make_interval(secs => $1)
returning whole_at = at as whole"""
COUNTS: Final = """
select queue_name, count(*) from streamworker.schedules where definition is not null group by queue_name"""
PRUNE: Final = """
delete from streamworker.schedules
where definition is null and changed_at < extract(epoch from clock_timestamp() - interval '30 days')"""


class LedgerSchedules:
    """`ScheduleLedger` on PostgreSQL.

    Args:
        database: of the ledger.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._there = False

    async def keep(self, schedules: Sequence[KeptSchedule]) -> bool:
        if not await self._is_there():
            return False
        columns = zip(*((each.queue, each.name, each.definition, each.changed_at) for each in schedules), strict=True)
        with understood("keeping schedules"):
            await self._database.fetch(KEEP, *map(list, columns))
        return True

    async def of(self, queue: str) -> dict[str, KeptSchedule]:
        with understood("reading the schedules"):
            rows = await self._database.fetch(OF_QUEUE, queue)
        return {name: KeptSchedule(queue, name, definition, at) for name, definition, at in rows}

    async def look(self, every: float, whole: float) -> ScheduleLook | None:
        if not await self._is_there():
            return None
        with understood("looking at the schedules"):
            turn = await self._database.fetch(TURN, every, whole)
            if not turn:
                return None
            await self._database.fetch(PRUNE)
            rows = await self._database.fetch(COUNTS)
        return ScheduleLook({queue: int(count) for queue, count in rows}, bool(turn[0]["whole"]))

    async def _is_there(self) -> bool:
        if not self._there:
            with understood("looking for the schedules"):
                self._there = bool((await self._database.fetch(THERE))[0]["there"])
        return self._there
