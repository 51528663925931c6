"""Order keys that are stuck: a sweep that finds keys held by jobs that are nowhere, and the listing of what waits.

Every script that ends a job passes its key on. What ends outside of them (an entry deleted by hand, a worker that
popped and died, a worker of a version without order) leaves a key with a job that is nowhere in the queue.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, Final, TypeAlias

from streamworker import codec
from streamworker.broker import scripts
from streamworker.broker.keys import ListKeys, QueueKeys, lease_of, of_due_member, of_line, unwrapped, worker_key
from streamworker.broker.redis.session import OperatorSession, Session, text
from streamworker.job import LEVELS
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

Asks: TypeAlias = Session | OperatorSession

SWEEP_EVERY: Final = 60.0
"""Seconds between two sweeps of a queue, whichever worker makes them."""
SWEEP_AGAIN: Final = 2.0
"""Seconds after which the one that missed a job looks again."""
PAGE: Final = 500
MOST: Final = 10_000
"""Most keys of one sweep."""


class OrderSweeper:
    """Passes on keys for which jobs wait and whose holders are nowhere.

    A queue is read place after place, and a job may move meanwhile, from one that is not read yet to one that was.
    So a key is passed on only if the same job was missing in the sweep before, which is kept here: the one that missed
    it looks again soon.

    Args:
        session: the connections.
    """

    def __init__(self, session: Asks) -> None:
        self._session = session
        self._missing: dict[str, dict[bytes, bytes]] = {}
        """By meta hash of a queue: keys, with the jobs that were missing in the last sweep."""

    @property
    def is_in_doubt(self) -> bool:
        """Whether jobs were missing in the last sweep; the next one tells whether they are."""
        return bool(self._missing)

    def next_look(self, at: float) -> float:
        """When to sweep again, in monotonic seconds: ``at``, or soon after a job was missing."""
        return monotonic() + SWEEP_AGAIN if self.is_in_doubt else at

    async def sweep(self, keys: QueueKeys) -> int:
        """Pass keys on; returns how many. One worker a minute looks, and again if a job was missing.

        Args:
            keys: of the queue.
        """
        ask, before = self._session.ask, self._missing.pop(keys.meta, {})
        if not await ask("EXISTS", keys.lines) and not int(await ask("HGET", keys.meta, "waiting") or 0):
            return 0
        if not before:
            if not await ask("SET", keys.swept, "1", "NX", "PX", round(SWEEP_EVERY * 1000)):
                return 0
            await self._session.run(scripts.SWEEP, [keys.meta], [keys.shape])
        missing = await self._look(keys)
        nowhere = missing.items() & before.items()
        if first := dict(missing.items() - nowhere):
            self._missing[keys.meta] = first
        if not nowhere:
            return 0
        args = [part for pair in nowhere for part in pair]
        healed = int(await self._session.run(scripts.SWEEP, [keys.meta], [keys.shape, *args]))
        if healed:
            hint = "their jobs were deleted by hand, or ended by a worker that knows no order; the next jobs are ready"
            log.warning("order_key_healed", queue=keys.queue, keys=healed, hint=hint)
        return healed

    async def _look(self, keys: QueueKeys) -> dict[bytes, bytes]:
        """Keys whose holders two looks did not find, each of them the same one."""
        missing: dict[bytes, bytes] = {}
        for look in range(2):
            waiting = await self._session.ask("SRANDMEMBER", keys.lines, MOST)
            known = await _holders(self._session, keys, waiting)
            missing = {key: holder for key, holder in known if not look or missing.get(key) == holder}
            if not missing:
                break
            found = {job_id async for job_id in _ids(self._session, keys)}
            missing = {key: holder for key, holder in missing.items() if text(holder) not in found}
        return missing


async def _holders(session: Asks, keys: QueueKeys, waiting: list[bytes]) -> list[tuple[bytes, bytes]]:
    """(key, holder) of keys that do not halt, nor move to another partition."""
    if not waiting:
        return []
    holders = await session.ask("HMGET", keys.order, *waiting)
    halted = await session.ask("HMGET", keys.halted, *waiting)
    rows = zip(waiting, holders, halted, strict=True)
    return [(key, holder) for key, holder, halts in rows if holder and halts is None]


async def _ids(session: Asks, keys: QueueKeys) -> AsyncIterator[str]:
    """Ids of all jobs of a queue that may hold keys: delayed, ready, claimed, in tenants' lines, delayed again."""
    async for job_id in _parked(session, keys):
        yield job_id
    for level in LEVELS:
        read = _listed if isinstance(keys, ListKeys) else _streamed
        async for body in read(session, keys.ready(level)):
            yield codec.told_of(body)[0] or ""
        async for body in _in_tenants_lines(session, keys.fair_line(level)):
            yield codec.told_of(body)[0] or ""
    async for job_id in _claimed(session, keys):
        yield job_id
    async for job_id in _parked(session, keys):
        yield job_id


async def _claimed(session: Asks, keys: QueueKeys) -> AsyncIterator[str]:
    """Jobs that list mode keeps beside the lists: in claimed lists, and popped by workers that live."""
    if not isinstance(keys, ListKeys):
        return
    members = await session.ask("ZRANGE", keys.leases, 0, -1)
    for worker in {lease[2] for member in members if (lease := lease_of(member)) is not None}:
        async for element in _listed(session, keys.claimed(worker)):
            claim = unwrapped(keys, element)
            if claim is not None:
                yield codec.told_of(claim.body)[0] or claim.entry.decode()
    found = await session.ask("HGETALL", keys.popped)
    pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
    for job_id, worker in pairs:
        if await session.ask("EXISTS", worker_key(keys.namespace, text(worker))):
            yield text(job_id)
        else:
            await session.ask("HDEL", keys.popped, job_id)


async def in_lines(session: Asks, keys: QueueKeys) -> AsyncIterator[bytes]:
    """Documents of all jobs in lines, of order keys and of tenants."""
    async for key in _scanned(session, "SSCAN", keys.lines):
        async for element in _listed(session, keys.order_line("").encode() + key):
            yield of_line(element)[2]
    for level in LEVELS:
        async for body in _in_tenants_lines(session, keys.fair_line(level)):
            yield body


async def _parked(session: Asks, keys: QueueKeys) -> AsyncIterator[str]:
    async for member, _ in _scanned(session, "ZSCAN", keys.due):
        yield of_due_member(text(member))[1]


async def _in_tenants_lines(session: Asks, key: str) -> AsyncIterator[bytes]:
    """Documents in the lines of a level's tenants."""
    async for member, _ in _scanned(session, "ZSCAN", key):
        yield member[16:]


async def _scanned(session: Asks, command: str, key: str) -> AsyncIterator[Any]:
    """What a command with a cursor finds: SSCAN members, ZSCAN members with their scores."""
    cursor: Any = 0
    while True:
        cursor, page = await session.ask(command, key, cursor, "COUNT", PAGE)
        for each in page:
            yield each
        if not int(cursor):
            return


async def _streamed(session: Asks, key: str) -> AsyncIterator[bytes | None]:
    start = "-"
    while True:
        page = await session.ask("XRANGE", key, start, "+", "COUNT", PAGE)
        for _, fields in page:
            yield (fields or {}).get(b"job")
        if len(page) < PAGE:
            return
        start = f"({text(page[-1][0])}"


async def _listed(session: Asks, key: str | bytes) -> AsyncIterator[bytes]:
    """Elements of a list, from the end where new ones are added."""
    start = 0
    while True:
        page: list[bytes] = await session.ask("LRANGE", key, start, start + PAGE - 1)
        for element in page:
            yield element
        if len(page) < PAGE:
            return
        start += PAGE
