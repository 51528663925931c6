"""RedisSchedules: the `ScheduleStore` of both modes.

A queue's schedules share the slot of its jobs, so that a tick is one step. A sorted set orders them by their next
tick: a look is at the earliest, however many there are. One process of a fleet waits for it, its name in a string that
expires a moment later; all others look when that has expired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha1
from typing import Any, Final

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys, scheduled_queues
from streamworker.broker.pubsub import ServerSubscribers, Subscriber
from streamworker.broker.redis.session import CommandSession, text
from streamworker.errors import StreamworkerError
from streamworker.job import DueSchedules, ScheduleEntry, ScheduleTick

LOOK: Final = 60.0
"""Most seconds between two looks of the process that waits for the next tick."""
LATE: Final = 2.0
"""Seconds by which that process may be late before another takes its place."""
BATCH: Final = 200
"""Most schedules of one look, and of one page."""
_LOST: Final = ("schedule_changes_lost", "changed schedules are noticed within a minute")


class RedisSchedules:
    """`ScheduleStore` on Redis.

    Args:
        session: sends the commands.
        keys: the keys of a queue, by its name.
        namespace: prefix of every key.
        subscriber: hears of changes; ``None`` where none are listened for.
    """

    def __init__(
        self,
        session: CommandSession,
        keys: Callable[[str], QueueKeys],
        namespace: str,
        subscriber: Subscriber | ServerSubscribers | None = None,
    ) -> None:
        self._session, self._keys, self._subscriber = session, keys, subscriber
        self._registry = scheduled_queues(namespace)

    async def queues(self) -> list[str]:
        return [text(name) for name in await self._session.ask("ZRANGE", self._registry, 0, -1)]

    async def find(self, queue: str, name: str) -> ScheduleEntry | None:
        keys = self._keys(queue)
        score = await self._session.ask("ZSCORE", keys.schedules, name)
        found = [] if score is None else await self._entries(keys, [name], [score])
        return found[0] if found else None

    async def page(self, queue: str, after: int = 0) -> tuple[list[ScheduleEntry], int | None]:
        keys = self._keys(queue)
        flat = await self._session.ask("ZRANGE", keys.schedules, after, after + BATCH - 1, "WITHSCORES")
        found = await self._entries(keys, flat[::2], flat[1::2]) if flat else []
        return found, after + BATCH if len(flat) == 2 * BATCH else None

    async def _entries(
        self, keys: QueueKeys, names: Sequence[str | bytes], scores: Sequence[bytes]
    ) -> list[ScheduleEntry]:
        definitions = await self._session.ask("HMGET", keys.definitions, *names)
        ticked = await self._session.ask("HMGET", keys.ticked, *names)
        return [
            ScheduleEntry(
                keys.queue, text(name), definition, _seconds(score), None if last is None else int(last) / 1000
            )
            for name, score, definition, last in zip(names, scores, definitions, ticked, strict=True)
            if definition is not None
        ]

    async def put(self, new: ScheduleEntry, before: bytes, *, keep: bool) -> bool:
        keys = self._keys(new.queue)
        if new.definition:
            await self._session.ask("ZADD", self._registry, 0, new.queue)
        names = [keys.schedules, keys.definitions, keys.ticked, keys.timekeeper]
        args = [new.name, new.definition, before, _score(new.next), int(not keep), self._registry]
        return bool(await self._session.run(scripts.SCHEDULE_PUT, names, args))

    async def count(self, queue: str) -> int:
        return int(await self._session.ask("ZCARD", self._keys(queue).schedules))

    async def removed(self, queue: str, names: Sequence[str]) -> dict[str, float]:
        if not names:
            return {}
        found = await self._session.ask("HMGET", self._keys(queue).ticked, *names)
        return {
            name: -int(value) / 1000
            for name, value in zip(names, found, strict=True)
            if value is not None and value.startswith(b"-")
        }

    async def forget_removed(self, queue: str, removed: Mapping[str, float]) -> None:
        args = [part for name, at in removed.items() for part in (name, f"-{round(at * 1000)}")]
        await self._session.run(scripts.SCHEDULE_FORGET, [self._keys(queue).ticked], args)

    async def look(self, queue: str, process: str) -> DueSchedules:
        keys = self._keys(queue)
        args = [process, round(LOOK * 1000), round(LATE * 1000), BATCH]
        names = [keys.schedules, keys.definitions, keys.timekeeper]
        now, wait, *rows = await self._session.run(scripts.SCHEDULE_DUE, names, args)
        due = [
            ScheduleEntry(queue, text(name), definition, _seconds(score))
            for name, score, definition in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
        ]
        return DueSchedules(now / 1000, None if wait < 0 else wait / 1000, due)

    async def tick(self, queue: str, ticks: Sequence[ScheduleTick]) -> list[bool]:
        keys = self._keys(queue)
        args: list[Any] = [keys.shape]
        for each in ticks:
            due = _score(each.entry.next)
            digest = sha1(each.entry.definition, usedforsecurity=False).hexdigest()
            at = "" if each.at is None else round(each.at * 1000)
            following = due if each.next is None else _score(each.next)
            args += (each.entry.name, due, digest, following, each.level, each.body, at)
        names = [keys.schedules, keys.definitions, keys.ticked, keys.meta]
        answers = await self._session.run(scripts.SCHEDULE_TICK, names, args)
        for each, answer in zip(ticks, answers, strict=True):
            if isinstance(answer, bytes):
                raise StreamworkerError(f"the tick of the schedule {each.entry.name} cannot be stored: {text(answer)}")
        return [bool(answer) for answer in answers]

    async def now(self, queue: str) -> float:
        return int(await self._session.run(scripts.CLOCK, [self._keys(queue).meta], [])) / 1000

    async def listen(self, changed: Callable[[], None]) -> None:
        if self._subscriber is None:
            return
        async with self._subscriber.on([self._registry], _LOST) as subscription:
            while True:
                await subscription.get()
                changed()


def _seconds(score: bytes) -> float | None:
    """Epoch seconds of a score; ``None`` of a schedule that is paused."""
    at = float(score) / 1000
    return at if math.isfinite(at) else None


def _score(at: float | None) -> str:
    return "inf" if at is None else str(round(at * 1000))
