"""Erasure: reading every document of a queue, wherever it is, and deleting all that one job has left in Redis."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from streamworker import codec
from streamworker.broker import cancel, scripts
from streamworker.broker.keys import ListKeys, QueueKeys, unwrapped
from streamworker.broker.redis.session import OperatorSession, text
from streamworker.errors import InvalidJob
from streamworker.job import LEVELS, StoredDocument

PAGE: Final = 200
"""Documents of one page."""
_ORDERED: Final = re.compile(rb"([a-z]+) (\d+) (\d+) ")


async def documents(session: OperatorSession, keys: QueueKeys, secret: bytes) -> AsyncIterator[StoredDocument]:
    """All documents of a queue: ready, waiting in lines, delayed, dead, and those that workers hold."""
    for part in (_ready, _in_lines, _parked, _held):
        async for each in part(session, keys, secret):
            yield each


async def _ready(session: OperatorSession, keys: QueueKeys, secret: bytes) -> AsyncIterator[StoredDocument]:
    for level in LEVELS:
        name = keys.ready(level)
        if isinstance(keys, ListKeys):
            async for element in _page_list(session, name):
                yield _found(keys, "ready", name, element, codec.unmarked(element, secret)[0])
        else:
            async for entry, fields in _page_stream(session, name):
                yield _found(keys, "ready", name, entry, fields.get(b"job", b""))


async def _in_lines(session: OperatorSession, keys: QueueKeys, _: bytes) -> AsyncIterator[StoredDocument]:
    for level in LEVELS:
        async for member in _page_set(session, keys.fair_line(level)):
            yield _found(keys, "fair", keys.fair_line(level), member, member[16:])
    for order in sorted(await session.ask("SMEMBERS", keys.lines)):
        name = keys.order_line(text(order))
        async for element in _page_list(session, name):
            match = _ORDERED.match(element)
            if match is not None:
                yield _found(keys, "order", name, element, element[match.end() + int(match[2]) + int(match[3]) :])


async def _parked(session: OperatorSession, keys: QueueKeys, _: bytes) -> AsyncIterator[StoredDocument]:
    async for member, body in _page_hash(session, keys.bodies):
        yield _found(keys, "delayed", keys.bodies, member, body)
    async for entry, fields in _page_stream(session, keys.dead):
        yield _found(keys, "dead", keys.dead, entry, fields.get(b"job", b""))


async def _held(session: OperatorSession, keys: QueueKeys, secret: bytes) -> AsyncIterator[StoredDocument]:
    """What workers of list mode hold; in stream mode it is among what is ready."""
    if not isinstance(keys, ListKeys):
        return
    async for name in session.scan(f"{keys.claimed('')}*", "list"):
        async for element in _page_list(session, name):
            claim = unwrapped(keys, element, secret)
            if claim is not None:
                yield _found(keys, "running", name, element, claim.body or b"")


async def remove(session: OperatorSession, keys: QueueKeys, found: StoredDocument, group: str) -> bool:
    """Delete a document for good; False if it is not there any more, or a worker holds it."""
    if found.place == "delayed":
        return await cancel.forget(session, keys, found.handle)
    known = codec.keyed(found.body)
    if found.place == "dead":
        names: list[str] = [keys.dead]
        args: list[Any] = [found.handle, keys.shape]
        if known is not None:
            names, args = [*names, keys.key(known[0])], [*args, known[1]]
        return bool(await session.run(scripts.ERASE, names, args))
    if found.place == "running":
        return False
    names, more = [keys.due, found.key], [str(keys.shape), found.place, found.handle, found.body, group]
    if known is not None:
        names, more = [*names, keys.key(known[0])], [*more, known[1]]
    return bool(await session.run(scripts.REMOVE, names, more))


async def forget_traces(session: OperatorSession, keys: QueueKeys, ids: Sequence[str]) -> dict[str, int]:
    """Delete results, outputs and marks of jobs; returns how many of each there were."""
    found = {"results": 0, "outputs": 0}
    for job_id in ids:
        found["results"] += await session.ask("UNLINK", keys.result(job_id))
        found["outputs"] += await session.ask("UNLINK", keys.output(job_id))
        await session.ask("UNLINK", keys.ended(job_id), keys.held(job_id))
    return {name: count for name, count in found.items() if count}


def _found(keys: QueueKeys, place: Any, name: str, handle: bytes, body: bytes) -> StoredDocument:
    try:
        job_id = codec.id_in(codec.read(body))
    except InvalidJob:
        job_id = codec.told_of(body)[0]
    return StoredDocument(keys.queue, place, name, handle, body, job_id)


async def _page_stream(session: OperatorSession, name: str) -> AsyncIterator[tuple[bytes, dict[bytes, bytes]]]:
    start = "-"
    while rows := await session.ask("XRANGE", name, start, "+", "COUNT", PAGE):
        for entry, fields in rows:
            yield entry, fields
        start = f"({text(rows[-1][0])}"


async def _page_list(session: OperatorSession, name: str) -> AsyncIterator[bytes]:
    at = 0
    while rows := await session.ask("LRANGE", name, at, at + PAGE - 1):
        for element in rows:
            yield element
        at += PAGE


async def _page_set(session: OperatorSession, name: str) -> AsyncIterator[bytes]:
    at = 0
    while rows := await session.ask("ZRANGE", name, at, at + PAGE - 1):
        for member in rows:
            yield member
        at += PAGE


async def _page_hash(session: OperatorSession, name: str) -> AsyncIterator[tuple[bytes, bytes]]:
    cursor: Any = None
    while cursor is None or int(cursor):
        cursor, fields = await session.ask("HSCAN", name, cursor or 0, "COUNT", PAGE)
        for member, body in fields.items():
            yield member, body
