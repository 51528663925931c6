"""RedisHistory and RedisHistoryReader: the history of runs in Redis, where there is no ledger. The same in both modes.

A queue has one hash for the minutes of an hour, one for the hours of a day, one for the days of 30 days; each expires
when it is too old to be shown. With the bound of kinds that bounds their size: 40 kinds that always run, for sixty
days, take some 30 MB.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

import msgspec

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys, recorded_queues
from streamworker.broker.redis.session import CommandSession, OperatorSession, text
from streamworker.errors import StreamworkerError
from streamworker.telemetry.run_history import (
    BUCKETS,
    DAY,
    HOUR,
    KEPT,
    MINUTE,
    Counts,
    HistoryQuery,
    HistoryRow,
    HistorySums,
    Place,
    RunTally,
    StepCounts,
)

PAGES: Final = {MINUTE: HOUR, HOUR: DAY, DAY: 30 * DAY}
"""Seconds of a span to the seconds of a page of them."""
MOST_KINDS: Final = 100
"""Kinds of a queue; the runs of further ones are added up as one."""
OTHERS: Final = "(further kinds)"
REGISTER: Final = 3600.0
"""Seconds between two notes that a queue has a history."""

_BUCKETS: Final = struct.Struct(f"<{BUCKETS}Q")
_Packed = tuple[int, int, int, int, list[int], list[int]]
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Packed).decode


class RedisHistory:
    """`HistoryWriter` on Redis.

    Args:
        session: sends the commands.
        keys: the keys of a queue, by its name.
        namespace: prefix of every key.
    """

    def __init__(self, session: CommandSession, keys: Callable[[str], QueueKeys], namespace: str) -> None:
        self._session, self._keys = session, keys
        self._registry = recorded_queues(namespace)
        self._register_at: dict[str, float] = {}

    async def add(self, rows: Sequence[HistoryRow]) -> float:
        now = 0.0
        for queue in sorted({row.queue for row in rows}):
            now = await self._add(queue, [row for row in rows if row.queue == queue])
            if monotonic() >= self._register_at.get(queue, 0.0):
                await self._register(queue, int(now))
        return now

    async def clock(self, queue: str) -> float:
        return int(await self._session.run(scripts.CLOCK, [self._keys(queue).meta], [])) / 1000

    async def _add(self, queue: str, rows: Sequence[HistoryRow]) -> float:
        keys = self._keys(queue)
        pages: dict[tuple[int, int], int] = {}
        tallies: list[Any] = []
        for row in rows:
            tallies += (row.kind, packed(row.tally), len(PAGES))
            for span, length in PAGES.items():
                place = (span, int(row.at // length * length))
                tallies += (pages.setdefault(place, len(pages) + 1), int(row.at // span * span))
        names = [keys.history_kinds, *(keys.history(span, begin) for span, begin in pages)]
        lives = [KEPT[span] + PAGES[span] for span, _ in pages]
        args = [MOST_KINDS, OTHERS, KEPT[DAY], *lives, *tallies]
        return int(await self._session.run(scripts.HISTORY, names, args)) / 1000

    async def _register(self, queue: str, now: int) -> None:
        await self._session.ask("ZADD", self._registry, now, queue)
        await self._session.ask("ZREMRANGEBYSCORE", self._registry, 0, now - KEPT[DAY] - PAGES[DAY])
        self._register_at[queue] = monotonic() + REGISTER


class RedisHistoryReader:
    """`HistoryReader` on Redis.

    Args:
        session: sends the commands.
        keys: the keys of a queue, by its name.
        now: the server's clock.
    """

    def __init__(self, session: OperatorSession, keys: Callable[[str], QueueKeys], now: Callable[[], Any]) -> None:
        self._session, self._keys, self._now = session, keys, now

    async def now(self) -> float:
        return float(await self._now())

    async def read(self, query: HistoryQuery) -> HistorySums:
        if query.queue is not None:
            queues = [query.queue]
        else:
            queues = [text(name) for name in await self._session.ask("ZRANGE", self._registry, 0, -1)]
        places = [(queue, begin) for queue in queues for begin in self._pages(query)]
        commands = [command for queue, begin in places for command in self._command(query, queue, begin)]
        sums = _Sums()
        for (queue, begin), answer in zip(places, await self._session.gather(commands), strict=True):
            if isinstance(answer, Exception):
                raise StreamworkerError(f"the history of {queue} cannot be read: {answer}")
            _add(sums, query, queue, self._fields(query, begin, answer))
        return sums.made()

    @property
    def _registry(self) -> str:
        return recorded_queues(self._session.namespace)

    @staticmethod
    def _pages(query: HistoryQuery) -> range:
        length = PAGES[query.span]
        return range(int(query.since // length * length), int(query.until), length)

    def _command(self, query: HistoryQuery, queue: str, begin: int) -> list[list[Any]]:
        key = self._keys(queue).history(query.span, begin)
        if query.kind is None:
            return [["HGETALL", key]]
        return [["HMGET", key, *(f"{at} {query.kind}" for at in self._begins(query, begin))]]

    @staticmethod
    def _begins(query: HistoryQuery, page: int) -> range:
        return range(page, page + PAGES[query.span], query.span)

    def _fields(self, query: HistoryQuery, begin: int, answer: Any) -> Mapping[bytes, bytes]:
        if query.kind is None:
            return dict(answer)
        names = (f"{at} {query.kind}".encode() for at in self._begins(query, begin))
        return {name: value for name, value in zip(names, answer, strict=True) if value is not None}


class _Sum:
    """Sums of tallies. A histogram is one number with 64 bits a bucket: thousands of them are added in milliseconds."""

    __slots__ = ("counts", "run", "wait")

    def __init__(self) -> None:
        self.counts = (0, 0, 0, 0)
        self.run = self.wait = 0

    def add(self, counts: StepCounts, run: int, wait: int) -> None:
        one, two, three, four = self.counts
        started, done, failed, retried = counts
        self.counts = (one + started, two + done, three + failed, four + retried)
        self.run += run
        self.wait += wait

    def made(self) -> RunTally:
        return RunTally(*self.counts, _of_number(self.run), _of_number(self.wait))


class _Sums:
    """What becomes `HistorySums`."""

    def __init__(self) -> None:
        self._steps: defaultdict[float, _Sum] = defaultdict(_Sum)
        self._kinds: defaultdict[Place, _Sum] = defaultdict(_Sum)
        self._cells: defaultdict[Place, defaultdict[float, _Sum]] = defaultdict(lambda: defaultdict(_Sum))

    def add(self, at: float, place: Place, packed_: _Packed) -> None:
        started, done, failed, retried, *windows = packed_
        run, wait = map(_number, windows)
        counts = (started, done, failed, retried)
        self._steps[at].add(counts, run, wait)
        self._kinds[place].add(counts, run, wait)
        self._cells[place][at].add(counts, 0, 0)

    def made(self) -> HistorySums:
        return HistorySums(
            {at: each.made() for at, each in self._steps.items()},
            {place: each.made() for place, each in self._kinds.items()},
            {place: {at: each.counts for at, each in cells.items()} for place, cells in self._cells.items()},
        )


def _add(sums: _Sums, query: HistoryQuery, queue: str, fields: Mapping[bytes, bytes]) -> None:
    for field, value in fields.items():
        begin, _, kind = field.partition(b" ")
        at = float(begin) if begin.isdigit() else -1.0
        if query.since <= at < query.until:
            try:
                sums.add(at // query.step * query.step, (queue, text(kind)), _decode(value))
            except (msgspec.MsgspecError, ValueError, struct.error):
                continue  # it is none of ours


def packed(tally: RunTally) -> bytes:
    """A tally as the script adds it."""
    counts = (tally.started, tally.done, tally.failed, tally.retried)
    return _encode((*counts, _window(tally.run), _window(tally.wait)))


def _window(counts: Counts) -> list[int]:
    if not counts:
        return [0]
    first = min(counts)
    return [first, *(counts.get(bucket, 0) for bucket in range(first, max(counts) + 1))]


def _number(window: list[int]) -> int:
    first, *counts = window
    if not 0 <= first <= BUCKETS - len(counts):
        raise ValueError("no window of buckets")
    return int.from_bytes(struct.pack(f"<{len(counts)}Q", *counts), "little") << (64 * first)


def _of_number(number: int) -> Counts:
    buckets = _BUCKETS.unpack(number.to_bytes(_BUCKETS.size, "little"))
    return {bucket: count for bucket, count in enumerate(buckets) if count}
