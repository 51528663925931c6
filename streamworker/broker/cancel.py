"""Cancellations: marking jobs as cancelled, and finding the marked ones among claimed, running and parked jobs.

A marked job does not start any more, and ends if it runs. The mark stays in a set of the queue until a worker has
settled the job. A field of the queue's meta hash, which claiming reads anyway, says whether there are marks at all.
`RedisEndedPayloads` reads what deleted jobs leave in a store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from time import monotonic
from typing import Any, Final, TypeVar

import msgspec

from streamworker import codec, results
from streamworker.broker import EndedPayload, scripts
from streamworker.broker.keys import QueueKeys, of_due_member
from streamworker.broker.pubsub import ServerSubscribers, Subscriber
from streamworker.broker.redis.session import CommandSession, OperatorSession, Session, text
from streamworker.broker.settle import id_of
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable
from streamworker.job import Claim, StoredDocument
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

H = TypeVar("H")

LIFE: Final = 7 * 86_400
"""Seconds a mark lives: longer than a job should wait in a queue. Delayed jobs are deleted instead."""
PAGE: Final = 1000
"""Parked jobs of one page."""
FRESH: Final = 6.0
"""Seconds after a notification in which an older look does not count as proof that nothing is cancelled."""


class Cancels:
    """Cancelled jobs of a broker's queues.

    Args:
        session: the connections.
        queues: their keys.
    """

    def __init__(self, session: Session, queues: Sequence[QueueKeys]) -> None:
        self._session = session
        self._keys = {keys.queue: keys for keys in queues}
        self._by_channel = {keys.due.encode(): keys.queue for keys in queues}
        self._notified: dict[str, float] = {}
        self._notifications = 0

    def notified(self, channel: bytes) -> None:
        """A job of a queue was cancelled just now."""
        self._notifications += 1
        if (queue := self._by_channel.get(channel)) is not None:
            self._notified[queue] = monotonic() + FRESH

    async def judged(self, claims: list[Claim], marked: Collection[str]) -> list[Claim]:
        """The claims, with ``cancelled`` set on those of cancelled jobs.

        Args:
            claims: new ones.
            marked: queues that had cancelled jobs at the last look.
        """
        if not claims or not (marked or self._notified):
            return claims
        while True:
            notifications, now = self._notifications, monotonic()
            self._notified = {queue: until for queue, until in self._notified.items() if until > now}
            asked: dict[str, dict[int, str]] = {}
            for index, claim in enumerate(claims):
                home = claim.home
                if (home in marked or home in self._notified) and (job_id := id_of(claim)) is not None:
                    asked.setdefault(home, {})[index] = job_id
            for queue, ids in asked.items():
                keys = self._keys[queue]
                try:
                    found = await self._session.run(scripts.CANCELS, [keys.cancelled, keys.meta], list(ids.values()))
                except (Unreachable, ConfigurationError):
                    raise
                except StreamworkerError as error:  # a key of a wrong type affects this queue alone
                    log.error("cancelled_unknown", queue=queue, error=str(error))
                    continue
                for index in [list(ids)[number - 1] for number in found]:
                    claims[index] = msgspec.structs.replace(claims[index], cancelled=True)
            if notifications == self._notifications:  # else a job was cancelled meanwhile, and may be one of these
                return claims

    async def find(self, claims: Collection[Claim]) -> list[Claim]:
        """Claims whose jobs were cancelled; from the lease thread."""
        asked: dict[str, list[tuple[Claim, str]]] = {}
        for claim in claims:
            if (job_id := id_of(claim)) is not None:
                asked.setdefault(claim.home, []).append((claim, job_id))
        found: list[Claim] = []
        for queue, pairs in asked.items():
            keys = self._keys[queue]
            try:
                numbers = await self._session.in_thread(
                    scripts.CANCELS, [keys.cancelled, keys.meta], [job_id for _, job_id in pairs]
                )
            except (Unreachable, ConfigurationError):
                raise
            except StreamworkerError:  # logged where jobs are claimed
                continue
            found += [pairs[number - 1][0] for number in numbers]
        return found


async def cancel(server: Session | OperatorSession, keys: QueueKeys, job_id: str) -> bool:
    """Cancel a job of a queue, whatever its state; True if it was delayed, which deletes it at once.

    Args:
        server: the session.
        keys: of its queue.
        job_id: its id.
    """
    # Marked first: a job that becomes ready while the delayed jobs are read is found cancelled when it is claimed.
    await server.run(scripts.CANCEL, [keys.cancelled, keys.meta, keys.due], [job_id, LIFE * 1000])
    gone = False
    async for member in _parked(server, keys, job_id):
        gone = await forget(server, keys, member) or gone
    if gone:
        await uncancel(server, keys, job_id)
        await server.run(scripts.TELL, [keys.meta, keys.result(job_id)], [results.CANCELLED])
    return gone


async def pass_on(server: Session | OperatorSession, keys: QueueKeys, order: str, job_id: str) -> None:
    """Pass an order key on that a job kept while it waited in the ledger.

    Args:
        server: the session.
        keys: of the queue.
        order: the order key.
        job_id: of the job.
    """
    await server.run(scripts.SWEEP, [keys.meta], [keys.shape, order, job_id])


async def forget(server: Session | OperatorSession, keys: QueueKeys, member: bytes | str) -> bool:
    """Delete a delayed job for good, and free its deduplication key; False if it is not parked any more."""
    found = codec.keyed(await server.ask("HGET", keys.bodies, member))
    names, args = [keys.due, keys.bodies], ["forget", member, b"", keys.shape]
    if found is not None:
        names, args = [*names, keys.key(found[0])], [*args, found[1]]
    return bool(await server.run(scripts.UNPARK, names, args))


async def uncancel(server: Session | OperatorSession, keys: QueueKeys, job_id: str) -> bool:
    """Delete a mark, so that the job may run again; False if there is none."""
    return bool(await server.run(scripts.CANCEL, [keys.cancelled, keys.meta, keys.due], [job_id, 0]))


async def cancel_in(
    homes: Sequence[H], cancelling: Callable[[H], Awaitable[bool]], uncancelling: Callable[[H], Awaitable[object]]
) -> bool:
    """Cancel a job that is in one of these homes; True if it was delayed, as of `cancel`.

    Args:
        homes: of its queue.
        cancelling: as `cancel`, of one home.
        uncancelling: as `uncancel`, of one home.
    """
    gone = [home for home in homes if await cancelling(home)]
    for home in homes if gone else ():  # it was in one partition: marks in the others would stay
        if home not in gone:
            await uncancelling(home)
    return bool(gone)


async def _parked(server: Session | OperatorSession, keys: QueueKeys, job_id: str) -> AsyncIterator[bytes]:
    """Members of the due set for a job. The set is ordered by time, so that all of it is read, page by page."""
    pattern = "".join(f"\\{char}" if char in "*?[]\\^" else char for char in job_id)
    cursor: Any = 0
    while True:
        cursor, found = await server.ask("ZSCAN", keys.due, cursor, "MATCH", f"*/{pattern}/*", "COUNT", PAGE)
        for member, _ in found:
            if of_due_member(text(member))[1] == job_id:
                yield member
        if not int(cursor):
            return


async def remove(session: OperatorSession, keys: QueueKeys, found: StoredDocument, group: str) -> bool:
    """Delete a document for good; False if it is not there any more, or a worker holds it."""
    if found.place == "delayed":
        return await forget(session, keys, found.handle)
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
    """Delete results, outputs, logs and marks of jobs; returns how many of each there were."""
    found = {"results": 0, "outputs": 0, "logs": 0}
    for job_id in ids:
        found["results"] += await session.ask("UNLINK", keys.result(job_id))
        found["outputs"] += await session.ask("UNLINK", keys.output(job_id))
        found["logs"] += await session.ask("UNLINK", keys.log(job_id))
        await session.ask("UNLINK", keys.ended(job_id), keys.held(job_id))
    return {name: count for name, count in found.items() if count}


# -- stored payloads of jobs that have ended
NOTES: Final = 500
"""Most notes of a queue that one look reads."""
_LOST: Final = ("payload_notes_lost", "stored payloads of jobs that were deleted are found within a minute")
_note: Final = msgspec.json.Decoder(tuple[str, str, float]).decode


def _ended(keys: QueueKeys, member: bytes) -> EndedPayload:
    try:
        payload, job_id, hop = _note(member)
    except msgspec.MsgspecError:  # not ours, or of bytes that are no text: it names nothing
        payload, job_id, hop = "", "", 0.0
    return EndedPayload(keys.name, job_id, int(hop), payload, (keys.payloads, member))


class RedisEndedPayloads:
    """`EndedPayloads` of both modes.

    Args:
        session: sends the commands.
        homes: the keys of the queues, of each partition where they have some.
        subscriber: hears of new notes.
    """

    def __init__(
        self,
        session: Session,
        homes: Callable[[], Awaitable[Sequence[QueueKeys]]],
        subscriber: Subscriber | ServerSubscribers,
    ) -> None:
        self._session, self._homes, self._subscriber = session, homes, subscriber

    async def some(self) -> list[EndedPayload]:
        found, failure = list[EndedPayload](), None
        for keys in await self._homes():
            try:
                members = await self._session.ask("ZRANGE", keys.payloads, 0, NOTES - 1)
            except StreamworkerError as error:  # a node of a cluster, or a key of a wrong type: the others are read
                if isinstance(error, Unreachable) and not self._session.address.spread:
                    raise
                failure = error
                continue
            found += [_ended(keys, member) for member in members]
        if failure is not None and not found:
            raise failure
        return found

    async def forget(self, payloads: Sequence[EndedPayload]) -> None:
        by_key: dict[str, list[bytes]] = {}
        for each in payloads:
            key, member = each.note
            by_key.setdefault(key, []).append(member)
        for key, members in by_key.items():
            await self._session.ask("ZREM", key, *members)

    async def listen(self, told: Callable[[], None]) -> None:
        try:
            channels = [keys.payloads for keys in await self._homes()]
        except StreamworkerError:  # no server answers: looks find what is noted
            return
        async with self._subscriber.on(channels, _LOST) as subscription:
            while True:
                await subscription.get()
                told()


async def dispose(session: CommandSession, keys: QueueKeys, job_id: str, body: bytes) -> None:
    """Note the stored payload of a job that has ended, if it has one.

    Args:
        session: sends the script.
        keys: of its queue.
        job_id: its id.
        body: its document.
    """
    if b'"streamworker_stored"' in body:
        await session.run(scripts.DISPOSE, [keys.payloads], [job_id, body])
