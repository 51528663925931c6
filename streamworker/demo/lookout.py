"""Reads the facts from Redis, with a plain client and the documented key names: it trusts no code of ours."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from streamworker.demo import script

_BASE: Final = f"stream:{{{script.QUEUE}}}"
STREAMS: Final = (f"{_BASE}:high", _BASE, f"{_BASE}:low")
DUE: Final = f"{_BASE}:due"
BODIES: Final = f"{_BASE}:bodies"
DEAD: Final = f"{_BASE}:dead"
GROUP: Final = "workers"
HEARTBEATS: Final = "streamworker:worker:"

_PAGE: Final = 1000


class Counts(msgspec.Struct, frozen=True):
    """How much of the queue lies where."""

    ready: int = 0
    running: int = 0
    delayed: int = 0
    dead: int = 0

    @property
    def unfinished(self) -> int:
        """Jobs that still have to run."""
        return self.ready + self.running + self.delayed


class Heartbeat(msgspec.Struct, frozen=True):
    """What a worker last said of itself."""

    worker_id: str
    pid: int
    done: int
    running: int


class Leftovers(msgspec.Struct, frozen=True):
    """What the server holds when everything is over.

    Attributes:
        streams: key to number of entries.
        pending: key to number of pending entries.
        delayed: key (due set, bodies) to number of members.
        dead: numbers of the jobs in the dead letters; ``None`` for one that cannot be read.
        consumers: names in the group.
    """

    streams: dict[str, int]
    pending: dict[str, int]
    delayed: dict[str, int]
    dead: list[int | None]
    consumers: list[str]


class Lookout:
    """One reader of facts, with a connection of its own.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._redis = Redis.from_url(url, decode_responses=True, max_connections=1)

    async def close(self) -> None:
        """Close the connection."""
        await self._redis.aclose()

    async def counts(self) -> Counts:
        """How much lies where, read in one transaction: a job on its way from one key to the next is seen once."""
        pipe: Any = self._redis.pipeline(transaction=True)  # typed as if it were no pipeline
        for stream in STREAMS:
            pipe.xlen(stream)
        pipe.zcard(DUE)
        pipe.xlen(DEAD)
        for stream in STREAMS:
            pipe.xpending(stream, GROUP)
        *lengths, delayed, dead, high, normal, low = await pipe.execute(raise_on_error=False)
        running = sum(_pending(reply) for reply in (high, normal, low))
        return Counts(max(0, sum(lengths) - running), running, delayed, dead)

    async def heartbeats(self) -> list[Heartbeat]:
        """Every worker whose heart beats."""
        keys = [key async for key in self._redis.scan_iter(match=f"{HEARTBEATS}*", count=_PAGE)]
        pipe: Any = self._redis.pipeline(transaction=False)
        for key in keys:
            pipe.hgetall(key)
        found = zip(keys, await pipe.execute() if keys else [], strict=True)
        return [
            Heartbeat(
                key.removeprefix(HEARTBEATS), int(fields["pid"]), int(fields["done"]), int(fields.get("running", 0))
            )
            for key, fields in found
            if fields.keys() >= {"pid", "done"}
        ]

    async def holders(self) -> dict[str, int]:
        """Consumer to number of its pending entries."""
        holders: dict[str, int] = {}
        for stream in STREAMS:
            for name, pending in await self._consumers(stream):
                holders[name] = holders.get(name, 0) + pending
        return holders

    async def held_by(self, consumer: str) -> list[tuple[str, str]]:
        """(stream, entry id) of everything pending under a consumer's name."""
        found: list[tuple[str, str]] = []
        for stream in STREAMS:
            start = "-"
            while True:
                page: list[dict[str, Any]] = await self._redis.xpending_range(
                    stream, GROUP, min=start, max="+", count=_PAGE, consumername=consumer
                )
                found += [(stream, entry["message_id"]) for entry in page]
                if len(page) < _PAGE:
                    break
                start = f"({page[-1]['message_id']}"
        return found

    async def job_at(self, stream: str, entry: str) -> int | None:
        """The number of the job in an entry; ``None`` if it is gone or cannot be read."""
        entries: Any = await self._redis.xrange(stream, min=entry, max=entry)
        return number_in(entries[0][1]) if entries else None

    async def leftovers(self) -> Leftovers:
        """Everything that is there."""
        return Leftovers(
            streams={stream: await self._redis.xlen(stream) for stream in STREAMS},
            pending={stream: _pending(await self._redis.xpending(stream, GROUP)) for stream in STREAMS},
            delayed={DUE: await self._redis.zcard(DUE), BODIES: await self._redis.hlen(BODIES)},
            dead=await self._dead_letters(),
            consumers=sorted(await self.holders()),
        )

    async def _dead_letters(self) -> list[int | None]:
        numbers: list[int | None] = []
        start = "-"
        while True:
            page: Any = await self._redis.xrange(DEAD, min=start, count=_PAGE)
            numbers += [number_in(fields) for _, fields in page]
            if len(page) < _PAGE:
                return numbers
            start = f"({page[-1][0]}"

    async def _consumers(self, stream: str) -> list[tuple[str, int]]:
        try:
            consumers: list[dict[str, Any]] = await self._redis.xinfo_consumers(stream, GROUP)
        except redis_errors.ResponseError:
            return []  # no worker made the group yet
        return [(info["name"], info["pending"]) for info in consumers]


def number_in(fields: dict[str, str]) -> int | None:
    """The job's number, from the fields of an entry; ``None`` if it cannot be read."""
    try:
        number = json.loads(fields["job"])["payload"]["number"]
    except (KeyError, TypeError, ValueError):
        return None
    return number if isinstance(number, int) else None


def _pending(reply: Any) -> int:
    """The count of an XPENDING summary; before any worker made the group there is only an error."""
    return int(reply["pending"]) if isinstance(reply, dict) else 0
