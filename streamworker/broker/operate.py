"""What people do by hand, in stream mode.

Nothing here consumes: listings read in pages, and every change goes through the workers' own scripts with the holder's
name and delivery count as the fence, so that a job that moved on meanwhile is left alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from redis.exceptions import NoPermissionError

from streamworker import codec
from streamworker.broker import Ending, Finding, PendingEntry, StoredJob, Waiting, WorkerInfo, listings, scripts
from streamworker.broker.client import Address, understood
from streamworker.broker.examine import examine
from streamworker.broker.intake import document
from streamworker.broker.keys import QueueKeys, worker_key
from streamworker.broker.listings import PAGE, Desk
from streamworker.broker.settle import StreamSender, settle
from streamworker.broker.stream import StreamOptions
from streamworker.errors import InvalidJob, StreamworkerError
from streamworker.job import Claim, Dead, Depth, Done, ReleaseAt, Settled, Verdict


class StreamOperator:
    """Stream mode of the `Operator` protocol."""

    def __init__(self, address: Address, options: StreamOptions) -> None:
        self._address = address
        self._namespace, self._group = options.namespace, options.group
        self._commands = address.commands()
        self._desk = Desk(self._commands, address, options.group, options.namespace)

    async def open(self) -> None:
        """Check that a server answers.

        Raises:
            ConfigurationError: a server answers that cannot be used.
            Unreachable: none does.
        """
        with understood(self._address):
            try:
                await self._address.greet(self._commands)
            except NoPermissionError:  # not everybody may ask for INFO
                await self._commands.ping()

    async def close(self) -> None:
        """Close the connections."""
        await self._commands.aclose()

    # -- pending

    async def pending(
        self, queues: Sequence[str], *, consumer: str | None = None, min_idle: float = 0.0, only: str | None = None
    ) -> AsyncIterator[PendingEntry]:
        """See `Operator.pending`."""
        for keys in self._keys(queues):
            async for entry in listings.pending(self._desk, keys, consumer, min_idle, only):
                yield entry

    async def body(self, entry: PendingEntry) -> bytes | None:
        """See `Operator.body`."""
        fields = await self._look(entry)
        return document(fields or [])

    async def release(self, entry: PendingEntry) -> bool:
        """See `Operator.release`."""
        fields = await self._look(entry)
        if fields is None:
            return False
        body = document(fields)
        if body is None:
            what = "has no field 'job'" if fields else "was deleted while it was pending"
            raise StreamworkerError(f"the entry {entry.entry_id} of {entry.queue} {what} and cannot go back: drop it")
        return await self._end(entry, ReleaseAt(), _handed_back(entry, body), body)

    async def bury(self, entry: PendingEntry, reason: str) -> bool:
        """See `Operator.bury`."""
        return await self._end(entry, Dead(reason), None, await self.body(entry))

    async def drop(self, entry: PendingEntry) -> bool:
        """See `Operator.drop`."""
        return await self._end(entry, Done())

    async def _look(self, entry: PendingEntry) -> list[bytes] | None:
        """The fields of a pending entry, none if it was deleted underneath; ``None`` if it is not pending any more."""
        place = self._key(entry.queue).stream(entry.level)
        args = [self._group, entry.entry_id, entry.entry_id, 1, 0, entry.worker_id]
        _, rows = await self._desk.run(scripts.PENDING, [place], args)
        return (rows[0][4] or []) if rows else None

    async def _end(
        self, entry: PendingEntry, verdict: Verdict, next_form: bytes | None = None, body: bytes | None = None
    ) -> bool:
        keys = self._key(entry.queue)
        place = keys.stream(entry.level)
        claim = Claim(entry.queue, entry.level, place, entry.entry_id.encode(), entry.deliveries, body, b"")
        try:
            attempts = codec.read(body or b"").attempt_count or 0
        except InvalidJob:
            attempts = 0
        ending = Ending(claim, verdict, next_form, entry.job_id or "", entry.kind or "", attempts)
        with understood(self._address):
            sender = StreamSender(self._commands, self._group, entry.worker_id)
            answers = await settle(sender, {place: keys}, [ending])
        if answers == [Settled.REFUSED]:
            raise StreamworkerError(f"Redis at {self._address} is out of memory or refuses writes: nothing was changed")
        return answers == [Settled.SETTLED]

    # -- delayed and dead

    async def delayed(self, queues: Sequence[str]) -> AsyncIterator[StoredJob]:
        """See `Operator.delayed`."""
        for keys in self._keys(queues):
            async for job in listings.delayed(self._desk, keys):
                yield job

    async def hasten(self, job: StoredJob) -> bool:
        """See `Operator.hasten`."""
        keys = self._key(job.queue)
        # Listings of thousands leave the documents out.
        body = await self._desk.ask("HGET", keys.bodies, job.handle) if job.body is None else job.body
        args = ["hasten", job.handle, _without_date(body) if body else b""]
        answer = await self._desk.run(scripts.UNPARK, [keys.due, keys.bodies], args)
        if answer == -1:
            raise StreamworkerError(
                f"the delayed job {job.handle} of {job.queue} has no document and cannot run: drop it"
            )
        if not answer:
            return False
        # Now means now, also when no worker is there to look: it is first in the set, so that one batch takes it along.
        await self._desk.run(scripts.PROMOTE, [keys.due, keys.bodies, *keys.places], [PAGE, keys.shape])
        return True

    async def forget(self, job: StoredJob) -> bool:
        """See `Operator.forget`."""
        keys = self._key(job.queue)
        return bool(await self._desk.run(scripts.UNPARK, [keys.due, keys.bodies], ["forget", job.handle, b""]))

    async def dead(self, queues: Sequence[str], *, only: str | None = None) -> AsyncIterator[StoredJob]:
        """See `Operator.dead`."""
        for keys in self._keys(queues):
            async for job in listings.dead(self._desk, keys, only):
                yield job

    async def replay(self, job: StoredJob) -> bool:
        """See `Operator.replay`."""
        keys = self._key(job.queue)
        found = [letter async for letter in listings.dead(self._desk, keys, job.handle)]
        if not found:
            return False
        letter = found[0]
        if letter.body is None:
            raise StreamworkerError(
                f"the dead letter {job.handle} of {job.queue} has no field 'job' and cannot go back: drop it, "
                "or enqueue its data anew"
            )
        args = [job.handle, _refreshed(letter, letter.body), keys.shape]
        return bool(await self._desk.run(scripts.REPLAY, [keys.dead, keys.ready(letter.level)], args))

    async def erase(self, job: StoredJob) -> bool:
        """See `Operator.erase`."""
        return bool(await self._desk.ask("XDEL", self._key(job.queue).dead, job.handle))

    # -- workers

    async def workers(self, queues: Sequence[str]) -> list[WorkerInfo]:
        """See `Operator.workers`."""
        return await listings.workers(self._desk, self._keys(queues))

    async def prune(self, queues: Sequence[str], worker_id: str) -> bool:
        """See `Operator.prune`."""
        if await self._desk.ask("EXISTS", worker_key(self._namespace, worker_id)):
            return False
        keys = self._keys(queues)
        for place in [place for each in keys for place in each.streams]:
            _, rows = await self._desk.run(scripts.PENDING, [place], [self._group, "-", "+", 1, 0, worker_id])
            if rows:
                return False
        # Each call looks again: a name with pending entries would take them along.
        answers = [await self._desk.run(scripts.LEAVE, each.streams, [self._group, worker_id]) for each in keys]
        return all(answers)

    # -- queues and the server

    async def depth(self, queues: Sequence[str]) -> list[Depth]:
        """See `Operator.depth`."""
        return [await listings.depth(self._desk, keys) for keys in self._keys(queues)]

    async def departed(self, queues: Sequence[str]) -> list[int | None]:
        """See `Operator.departed`."""
        counts = [int(await self._desk.run(scripts.FLOW, keys.streams, [])) for keys in self._keys(queues)]
        return [count if count >= 0 else None for count in counts]

    async def waiting(self, queues: Sequence[str], limit: int) -> list[Waiting]:
        """See `Operator.waiting`."""
        return await listings.waiting(self._desk, self._keys(queues), limit)

    async def findings(self, queues: Sequence[str]) -> list[Finding]:
        """See `Operator.findings`."""
        return await examine(self._desk, self._keys(queues))

    async def queues(self) -> list[str]:
        """See `Operator.queues`."""
        return await listings.queues(self._desk)

    def _key(self, queue: str) -> QueueKeys:
        return QueueKeys(queue, self._namespace)

    def _keys(self, queues: Sequence[str]) -> list[QueueKeys]:
        return [self._key(queue) for queue in queues]


def _handed_back(entry: PendingEntry, body: bytes) -> bytes | None:
    """The document for the next hop. The deaths of workers stay with it: by hand is no way past MAX_DELIVERIES."""
    try:
        document = codec.read(body)
        deaths = codec.deaths_before(document) + entry.deliveries - entry.alive
        known = codec.DELIVERIES_HEADER in (document.headers or {})
        headers = {codec.DELIVERIES_HEADER: str(deaths) if deaths else None} if deaths or known else {}
        return codec.rewrite(body, {"id": entry.job_id, "hop": (document.hop or 0) + 1}, headers)
    except InvalidJob:
        return None


def _refreshed(letter: StoredJob, body: bytes) -> bytes:
    """The document of a dead letter with nothing charged to it; bytes that cannot be read stay as they are."""
    try:
        document = codec.read(body)
        known = document.headers or {}
        charged = (codec.DELIVERIES_HEADER, codec.UNKNOWN_HEADER)
        headers: dict[str, str | None] = {name: None for name in charged if name in known}
        patch = {"id": letter.job_id, "hop": (document.hop or 0) + 1, "attempt_count": None, "run_at": None}
        return codec.rewrite(body, patch, headers)
    except InvalidJob:
        return body


def _without_date(body: bytes) -> bytes:
    """The document without its ``run_at``, which would send it back to the due set; as it is if it cannot be read."""
    try:
        return codec.rewrite(body, {"run_at": None}) if codec.read(body).run_at is not None else body
    except InvalidJob:
        return body
