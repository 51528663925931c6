"""Listings of queues, jobs and workers, read in pages of bounded cost. Nothing here consumes or changes anything."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
from redis import exceptions as redis_errors

from streamworker import codec
from streamworker.broker import KindCount, Page, PendingEntry, Place, StoredJob, WorkerInfo, scripts
from streamworker.broker.keys import (
    ELSEWHERE,
    UNKNOWN_EPOCH,
    WORKER_KEY,
    ListKeys,
    QueueKeys,
    document,
    lease_of,
    of_due_member,
    partitioned_queues,
    queue_of_home,
    queue_of_list,
    unwrapped,
    worker_key,
)
from streamworker.broker.redis.reactions import understood
from streamworker.broker.redis.session import OperatorSession, text
from streamworker.encryption import USES
from streamworker.errors import InvalidJob, StreamworkerError, UsageError
from streamworker.job import LEVELS, SOON, Claim, Depth, KeyUse, Level, StoredDocument
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

PAGE: Final = 100
"""Entries of one page: documents may be large."""


async def derived_from(session: OperatorSession, keys: QueueKeys, level: Level) -> bytes:
    """The value that ids of a stream's entries are derived from; `UNKNOWN_EPOCH` if it is not stored yet."""
    field = keys.id_field(level)
    # Its own hash, the copy, and the value of releases that had neither.
    for key, name in ((keys.ids, field), (keys.meta, field), (keys.meta, "epoch")):
        found: bytes | None = await session.ask("HGET", key, name)
        if found:
            return found
    return UNKNOWN_EPOCH


async def queues(session: OperatorSession) -> list[str]:
    """Names of queues that have any key, sorted."""
    return sorted({queue_of_home(home) for home in await homes(session)})


async def homes(session: OperatorSession) -> list[str]:
    """Names of queues and of partitions that have any key, sorted."""
    shape = re.compile(
        rf"{re.escape(session.namespace)}stream:\{{([A-Za-z0-9._:-]{{1,100}}(?:#[0-9]{{1,4}})?)\}}"
        r"(?::(?:high|low|due|dead|meta|payloads))?"
    )
    found = set()
    async for name in session.scan(f"{session.namespace}stream:{{*}}*"):
        match = shape.fullmatch(name)
        if match is not None:
            found.add(match[1])
    return sorted(found)


async def partitioned(session: OperatorSession) -> dict[str, tuple[int, bool]]:
    """Queues with partitions: their number, and whether their servers are given by URL; as their processes say."""
    try:
        found = await session.ask("HGETALL", partitioned_queues(session.namespace))
    except StreamworkerError:  # no right to
        return {}
    numbers = {text(name): (said.removesuffix(ELSEWHERE), said.endswith(ELSEWHERE)) for name, said in found.items()}
    return {name: (int(number), by_url) for name, (number, by_url) in numbers.items() if number.isdigit()}


async def depth(run: Callable[..., Awaitable[Any]], keys: QueueKeys, group: str) -> Depth:
    """Depth of one queue of streams; ``run`` runs a script."""
    names = [*keys.streams, keys.due, keys.dead, keys.meta]
    reply = await run(scripts.DEPTH, names, [group, round(SOON * 1000)])
    entries, pending_, delayed_, dead_, oldest, paused, inactive, waiting_, tenants, halted, soon = reply
    age = oldest / 1000 if oldest >= 0 else None
    held = bool(paused or inactive)
    ready = max(0, entries - pending_) + tenants
    return Depth(keys.queue, ready, pending_, delayed_, dead_, age, held, bool(inactive), waiting_, halted, soon)


def folded(depths: Iterable[Depth]) -> list[Depth]:
    """Depths with those of a queue's partitions as one."""
    found: dict[str, Depth] = {}
    for each in depths:
        name = queue_of_home(each.queue)
        known = found.get(name)
        found[name] = msgspec.structs.replace(each, queue=name) if known is None else _both(known, each)
    return list(found.values())


def _both(one: Depth, other: Depth) -> Depth:
    ages = [age for age in (one.oldest_age, other.oldest_age) if age is not None]
    return Depth(
        one.queue,
        one.ready + other.ready,
        one.running + other.running,
        one.delayed + other.delayed,
        one.dead + other.dead,
        max(ages, default=None),
        one.paused or other.paused,
        one.inactive or other.inactive,
        one.waiting + other.waiting,
        one.halted + other.halted,
        one.soon + other.soon,
    )


async def workers(session: OperatorSession, keys: Sequence[QueueKeys], *, everywhere: bool) -> list[WorkerInfo]:
    """Consumers of these queues' groups and, with ``everywhere``, workers with a heartbeat; live ones first."""
    places = [(each.queue, place) for each in keys for place in each.streams]
    consumers = await session.gather([("XINFO CONSUMERS", place, session.group) for _, place in places])
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
    beats = await reports(session, None if everywhere else homes)
    return infos(beats, homes, held, {each.queue for each in keys})


async def reports(session: OperatorSession, names: Collection[str] | None = None) -> dict[str, dict[str, str]]:
    """Heartbeats by worker id: of the workers named, else of all, for which the key space is walked."""
    prefix = f"{session.namespace}{WORKER_KEY}"
    beating = (
        [name async for name in session.scan(f"{prefix}*")] if names is None else [prefix + name for name in names]
    )
    found: dict[str, dict[str, str]] = {}
    for start in range(0, len(beating), PAGE):
        page = beating[start : start + PAGE]
        for name, fields in zip(page, await session.gather([("HGETALL", name) for name in page]), strict=True):
            if isinstance(fields, dict) and fields:
                found[name.removeprefix(prefix)] = {text(key): text(value) for key, value in fields.items()}
    return found


def infos(
    beats: Mapping[str, dict[str, str]],
    homes: Mapping[str, list[str]],
    held: Mapping[str, int],
    wanted: Collection[str],
) -> list[WorkerInfo]:
    """Workers, live ones first.

    Args:
        beats: heartbeats, by worker id.
        homes: queues in which a worker is a consumer.
        held: number of its claims there.
        wanted: only workers of these queues.
    """
    found = []
    for name in sorted(beats.keys() | homes.keys(), key=lambda name: (name not in beats, name)):
        report = beats.get(name, {})
        own = [queue for queue in report.get("queues", "").split(",") if queue] or homes.get(name, [])
        if name in homes or not set(wanted).isdisjoint(own):
            found.append(WorkerInfo(name, name in beats, held.get(name, 0), own, report))
    return found


async def waiting(session: OperatorSession, keys: Sequence[QueueKeys], limit: int) -> list[KindCount]:
    """Kinds in a sample of about ``limit`` jobs, shared evenly between queues and their keys."""
    counts: Counter[tuple[str, Place, str | None]] = Counter()
    share = max(10, limit // max(1, 5 * len(keys)))
    for each in keys:
        ready = [each.peeking(level, share) for level in LEVELS]
        *levels, dead_ = await _readable(session, [*ready, ("XREVRANGE", each.dead, "+", "-", "COUNT", share)])
        (members,) = await _readable(session, [("ZRANGE", each.due, 0, share - 1)])
        (parked,) = await _readable(session, [("HMGET", each.bodies, *members)]) if members else ([],)
        places: tuple[tuple[Place, list[bytes | None]], ...] = (
            ("ready", [_document(entry) for entries in levels for entry in entries]),
            ("delayed", parked),
            ("dead", [_document(entry) for entry in dead_]),
        )
        for place, bodies in places:
            counts.update((each.queue, place, kind) for kind in _kinds(bodies))
    return [KindCount(queue, place, kind, count) for (queue, place, kind), count in sorted(counts.items(), key=str)]


def _document(entry: Any) -> bytes | None:
    """The bytes of a stream's entry or of a list's element."""
    if isinstance(entry, bytes):
        return entry
    body: bytes | None = (entry[1] or {}).get(b"job")
    return body


async def _readable(session: OperatorSession, commands: Sequence[Sequence[Any]]) -> list[Any]:
    """Answers in order; empty where a key is of the wrong type, which `examine` finds."""
    return [[] if isinstance(answer, Exception) else answer for answer in await session.gather(commands)]


def _kinds(bodies: Sequence[bytes | None]) -> list[str | None]:
    """Kinds of the documents that can be read; the others have none, with or without a handler."""
    found = []
    for body in bodies:
        try:
            found.append(codec.read(body or b"").kind or None)
        except InvalidJob:
            continue
    return found


_ENTRY_ID: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")
_SCORE: Final = re.compile(r"-?(?:inf|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)")


async def pending(
    session: OperatorSession, keys: QueueKeys, after: str, consumer: str | None, min_idle: float, only: str | None
) -> Page[PendingEntry]:
    """A page of one queue's pending entries, all of one level."""
    head, _, entry_id = after.partition("/")
    if after and (head not in LEVELS or not (entry_id == "" or _is_entry_id(entry_id))):
        raise _nowhere(after)
    if only is not None and not _is_entry_id(only):
        return Page([], None, 0)
    level: Level = head if head in LEVELS else LEVELS[0]
    place = keys.stream(level)
    epoch = await derived_from(session, keys, level)
    start, end = only or (f"({entry_id}" if entry_id else "-"), only or "+"
    args = [session.group, start, end, PAGE, max(0, round(min_idle * 1000)), consumer or ""]
    last, rows = await session.run(scripts.PENDING, [place], args)
    living = await alive(session, {row[1] for row in rows})
    found = []
    for entry, holder, idle, count, fields in rows:
        job_id, kind = _named(document(fields), place, epoch, entry)
        found.append(
            PendingEntry(
                keys.queue, level, text(entry), job_id, kind, text(holder), idle, count, alive=holder in living
            )
        )
    if last and not only:
        return Page(found, f"{level}/{text(last)}", PAGE)
    following = LEVELS[LEVELS.index(level) + 1 :]
    return Page(found, f"{following[0]}/" if following else None, len(rows))


async def ready(session: OperatorSession, keys: QueueKeys, group: str, after: str) -> Page[StoredJob]:
    """A page of one queue's ready jobs that no worker has claimed. Their handles are ``ready/LEVEL/ENTRY``.

    In a list a page is counted by places from the right, which move while jobs are taken: a job may be missed, or come
    twice, and a change of one that has gone changes nothing.
    """
    wanted, _, begin = after.partition("/")
    levels = LEVELS[LEVELS.index(wanted) :] if wanted in LEVELS else LEVELS
    level = levels[0]
    found: list[StoredJob] = []
    if keys.shape == "list":
        start = int(begin) if begin.isdigit() else 0
        page = [
            ("", body) for body in reversed(await session.ask("LRANGE", keys.ready(level), -start - PAGE, -start - 1))
        ]
        following = f"{level}/{start + PAGE}"
    else:
        place, behind = keys.ready(level), f"({begin}" if begin else "-"
        rows = await session.ask("XRANGE", place, behind, "+", "COUNT", PAGE)
        claimed: set[str] = set()
        if rows:
            with suppress(StreamworkerError), understood(session.address):  # there may be no group yet
                args = ("XPENDING", place, group, rows[0][0], rows[-1][0], 10 * PAGE)
                pending_ = await session.client.execute_command(*args, parse_detail=True)
                claimed = {text(each["message_id"]) for each in pending_}
        page = [(text(entry), _document((entry, fields))) for entry, fields in rows if text(entry) not in claimed]
        following = f"{level}/{text(rows[-1][0])}" if rows else ""
        if len(rows) < PAGE:
            following = ""
    for entry, body in page:
        job_id, kind = codec.glance(body)
        found.append(StoredJob(keys.queue, level, f"ready/{level}/{entry}", job_id, kind, 0.0, body))
    if keys.shape == "list" and len(page) < PAGE:
        following = ""
    if not following:
        following = f"{levels[1]}/" if len(levels) > 1 else ""
    return Page(found, following or None, len(page))


async def delayed(session: OperatorSession, keys: QueueKeys, after: str) -> Page[StoredJob]:
    """A page of one queue's parked jobs, soonest first."""
    last, _, seen = after.partition("/") if after else ("-inf", "", "0")
    if not _SCORE.fullmatch(last) or not seen.isdigit() or len(seen) > 9:
        raise _nowhere(after)
    count = int(seen)
    flat = await session.ask("ZRANGEBYSCORE", keys.due, last, "+inf", "WITHSCORES", "LIMIT", count, PAGE)
    page = list(zip(flat[::2], flat[1::2], strict=True))
    bodies = await session.ask("HMGET", keys.bodies, *(member for member, _ in page)) if page else []
    found = []
    for (member, score), body in zip(page, bodies, strict=True):
        # The next page begins at this score, behind the members that were read already.
        last, count = (last, count + 1) if text(score) == last else (text(score), 1)
        found.append(_parked(keys, text(member), float(score), body))
    return Page(found, f"{last}/{count}" if len(page) == PAGE else None, len(page))


async def delayed_job(session: OperatorSession, keys: QueueKeys, handle: str) -> StoredJob | None:
    """One parked job by its member; ``None`` if it is not parked."""
    score, body = await session.gather([("ZSCORE", keys.due, handle), ("HGET", keys.bodies, handle)])
    if score is None or isinstance(score, Exception):
        return None
    return _parked(keys, handle, float(score), None if isinstance(body, Exception) else body)


def _parked(keys: QueueKeys, handle: str, at_ms: float, body: bytes | None) -> StoredJob:
    level, named = of_due_member(handle)
    job_id, kind = codec.glance(body)
    return StoredJob(keys.queue, level, handle, job_id or named or None, kind, at_ms, body)


async def dead(session: OperatorSession, keys: QueueKeys, after: str, only: str | None) -> Page[StoredJob]:
    """A page of one queue's dead letters, newest first."""
    if after and not _is_entry_id(after):
        raise _nowhere(after)
    if only is not None and not _is_entry_id(only):
        return Page([], None, 0)
    end, start = only or (f"({after}" if after else "+"), only or "-"
    page = await session.ask("XREVRANGE", keys.dead, end, start, "COUNT", PAGE)
    found = []
    for entry, fields in page:
        known = {text(name): value for name, value in (fields or {}).items()}
        body = known.pop("job", None)
        details = {name: text(value) for name, value in known.items()}
        said = details.get("level")
        level: Level = said if said in LEVELS else "normal"
        handle = text(entry)
        at = int(handle.partition("-")[0])
        found.append(
            StoredJob(
                keys.queue, level, handle, details.get("id") or None, details.get("kind") or None, at, body, details
            )
        )
    return Page(found, found[-1].handle if len(page) == PAGE and not only else None, len(page))


def _is_entry_id(name: str) -> bool:
    """Whether it is the id of one entry: two numbers of 64 bits."""
    parts = _ENTRY_ID.fullmatch(name)
    return parts is not None and max(int(parts[1]), int(parts[2])) < 2**64


def _nowhere(after: str) -> UsageError:
    return UsageError(f"no page begins at {after[:100]!a}: begin at the first one")


async def alive(session: OperatorSession, holders: set[bytes]) -> set[bytes]:
    """The workers that have a heartbeat."""
    names = list(holders)
    answers = await session.gather([("EXISTS", worker_key(session.namespace, text(name))) for name in names])
    return {name for name, answer in zip(names, answers, strict=True) if answer == 1}


def _named(body: bytes | None, place: str, epoch: bytes, entry: bytes) -> tuple[str | None, str | None]:
    """(id, kind) of a job as workers log it; without an id in the document, the id derived from its entry."""
    try:
        reading = codec.read(body or b"")
    except InvalidJob:
        return None, None
    return codec.id_in(reading) or codec.derived_id(place, epoch, entry), reading.kind or None


_CLAIMED: Final = re.compile(r"queue:([A-Za-z0-9._:-]{1,100})(?:#[0-9]{1,4})?:claimed:.+", re.DOTALL)


async def list_queues(session: OperatorSession) -> list[str]:
    """Names of queues that have any key, sorted; a list with the name of a queue's list counts."""
    found = set(await queues(session))
    async for name in session.scan("queue:*", "list"):
        queue = queue_of_list(name)
        if queue is not None:
            found.add(queue)
    async for name in session.scan(f"{session.namespace}queue:*:claimed:*", "list"):
        match = _CLAIMED.fullmatch(name.removeprefix(session.namespace))
        if match is not None:
            found.add(match[1])
    return sorted(found)


async def list_depth(run: Callable[..., Awaitable[Any]], keys: ListKeys) -> Depth:
    """Depth of one queue of lists; ``run`` runs a script."""
    names = [*keys.lists, keys.due, keys.dead, keys.meta, keys.leases]
    reply = await run(scripts.LIST_DEPTH, names, [round(SOON * 1000)])
    ready, claimed, delayed, dead, paused, inactive, waiting_, tenants, halted, soon, now, *oldest = reply
    ages = [now / 1000 - made for element in oldest if (made := codec.made_at(element)) is not None]
    age = max(0.0, *ages) if ages else None
    held = bool(paused or inactive)
    return Depth(keys.queue, ready + tenants, claimed, delayed, dead, age, held, bool(inactive), waiting_, halted, soon)


async def claimed(session: OperatorSession, keys: ListKeys, worker: str) -> AsyncIterator[Claim]:
    """Claims of a worker in one queue, in the order they were taken."""
    start = 0
    while True:
        page = await session.ask("LRANGE", keys.claimed(worker), start, start + PAGE - 1)
        for wrapper in page:
            claim = unwrapped(keys, wrapper)
            if claim is not None:
                yield claim
        if len(page) < PAGE:
            return
        start += PAGE


async def holders(session: OperatorSession, keys: ListKeys) -> set[str]:
    """Workers that have claims in a queue."""
    return {worker for _, _, worker in await _leases(session, keys)}


async def list_pending(session: OperatorSession, keys: ListKeys, consumer: str | None) -> list[PendingEntry]:
    """Claims in one queue, level by level, the oldest first."""
    now = await session.ask("TIME")
    renewed = await _leases(session, keys)
    holders_ = {worker.encode() for _, _, worker in renewed if consumer in (None, worker)}
    living = await alive(session, holders_)
    found = []
    for holder in holders_:
        worker = holder.decode()
        async for claim in claimed(session, keys, worker):
            at = renewed.get((claim.entry, claim.count, worker))
            idle = 0 if at is None else max(0, int(now[0]) * 1000 + int(now[1]) // 1000 - int(at))
            place, named = (keys.queue, claim.level, claim.entry.decode()), _claim_named(claim)
            found.append(PendingEntry(*place, *named, worker, idle, claim.count, holder in living))
    return sorted(found, key=lambda entry: (LEVELS.index(entry.level), entry.entry_id))


async def list_workers(session: OperatorSession, queues_: Sequence[ListKeys], *, everywhere: bool) -> list[WorkerInfo]:
    """Workers with claims in these queues and, with ``everywhere``, with a heartbeat; live ones first."""
    count: Counter[str] = Counter()
    homes: dict[str, list[str]] = {}
    for keys in queues_:
        for _, _, worker in await _leases(session, keys):
            count[worker] += 1
            if keys.queue not in homes.setdefault(worker, []):
                homes[worker].append(keys.queue)
    beats = await reports(session, None if everywhere else homes)
    return infos(beats, homes, count, {keys.queue for keys in queues_})


async def _leases(session: OperatorSession, keys: ListKeys) -> dict[tuple[bytes, int, str], float]:
    """(id, delivery count, worker) of each claim in a queue: the ms at which it was renewed."""
    flat = await session.ask("ZRANGE", keys.leases, 0, -1, "WITHSCORES")
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {lease: float(score) for member, score in pairs if (lease := lease_of(member)) is not None}


def _claim_named(claim: Claim) -> tuple[str | None, str | None]:
    """(id, kind) of a job as workers log it."""
    try:
        reading = codec.read(claim.body or b"")
    except InvalidJob:
        return None, None
    return codec.job_id(reading, claim), reading.kind or None


_OF_A_JOB: Final = re.compile(r"(.*\}:[a-z]+|.*?queue:.*:(?:claimed|result|output|log)):.*")
"""Keys that a job, a worker or the like has for itself: they count together."""
VALUES: Final = 200
"""Values of one page: documents may be large."""


async def key_uses(session: OperatorSession) -> list[KeyUse]:
    """The keys of encryption that are in use, by families of keys of Redis."""
    found: Counter[tuple[str, str]] = Counter()
    for pattern in (f"{session.namespace}stream:{{*}}*", f"{session.namespace}queue:*", "queue:*"):
        if pattern.startswith("queue:") and not session.namespace:
            continue  # the same as the one before
        async for name in session.scan(pattern):
            match = _OF_A_JOB.fullmatch(name)
            place = f"redis {match[1] if match is not None else name}"
            async for value in _values(session, name):
                for names in USES.findall(value):
                    found[place, text(next(filter(None, names)))] += 1
    return [KeyUse(place, key, count) for (place, key), count in sorted(found.items())]


async def _values(session: OperatorSession, name: str) -> AsyncIterator[bytes]:
    """All values of a key, read in pages."""
    kind = text(await session.ask("TYPE", name))
    if kind == "string":
        yield await session.ask("GET", name) or b""
    elif kind == "stream":
        async for _, fields in _entries(session, name):
            for value in fields.values():
                yield value
    elif kind == "hash":
        async for _, value in _fields(session, name):
            yield value
    elif kind in ("list", "zset"):
        async for value in _ranged(session, "LRANGE" if kind == "list" else "ZRANGE", name):
            yield value


async def _entries(session: OperatorSession, name: str) -> AsyncIterator[tuple[bytes, dict[bytes, bytes]]]:
    start = "-"
    while rows := await session.ask("XRANGE", name, start, "+", "COUNT", VALUES):
        for entry, fields in rows:
            yield entry, fields
        start = f"({text(rows[-1][0])}"


async def _ranged(session: OperatorSession, command: str, name: str) -> AsyncIterator[bytes]:
    """Elements of a list (LRANGE), or members of a sorted set (ZRANGE)."""
    at = 0
    while rows := await session.ask(command, name, at, at + VALUES - 1):
        for each in rows:
            yield each
        at += VALUES


async def _fields(session: OperatorSession, name: str) -> AsyncIterator[tuple[bytes, bytes]]:
    cursor: Any = None
    while cursor is None or int(cursor):
        cursor, fields = await session.ask("HSCAN", name, cursor or 0, "COUNT", VALUES)
        for field, value in fields.items():
            yield field, value


_ORDERED: Final = re.compile(rb"([a-z]+) (\d+) (\d+) ")


async def documents(session: OperatorSession, keys: QueueKeys, secret: bytes) -> AsyncIterator[StoredDocument]:
    """All documents of a queue: ready, waiting in lines, delayed, dead, and those that workers hold."""
    for part in (_waiting_jobs, _in_lines, _stored_jobs, _claimed_jobs):
        async for each in part(session, keys, secret):
            yield each


async def _waiting_jobs(session: OperatorSession, keys: QueueKeys, secret: bytes) -> AsyncIterator[StoredDocument]:
    for level in LEVELS:
        name = keys.ready(level)
        if isinstance(keys, ListKeys):
            async for element in _ranged(session, "LRANGE", name):
                yield _stored_document(keys, "ready", name, element, codec.unmarked(element, secret)[0])
        else:
            async for entry, fields in _entries(session, name):
                yield _stored_document(keys, "ready", name, entry, fields.get(b"job", b""))


async def _in_lines(session: OperatorSession, keys: QueueKeys, _: bytes) -> AsyncIterator[StoredDocument]:
    for level in LEVELS:
        async for member in _ranged(session, "ZRANGE", keys.fair_line(level)):
            yield _stored_document(keys, "fair", keys.fair_line(level), member, member[16:])
    for order in sorted(await session.ask("SMEMBERS", keys.lines)):
        name = keys.order_line(text(order))
        async for element in _ranged(session, "LRANGE", name):
            match = _ORDERED.match(element)
            if match is not None:
                body = element[match.end() + int(match[2]) + int(match[3]) :]
                yield _stored_document(keys, "order", name, element, body)


async def _stored_jobs(session: OperatorSession, keys: QueueKeys, _: bytes) -> AsyncIterator[StoredDocument]:
    async for member, body in _fields(session, keys.bodies):
        yield _stored_document(keys, "delayed", keys.bodies, member, body)
    async for entry, fields in _entries(session, keys.dead):
        yield _stored_document(keys, "dead", keys.dead, entry, fields.get(b"job", b""))


async def _claimed_jobs(session: OperatorSession, keys: QueueKeys, secret: bytes) -> AsyncIterator[StoredDocument]:
    """What workers of list mode hold; in stream mode it is among what is ready."""
    if not isinstance(keys, ListKeys):
        return
    async for name in session.scan(f"{keys.claimed('')}*", "list"):
        async for element in _ranged(session, "LRANGE", name):
            claim = unwrapped(keys, element, secret)
            if claim is not None:
                yield _stored_document(keys, "running", name, element, claim.body or b"")


def _stored_document(keys: QueueKeys, place: Any, name: str, handle: bytes, body: bytes) -> StoredDocument:
    try:
        job_id = codec.id_in(codec.read(body))
    except InvalidJob:
        job_id = codec.told_of(body)[0]
    return StoredDocument(keys.queue, place, name, handle, body, job_id)
