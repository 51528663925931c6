"""RedisHistory and RedisHistoryReader: the history of runs in Redis, where there is no ledger. The same in both modes.

A queue has one hash for the minutes of an hour, one for the hours of a day, one for the days of 30 days; each expires
when it is too old to be shown. With the bound of kinds that bounds their size: 40 kinds that always run, for sixty
days, take some 30 MB.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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

_LANES: Final = [struct.Struct(f"<{length}Q") for length in range(BUCKETS + 2)]
_PACKS: Final = [lanes.pack for lanes in _LANES]
_UNPACKS: Final = [lanes.unpack for lanes in _LANES]
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
        sums = _Sums(query)
        for (queue, begin), answer in zip(places, await self._session.gather(commands), strict=True):
            if isinstance(answer, Exception):
                raise StreamworkerError(f"the history of {queue} cannot be read: {answer}")
            sums.add(queue, self._fields(query, begin, answer))
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


class _Sums:
    """Adds up `HistorySums`. A histogram is one number with 64 bits a bucket: thousands are added in milliseconds."""

    def __init__(self, query: HistoryQuery) -> None:
        self._query = query
        self._steps: defaultdict[float, list[int]] = defaultdict(lambda: [0, 0])
        self._kinds: dict[tuple[str, bytes], tuple[list[int], dict[float, StepCounts]]] = {}

    def add(self, queue: str, fields: Mapping[bytes, bytes]) -> None:
        """Add the fields of a page. They are thousands: what can be done once for a kind or a step is not done here."""
        since, until, step, each_kind = self._query.since, self._query.until, self._query.step, self._query.kinds
        kinds, steps = self._kinds, self._steps
        for field, value in fields.items():
            begin, _, kind = field.partition(b" ")
            if not begin.isdigit() or not since <= (at := int(begin)) < until:
                continue
            try:
                started, done, failed, retried, runs, waits = _decode(value)
                run, wait = _number(runs), _number(waits)
            except (msgspec.MsgspecError, ValueError, struct.error):
                continue  # it is none of ours
            at -= at % step
            if (found := kinds.get((queue, kind))) is None:
                found = kinds[queue, kind] = [0, 0], {}
            times, counts = found
            if (before := counts.get(at)) is None:
                counts[at] = started, done, failed, retried
            else:
                counts[at] = before[0] + started, before[1] + done, before[2] + failed, before[3] + retried
            if each_kind:
                times[0] += run
                times[1] += wait
            times = steps[at]
            times[0] += run
            times[1] += wait

    def made(self) -> HistorySums:
        sums = HistorySums()
        by_step: defaultdict[float, list[StepCounts]] = defaultdict(list)
        for (queue, name), (times, counts) in self._kinds.items():
            place = queue, text(name)
            sums.counts[place] = counts
            if self._query.kinds:
                sums.kinds[place] = _tally(counts.values(), times)
            for at, each in counts.items():
                by_step[at].append(each)
        sums.steps = {at: _tally(by_step[at], times) for at, times in self._steps.items()}
        return sums


def _tally(counts: Iterable[StepCounts], times: Sequence[int]) -> RunTally:
    started, done, failed, retried = map(sum, zip(*counts, strict=True))
    run, wait = map(_of_number, times)
    return RunTally(started, done, failed, retried, run, wait)


def packed(tally: RunTally) -> bytes:
    """A tally as the script adds it."""
    counts = (tally.started, tally.done, tally.failed, tally.retried)
    return _encode((*counts, _window(tally.run), _window(tally.wait)))


def _window(counts: Counts) -> list[int]:
    if not counts:
        return [0]
    first = min(counts)
    return [first, *(counts.get(bucket, 0) for bucket in range(first, max(counts) + 1))]


def _number(window: Sequence[int]) -> int:
    first, length = (window[0], len(window)) if window else (-1, 0)
    if not 0 <= first <= BUCKETS + 1 - length:
        raise ValueError("no window of buckets")
    # It is packed whole, and the number of its first bucket dropped after that: cheaper than another list.
    return int.from_bytes(_PACKS[length](*window), "little") >> 64 << (64 * first)


def _of_number(number: int) -> Counts:
    if not number:
        return {}
    first = ((number & -number).bit_length() - 1) // 64
    number >>= 64 * first
    length = (number.bit_length() + 63) // 64
    buckets = _UNPACKS[length](number.to_bytes(8 * length, "little"))
    return {bucket: count for bucket, count in enumerate(buckets, first) if count}
