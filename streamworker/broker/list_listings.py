"""What lies on the server in list mode. Nothing here consumes or changes anything."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

from streamworker import codec
from streamworker.broker import PendingEntry, WorkerInfo, listings, scripts
from streamworker.broker.keys import ListKeys, lease_of, queue_of_list, unwrapped
from streamworker.broker.listings import PAGE
from streamworker.broker.redis.session import OperatorSession
from streamworker.errors import InvalidJob
from streamworker.job import LEVELS, Claim, Depth

_CLAIMED: Final = re.compile(r"queue:([A-Za-z0-9._:-]{1,100}):claimed:.+", re.DOTALL)


async def queues(desk: OperatorSession) -> list[str]:
    """Names of queues any key exists of, sorted; lists that look like a queue's are taken for one."""
    found = set(await listings.queues(desk))
    async for name in desk.scan("queue:*", "list"):
        queue = queue_of_list(name)
        if queue is not None:
            found.add(queue)
    async for name in desk.scan(f"{desk.namespace}queue:*:claimed:*", "list"):
        match = _CLAIMED.fullmatch(name.removeprefix(desk.namespace))
        if match is not None:
            found.add(match[1])
    return sorted(found)


async def depth(run: Callable[..., Awaitable[Any]], keys: ListKeys) -> Depth:
    """How much lies in one queue; ``run`` runs a script."""
    names = [*keys.lists, keys.due, keys.dead, keys.meta, keys.leases]
    ready, claimed, delayed, dead, paused, inactive, *oldest = await run(scripts.LIST_DEPTH, names, [])
    ages = [time.time() - made for element in oldest if (made := codec.made_at(element)) is not None]
    age = max(0.0, *ages) if ages else None
    return Depth(keys.queue, ready, claimed, delayed, dead, age, bool(paused or inactive), bool(inactive))


async def held(desk: OperatorSession, keys: ListKeys, worker: str) -> AsyncIterator[Claim]:
    """What a worker holds of one queue, in the order in which it was taken."""
    start = 0
    while True:
        page = await desk.ask("LRANGE", keys.claimed(worker), start, start + PAGE - 1)
        for wrapper in page:
            claim = unwrapped(keys, wrapper)
            if claim is not None:
                yield claim
        if len(page) < PAGE:
            return
        start += PAGE


async def holders(desk: OperatorSession, keys: ListKeys) -> set[str]:
    """Workers that have something claimed of a queue."""
    return {worker for _, _, worker in await _leases(desk, keys)}


async def pending(desk: OperatorSession, keys: ListKeys, consumer: str | None) -> list[PendingEntry]:
    """What is claimed of one queue, level by level, the oldest first."""
    now = await desk.ask("TIME")
    renewed = await _leases(desk, keys)
    holders = {worker.encode() for _, _, worker in renewed if consumer in (None, worker)}
    alive = await listings.alive(desk, holders)
    found = []
    for holder in holders:
        worker, living = holder.decode(), holder in alive
        async for claim in held(desk, keys, worker):
            at = renewed.get((claim.entry, claim.count, worker))
            idle = 0 if at is None else max(0, int(now[0]) * 1000 + int(now[1]) // 1000 - int(at))
            place, named = (keys.queue, claim.level, claim.entry.decode()), _named(claim)
            found.append(PendingEntry(*place, *named, worker, idle, claim.count, living))
    return sorted(found, key=lambda entry: (LEVELS.index(entry.level), entry.entry_id))


async def workers(desk: OperatorSession, queues: Sequence[ListKeys], *, everywhere: bool) -> list[WorkerInfo]:
    """Everyone with something claimed of these queues or, ``everywhere``, with a heartbeat; the living first."""
    count: Counter[str] = Counter()
    homes: dict[str, list[str]] = {}
    for keys in queues:
        for _, _, worker in await _leases(desk, keys):
            count[worker] += 1
            if keys.queue not in homes.setdefault(worker, []):
                homes[worker].append(keys.queue)
    beats = await listings.reports(desk, None if everywhere else homes)
    return listings.infos(beats, homes, count, {keys.queue for keys in queues})


async def _leases(desk: OperatorSession, keys: ListKeys) -> dict[tuple[bytes, int, str], float]:
    """(id, delivery count, worker) of what is claimed of a queue: the ms at which it was renewed."""
    flat = await desk.ask("ZRANGE", keys.leases, 0, -1, "WITHSCORES")
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {lease: float(score) for member, score in pairs if (lease := lease_of(member)) is not None}


def _named(claim: Claim) -> tuple[str | None, str | None]:
    """(id, kind) as workers call the job."""
    try:
        reading = codec.read(claim.body or b"")
    except InvalidJob:
        return None, None
    return codec.job_id(reading, claim), reading.kind or None
