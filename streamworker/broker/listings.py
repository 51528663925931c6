"""What lies on the server, read in pages of bounded cost. Nothing here consumes or changes anything."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, Final

from redis import exceptions as redis_errors
from redis.asyncio import Redis

from streamworker import codec
from streamworker.broker import Place, Waiting, WorkerInfo, scripts
from streamworker.broker.client import Address, understood
from streamworker.broker.intake import UNKNOWN_EPOCH
from streamworker.broker.keys import WORKER_KEY, QueueKeys
from streamworker.errors import InvalidJob, Unreachable
from streamworker.job import LEVELS, Depth, Level
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

PAGE: Final = 100
"""Entries of one page: documents may be large."""
SCAN: Final = 1000
"""Keys one step over the key space looks at."""


class Desk:
    """A client, and whose keys it reads; errors come out as ours."""

    def __init__(self, client: Redis, address: Address, group: str, namespace: str) -> None:
        self.client: Final = client
        self.address: Final = address
        self.group: Final = group
        self.namespace: Final = namespace

    async def ask(self, *command: Any) -> Any:
        """Send one command."""
        with understood(self.address):
            return await self.client.execute_command(*command)

    async def run(self, script: scripts.Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script."""
        with understood(self.address):
            return await script(self.client, keys, args)

    async def gather(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send commands in one round trip; an error of the server's takes the place of its answer."""
        if not commands:
            return []
        with understood(self.address):
            async with self.client.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                answers: list[Any] = await pipe.execute(raise_on_error=False)
                return answers

    async def scan(self, pattern: str, *kind: str) -> AsyncIterator[str]:
        """Names of keys, of one type if it is named. It walks the whole key space: for people's commands alone."""
        types = [word for name in kind for word in ("TYPE", name)]
        desks, away = await self.each(), 0
        for desk in desks:
            cursor: Any = 0
            while True:
                try:
                    cursor, names = await desk.ask("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN, *types)
                except Unreachable as error:  # the other nodes of a cluster are listed all the same
                    away += 1
                    if away == len(desks):
                        raise
                    log.warning("node_away", error=str(error), hint="what this node holds is missing here")
                    break
                for name in names:
                    yield text(name)
                if not int(cursor):
                    break

    async def each(self) -> list[Desk]:
        """One desk per server that holds keys: this one alone, but in a cluster."""
        with understood(self.address):
            clients = await self.address.masters(self.client)
        return [Desk(client, self.address, self.group, self.namespace) for client in clients]


def text(value: Any) -> str:
    """Bytes as text, whatever they are."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


async def derived_from(desk: Desk, keys: QueueKeys, level: Level) -> bytes:
    """What ids of a stream's entries are derived from; `UNKNOWN_EPOCH` if nobody has said so yet."""
    field = keys.id_field(level)
    # Its own hash, the copy, and what releases took that had neither.
    for key, name in ((keys.ids, field), (keys.meta, field), (keys.meta, "epoch")):
        found: bytes | None = await desk.ask("HGET", key, name)
        if found:
            return found
    return UNKNOWN_EPOCH


async def queues(desk: Desk) -> list[str]:
    """Names of queues any key exists of, sorted."""
    shape = re.compile(
        rf"{re.escape(desk.namespace)}stream:\{{([A-Za-z0-9._:-]{{1,100}})\}}(?::(?:high|low|due|dead|meta))?"
    )
    found = set()
    async for name in desk.scan(f"{desk.namespace}stream:{{*}}*"):
        match = shape.fullmatch(name)
        if match is not None:
            found.add(match[1])
    return sorted(found)


async def depth(desk: Desk, keys: QueueKeys) -> Depth:
    """How much lies in one queue."""
    names = [*keys.streams, keys.due, keys.dead, keys.meta]
    reply = await desk.run(scripts.DEPTH, names, [desk.group])
    entries, pending_, delayed_, dead_, oldest, paused, inactive = reply
    age = oldest / 1000 if oldest >= 0 else None
    held = bool(paused or inactive)
    return Depth(keys.queue, max(0, entries - pending_), pending_, delayed_, dead_, age, held, bool(inactive))


async def workers(desk: Desk, keys: Sequence[QueueKeys], *, everywhere: bool) -> list[WorkerInfo]:
    """Everyone with a name in a group of these queues or, ``everywhere``, with a heartbeat; the living first."""
    places = [(each.queue, place) for each in keys for place in each.streams]
    consumers = await desk.gather([("XINFO CONSUMERS", place, desk.group) for _, place in places])
    held: Counter[str] = Counter()
    homes: dict[str, list[str]] = {}
    for (queue, _), answer in zip(places, consumers, strict=True):
        if isinstance(answer, redis_errors.RedisError):
            continue  # no such stream or group yet
        for info in answer:
            name = text(info["name"])
            held[name] += info["pending"]
            if queue not in homes.setdefault(name, []):
                homes[name].append(queue)
    beats = await reports(desk, None if everywhere else homes)
    return infos(beats, homes, held, {each.queue for each in keys})


async def reports(desk: Desk, names: Collection[str] | None = None) -> dict[str, dict[str, str]]:
    """The heartbeats, by worker id: of the workers named, else all there are, for which the key space is walked."""
    prefix = f"{desk.namespace}{WORKER_KEY}"
    beating = [name async for name in desk.scan(f"{prefix}*")] if names is None else [prefix + name for name in names]
    found: dict[str, dict[str, str]] = {}
    for start in range(0, len(beating), PAGE):
        page = beating[start : start + PAGE]
        for name, fields in zip(page, await desk.gather([("HGETALL", name) for name in page]), strict=True):
            if isinstance(fields, dict) and fields:
                found[name.removeprefix(prefix)] = {text(key): text(value) for key, value in fields.items()}
    return found


def infos(
    beats: Mapping[str, dict[str, str]],
    homes: Mapping[str, list[str]],
    held: Mapping[str, int],
    wanted: Collection[str],
) -> list[WorkerInfo]:
    """Workers, the living first.

    Args:
        beats: heartbeats, by worker id.
        homes: queues in which a worker's name lies.
        held: how much it holds there.
        wanted: of these queues.
    """
    found = []
    for name in sorted(beats.keys() | homes.keys(), key=lambda name: (name not in beats, name)):
        report = beats.get(name, {})
        own = [queue for queue in report.get("queues", "").split(",") if queue] or homes.get(name, [])
        if name in homes or not set(wanted).isdisjoint(own):
            found.append(WorkerInfo(name, name in beats, held.get(name, 0), own, report))
    return found


async def waiting(desk: Desk, keys: Sequence[QueueKeys], limit: int) -> list[Waiting]:
    """Kinds in a sample of about ``limit`` jobs, shared evenly between queues and their keys."""
    counts: Counter[tuple[str, Place, str | None]] = Counter()
    share = max(10, limit // max(1, 5 * len(keys)))
    for each in keys:
        ready = [each.peeking(level, share) for level in LEVELS]
        *levels, dead_ = await _readable(desk, [*ready, ("XREVRANGE", each.dead, "+", "-", "COUNT", share)])
        (members,) = await _readable(desk, [("ZRANGE", each.due, 0, share - 1)])
        (parked,) = await _readable(desk, [("HMGET", each.bodies, *members)]) if members else ([],)
        places: tuple[tuple[Place, list[bytes | None]], ...] = (
            ("ready", [_document(entry) for entries in levels for entry in entries]),
            ("delayed", parked),
            ("dead", [_document(entry) for entry in dead_]),
        )
        for place, bodies in places:
            counts.update((each.queue, place, kind) for kind in _kinds(bodies))
    return [Waiting(queue, place, kind, count) for (queue, place, kind), count in sorted(counts.items(), key=str)]


def _document(entry: Any) -> bytes | None:
    """The bytes of a stream's entry or of a list's element."""
    if isinstance(entry, bytes):
        return entry
    body: bytes | None = (entry[1] or {}).get(b"job")
    return body


async def _readable(desk: Desk, commands: Sequence[Sequence[Any]]) -> list[Any]:
    """Answers in order; nothing where a key is of the wrong type, which `examine` finds."""
    return [[] if isinstance(answer, Exception) else answer for answer in await desk.gather(commands)]


def _kinds(bodies: Sequence[bytes | None]) -> list[str | None]:
    """The kinds of those that can be read; the others are nobody's, with or without a handler."""
    found = []
    for body in bodies:
        try:
            found.append(codec.read(body or b"").kind or None)
        except InvalidJob:
            continue
    return found
