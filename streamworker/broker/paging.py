"""Pages of what lies on the server: pending entries, delayed jobs, dead letters. Each costs the server little."""

from __future__ import annotations

import re
from typing import Final

from streamworker import codec
from streamworker.broker import Page, PendingEntry, StoredJob, scripts
from streamworker.broker.intake import document
from streamworker.broker.keys import QueueKeys, worker_key
from streamworker.broker.listings import PAGE, Desk, derived_from, text
from streamworker.errors import InvalidJob, UsageError
from streamworker.job import LEVELS, Level

_ENTRY_ID: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")
_SCORE: Final = re.compile(r"-?(?:inf|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)")


async def pending(
    desk: Desk, keys: QueueKeys, after: str, consumer: str | None, min_idle: float, only: str | None
) -> Page[PendingEntry]:
    """A page of one queue's pending entries, all of one level; see `Operator.pending`."""
    head, _, entry_id = after.partition("/")
    if after and (head not in LEVELS or not (entry_id == "" or _is_entry_id(entry_id))):
        raise _nowhere(after)
    if only is not None and not _is_entry_id(only):
        return Page([], None, 0)
    level: Level = head if head in LEVELS else LEVELS[0]
    place = keys.stream(level)
    epoch = await derived_from(desk, keys, level)
    start, end = only or (f"({entry_id}" if entry_id else "-"), only or "+"
    args = [desk.group, start, end, PAGE, max(0, round(min_idle * 1000)), consumer or ""]
    last, rows = await desk.run(scripts.PENDING, [place], args)
    living = await alive(desk, {row[1] for row in rows})
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


async def delayed(desk: Desk, keys: QueueKeys, after: str) -> Page[StoredJob]:
    """A page of one queue's parked jobs, soonest first."""
    last, _, seen = after.partition("/") if after else ("-inf", "", "0")
    if not _SCORE.fullmatch(last) or not seen.isdigit() or len(seen) > 9:
        raise _nowhere(after)
    count = int(seen)
    flat = await desk.ask("ZRANGEBYSCORE", keys.due, last, "+inf", "WITHSCORES", "LIMIT", count, PAGE)
    page = list(zip(flat[::2], flat[1::2], strict=True))
    bodies = await desk.ask("HMGET", keys.bodies, *(member for member, _ in page)) if page else []
    found = []
    for (member, score), body in zip(page, bodies, strict=True):
        # The next page begins at this score, behind those of it that were seen already.
        last, count = (last, count + 1) if text(score) == last else (text(score), 1)
        found.append(_parked(keys, text(member), float(score), body))
    return Page(found, f"{last}/{count}" if len(page) == PAGE else None, len(page))


async def delayed_job(desk: Desk, keys: QueueKeys, handle: str) -> StoredJob | None:
    """One parked job by its member; ``None`` if it is not parked."""
    score, body = await desk.gather([("ZSCORE", keys.due, handle), ("HGET", keys.bodies, handle)])
    if score is None or isinstance(score, Exception):
        return None
    return _parked(keys, handle, float(score), None if isinstance(body, Exception) else body)


def _parked(keys: QueueKeys, handle: str, at_ms: float, body: bytes | None) -> StoredJob:
    head, _, rest = handle.partition("/")
    level: Level = head if head in LEVELS else "normal"
    job_id, kind = codec.glance(body)
    return StoredJob(keys.queue, level, handle, job_id or rest.rpartition("/")[0] or None, kind, at_ms, body)


async def dead(desk: Desk, keys: QueueKeys, after: str, only: str | None) -> Page[StoredJob]:
    """A page of one queue's dead letters, newest first."""
    if after and not _is_entry_id(after):
        raise _nowhere(after)
    if only is not None and not _is_entry_id(only):
        return Page([], None, 0)
    end, start = only or (f"({after}" if after else "+"), only or "-"
    page = await desk.ask("XREVRANGE", keys.dead, end, start, "COUNT", PAGE)
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
    """Whether the server takes it for the id of one entry: two numbers of 64 bits."""
    parts = _ENTRY_ID.fullmatch(name)
    return parts is not None and max(int(parts[1]), int(parts[2])) < 2**64


def _nowhere(after: str) -> UsageError:
    return UsageError(f"no page begins at {after[:100]!a}: begin at the first one")


async def alive(desk: Desk, holders: set[bytes]) -> set[bytes]:
    """Those of the workers whose hearts beat."""
    names = list(holders)
    answers = await desk.gather([("EXISTS", worker_key(desk.namespace, text(name))) for name in names])
    return {name for name, answer in zip(names, answers, strict=True) if answer == 1}


def _named(body: bytes | None, place: str, epoch: bytes, entry: bytes) -> tuple[str | None, str | None]:
    """(id, kind) as workers call the job; one without an id has the id derived from where it lies."""
    try:
        reading = codec.read(body or b"")
    except InvalidJob:
        return None, None
    return codec.id_in(reading) or codec.derived_id(place, epoch, entry), reading.kind or None
