"""`Operator` of both modes.

Listings consume nothing. Every change goes through the workers' own scripts, fenced by the holder's name and the
delivery count, so that a job that has moved meanwhile is left alone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, TypeAlias

import msgspec
from redis.exceptions import NoPermissionError

from streamworker import codec
from streamworker.broker import (
    Finding,
    KindCount,
    Page,
    PendingEntry,
    Place,
    SettleRequest,
    StoredJob,
    WorkerInfo,
    cancel,
    listings,
    scripts,
)
from streamworker.broker.claim import Options, StreamOptions
from streamworker.broker.diagnostics import PROBE, examine
from streamworker.broker.keys import PROGRESS, SECRET, ListKeys, QueueKeys, document, due_member, worker_key
from streamworker.broker.listings import PAGE
from streamworker.broker.lists import ListSettlement, refuse_cluster
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.reactions import refused, understood
from streamworker.broker.redis.redis_history import RedisHistoryReader
from streamworker.broker.redis.session import OperatorSession, text
from streamworker.broker.schedules import RedisSchedules
from streamworker.broker.settle import ClaimSettlement, StreamSettlement, settle
from streamworker.codec import NOTHING
from streamworker.errors import ConfigurationError, InvalidJob, StreamworkerError, UsageError
from streamworker.job import (
    ERROR_BYTES,
    HELD,
    Claim,
    Dead,
    DeadError,
    Depth,
    Drop,
    KeyUse,
    Level,
    Progress,
    ReleaseAt,
    Settled,
    StoredDocument,
    Verdict,
    read,
)  # fmt: skip

Freed: TypeAlias = Callable[[str, Sequence[str]], Awaitable[None]]
"""Called with a queue and the ids of jobs that an operator ended: a ledger stores deduplication keys too."""
ERRORS: Final = 1000
"""Dead letters whose errors one script call reads."""
Changed: TypeAlias = Callable[[StoredJob, bytes, tuple[str, Level], float | None], Awaitable[None]]
"""Called with a job that waited, its new document, (queue, level) and when it is due now: a ledger has a row of it."""
PURGE_BATCH: Final = 1000
"""Most jobs that one script call deletes."""


async def nothing_freed(_queue: str, _ids: Sequence[str]) -> None:
    """`Freed` where only Redis stores deduplication keys."""


async def nothing_changed(_job: StoredJob, _body: bytes, _to: tuple[str, Level], _due: float | None) -> None:
    """`Changed` where there is no ledger."""


class RedisOperator(ABC):
    """The part of `Operator` that both modes share.

    Args:
        address: the server.
        options: namespace and lease.
        freed: called with jobs that the operator ended.
        changed: called with jobs that it changed.
        group: the consumer group; lists have none.
    """

    def __init__(
        self,
        address: RedisAddress,
        options: Options,
        freed: Freed = nothing_freed,
        changed: Changed = nothing_changed,
        *,
        group: str = "",
    ) -> None:
        self.lease = options.lease
        self._denied = False
        self._freed, self._changed = freed, changed
        self._address = address
        self._namespace, self._group = options.namespace, group
        self._commands = address.commands()
        self.session: Final = OperatorSession(self._commands, address, group, self._namespace)
        self.schedules: Final = RedisSchedules(self.session, self._key, self._namespace)
        self.history: Final = RedisHistoryReader(self.session, self._key, self.now)

    @abstractmethod
    def _key(self, queue: str) -> QueueKeys:
        """The keys of a queue."""

    async def open(self) -> None:
        """Check that a server answers.

        Raises:
            ConfigurationError: a server answers that cannot be used.
            Unreachable: none does.
        """
        with understood(self._address):
            try:
                await self._address.greet(self._commands)
            except NoPermissionError:  # the user may not have the right to INFO
                await self._commands.ping()

    async def close(self) -> None:
        """Close the connections."""
        await self._commands.aclose()

    # -- pending

    @abstractmethod
    async def _claim(self, entry: PendingEntry) -> Claim | None:
        """The claim as it was listed, without a body if its document is gone; ``None`` if the claim has changed."""

    @abstractmethod
    def _sender(self, worker_id: str) -> ClaimSettlement:
        """Settles claims of a worker."""

    async def body(self, entry: PendingEntry) -> bytes | None:
        claim = await self._claim(entry)
        return claim.body if claim is not None else None

    async def release(self, entry: PendingEntry) -> bool:
        claim = await self._claim(entry)
        if claim is None:
            return False
        if claim.body is None:
            raise StreamworkerError(
                f"the entry {entry.entry_id} of {entry.queue} has no field 'job', or was deleted, and cannot go back: "
                "drop it"
            )
        secret = await self.session.ask("HGET", self._key(entry.queue).meta, SECRET)
        return await self._end(entry, claim, ReleaseAt(), _handed_back(entry, claim.body, secret or b""))

    async def bury(self, entry: PendingEntry, reason: str) -> bool:
        claim = await self._claim(entry)
        return claim is not None and await self._end(entry, claim, Dead(reason))

    async def drop(self, entry: PendingEntry) -> bool:
        claim = await self._claim(entry)
        if claim is None or not await self._end(entry, claim, Drop()):
            return False
        await self.dispose(entry.queue, entry.job_id or "", claim.body or b"")
        return await self._free(entry.queue, entry.job_id, ended=True)

    async def _free(self, queue: str, job_id: str | None, *, ended: bool) -> bool:
        if ended and job_id:
            await self._freed(self._key(queue).name, [job_id])
        return ended

    async def _end(self, entry: PendingEntry, claim: Claim, verdict: Verdict, next_form: bytes | None = None) -> bool:
        try:
            reading = codec.read(claim.body or b"")
            attempts, order = reading.attempt_count or 0, reading.order_key or ""
        except InvalidJob:
            attempts, order = 0, ""
        ending = SettleRequest(claim, verdict, next_form, entry.job_id or "", entry.kind or "", attempts, order=order)
        with understood(self._address):
            answers = await settle(self._sender(entry.worker_id), {claim.place: self._key(entry.queue)}, [ending], {})
        if answers == [Settled.REFUSED]:
            raise StreamworkerError(f"Redis at {self._address} is out of memory or refuses writes: nothing was changed")
        return answers == [Settled.SETTLED]

    async def cancel(self, queue: str, job_id: str) -> bool:
        return await cancel.cancel(self.session, self._key(queue), job_id)

    async def dispose(self, queue: str, job_id: str, body: bytes) -> None:
        await cancel.dispose(self.session, self._key(queue), job_id, body)

    async def pass_on(self, queue: str, order: str, job_id: str) -> None:
        await cancel.pass_on(self.session, self._key(queue), order, job_id)

    async def progress(self, jobs: Sequence[tuple[str, str]]) -> list[Progress | None]:
        commands = [("HGET", worker_key(self._namespace, worker), PROGRESS + job_id) for worker, job_id in jobs]
        answers = await self.session.gather(commands)
        return [read(answer) if isinstance(answer, bytes) else None for answer in answers]

    @abstractmethod
    async def _page(
        self, queue: str, after: str, consumer: str | None, min_idle: float, only: str | None
    ) -> Page[PendingEntry]:
        """`Operator.pending`, without progress."""

    async def pending(
        self,
        queue: str,
        after: str = "",
        *,
        consumer: str | None = None,
        min_idle: float = 0.0,
        only: str | None = None,
    ) -> Page[PendingEntry]:
        page = await self._page(queue, after, consumer, min_idle, only)
        places = [index for index, row in enumerate(page.rows) if row.alive and row.job_id]
        found = await self.progress([(page.rows[index].worker_id, page.rows[index].job_id or "") for index in places])
        rows = list(page.rows)
        for index, word in zip(places, found, strict=True):
            if word is not None:
                rows[index] = msgspec.structs.replace(rows[index], progress=word)
        return Page(rows, page.after, page.looked)

    async def ticks(self, queue: str) -> dict[str, float]:
        found = await self.session.ask("HGETALL", self._key(queue).crons)
        pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
        # Other fields name the schedule in force for a name, as a time and the schedule.
        return {text(schedule): int(at) / 1000 for schedule, at in pairs if at.isdigit()}

    async def uncancel(self, queue: str, job_id: str) -> bool:
        return await cancel.uncancel(self.session, self._key(queue), job_id)

    # -- delayed and dead

    async def delayed(self, queue: str, after: str = "") -> Page[StoredJob]:
        return await listings.delayed(self.session, self._key(queue), after)

    async def delayed_job(self, queue: str, handle: str) -> StoredJob | None:
        return await listings.delayed_job(self.session, self._key(queue), handle)

    async def run_now(self, job: StoredJob) -> bool:
        keys = self._key(job.queue)
        # Long listings leave the documents out.
        body = await self.session.ask("HGET", keys.bodies, job.handle) if job.body is None else job.body
        args = ["hasten", job.handle, _without_date(body) if body else b"", keys.shape]
        answer = await self.session.run(scripts.UNPARK, [keys.due, keys.bodies], args)
        if answer == -1:
            raise StreamworkerError(
                f"the delayed job {job.handle} of {job.queue} has no document and cannot run: drop it"
            )
        if not answer:
            return False
        # Promoted at once, even if no worker runs: the job is first in the set, so that one batch includes it.
        await self.session.run(scripts.PROMOTE, [keys.due, keys.bodies, *keys.places], [PAGE, keys.shape])
        return True

    async def forget(self, job: StoredJob) -> bool:
        ended = await cancel.forget(self.session, self._key(job.queue), job.handle)
        return await self._free(job.queue, job.job_id, ended=ended)

    async def ready(self, queue: str, after: str = "") -> Page[StoredJob]:
        return await listings.ready(self.session, self._key(queue), self._group, after)

    async def change(
        self, job: StoredJob, body: bytes, *, queue: str, level: Level, due: float | None = None, park: bool = True
    ) -> bool:
        keys, target = self._key(job.queue), self._key(queue)
        old = job.body or b""
        if queue != job.queue:
            _check_move(self._address, job, old)
        delayed = not job.handle.startswith("ready/")
        place = job.handle if delayed else job.handle.rpartition("/")[2]
        rest = job.handle.partition("/")[2]
        member = f"{level}/{rest}" if delayed else due_member(level, job.job_id or "")
        names = [keys.due, keys.bodies, keys.ready(job.level), target.due, target.bodies, target.ready(level)]
        at = "" if due is None else str(round(due * 1000))
        args = [
            "delayed" if delayed else "ready",
            place,
            keys.shape,
            self._group,
            old,
            body,
            member if park else "",
            at,
        ]
        done = bool(await self.session.run(scripts.CHANGE, names, args))
        if done:
            was = msgspec.structs.replace(job, queue=keys.name)
            await self._changed(was, body, (target.name, level), due if park else 0.0)
        return done

    async def dead(self, queue: str, after: str = "", *, only: str | None = None) -> Page[StoredJob]:
        return await listings.dead(self.session, self._key(queue), after, only)

    async def errors(self, queue: str, after: str = "", *, ids: bool = False) -> list[DeadError]:
        args = [after, ERRORS, ERROR_BYTES, int(ids)]
        flat = [text(each) for each in await self.session.run(scripts.DEAD_ERRORS, [self._key(queue).dead], args)]
        if ids:
            return [DeadError(handle) for handle in flat]
        return [DeadError(*flat[start : start + 4]) for start in range(0, len(flat), 4)]

    async def muted(self, queue: str) -> dict[str, str]:
        found = await self.session.ask("HGETALL", self._key(queue).muted)
        pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
        return {text(group): text(note) for group, note in pairs}

    async def mute(self, queue: str, group: str, note: str) -> bool:
        command = ["HSETNX", self._key(queue).muted, group, note] if note else ["HDEL", self._key(queue).muted, group]
        return bool(await self.session.ask(*command))

    async def replay(self, job: StoredJob) -> bool:
        keys = self._key(job.queue)
        found = (await listings.dead(self.session, keys, "", job.handle)).rows
        if not found:
            return False
        letter = found[0]
        if letter.body is None:
            raise StreamworkerError(
                f"the dead letter {job.handle} of {job.queue} has no field 'job' and cannot go back: drop it, "
                "or enqueue its data anew"
            )
        args: list[str | bytes | int] = [job.handle, _refreshed(letter, letter.body), keys.shape]
        names = [keys.dead, keys.ready(letter.level), keys.result(letter.job_id or "")]
        if (own := codec.keyed(letter.body, held=True)) is not None:
            names, args = [*names, keys.key(own[0])], [*args, own[1], round(HELD * 1000)]
        answer = await self.session.run(scripts.REPLAY, names, args)
        if answer < 0:
            raise StreamworkerError(
                f"another job has the key of the dead letter {job.handle} of {job.queue} by now: wait for its end, or "
                "drop the letter"
            )
        return bool(answer)

    async def erase(self, job: StoredJob) -> bool:
        keys = self._key(job.queue)
        body = job.body
        if body is None:  # long listings leave the documents out
            body = next((row.body for row in (await listings.dead(self.session, keys, "", job.handle)).rows), None)
        found = codec.keyed(body)
        names, args = [keys.dead], [job.handle, keys.shape]
        if found is not None:
            names, args = [*names, keys.key(found[0])], [*args, found[1]]
        ended = bool(await self.session.run(scripts.ERASE, names, args))
        return await self._free(job.queue, job.job_id, ended=ended)

    # -- queues and the server

    async def pause(self, queue: str, note: str) -> bool:
        keys = self._key(queue)
        return bool(await self.session.run(scripts.PAUSE, [keys.meta, keys.due], [note or "paused"]))

    async def resume(self, queue: str) -> bool:
        keys = self._key(queue)
        return bool(await self.session.run(scripts.PAUSE, [keys.meta, keys.due], [""]))

    async def paused(self, queue: str) -> str | None:
        note = await self.session.ask("HGET", self._key(queue).meta, "paused")
        return None if note is None else text(note)

    async def purge(self, queue: str, place: Place, limit: int) -> int:
        keys, gone = self._key(queue), 0
        names = [*keys.places, keys.due, keys.bodies, keys.dead, keys.key("")]
        while gone < limit:
            batch = min(PURGE_BATCH, limit - gone)
            count, *ids = await self.session.run(scripts.PURGE, names, [keys.shape, self._group, place, batch])
            gone += count
            if ids:
                await self._freed(keys.name, [text(each) for each in ids])
            if count < batch:
                break
        return gone

    async def waiting(self, queues: Sequence[str], limit: int) -> list[KindCount]:
        return await listings.waiting(self.session, self._keys(queues), limit)

    async def now(self) -> float:
        try:
            seconds, micros = await self.session.ask("TIME")
        except ConfigurationError:  # the user may not have the right to TIME
            return time.time()
        return int(seconds) + int(micros) / 1e6

    async def documents(self, queue: str) -> AsyncIterator[StoredDocument]:
        secret = await self.session.ask("HGET", self._key(queue).meta, SECRET)
        async for found in listings.documents(self.session, self._key(queue), secret or b""):
            yield found

    async def remove(self, found: StoredDocument) -> bool:
        return await cancel.remove(self.session, self._key(found.queue), found, self._group)

    async def forget_traces(self, queue: str, ids: Sequence[str]) -> dict[str, int]:
        return await cancel.forget_traces(self.session, self._key(queue), ids)

    async def key_uses(self) -> list[KeyUse]:
        return await listings.key_uses(self.session)

    async def refusal(self, queues: Sequence[str]) -> str | None:
        # A write that changes nothing: the hash makes it fail or, without one, NOMKSTREAM does. The server judges
        # whether it takes writes, and has memory for them, before it looks at the key.
        if self._denied:
            return None
        keys = [self._key(queue).meta for queue in queues] or [self._key(PROBE).meta]
        answers = await self.session.gather([("XADD", key, "NOMKSTREAM", "*", "probe", "1") for key in keys])
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        # A user that may only read is not asked for again: each denial is an entry of the server's ACL log.
        self._denied = any(isinstance(error, NoPermissionError) for error in errors)
        return next((said for error in errors if (said := refused(error, self._address)) is not None), None)

    async def findings(self, queues: Sequence[str]) -> list[Finding]:
        return await examine(self.session, self._keys(queues), self._key)

    def _keys(self, queues: Sequence[str]) -> list[QueueKeys]:
        return [self._key(queue) for queue in queues]


def _handed_back(entry: PendingEntry, body: bytes, secret: bytes) -> bytes | None:
    """The document for the next hop. It keeps its deliveries: a release by hand does not evade MAX_DELIVERIES."""
    try:
        document = codec.read(body)
        before = codec.state_of(document, secret)
        state = msgspec.structs.replace(before, deliveries=before.deliveries + entry.deliveries - entry.alive)
        patch = {"id": entry.job_id, "hop": codec.written_hop((document.hop or 0) + 1)}
        return codec.rewrite(body, patch, state=state, secret=secret)
    except InvalidJob:
        return None


def _refreshed(letter: StoredJob, body: bytes) -> bytes:
    """The document of a dead letter with no attempts charged; bytes that cannot be read stay as they are."""
    try:
        document = codec.read(body)
        patch = {
            "id": letter.job_id,
            "hop": codec.written_hop((document.hop or 0) + 1),
            "attempt_count": None,
            "run_at": None,
        }
        return codec.rewrite(body, patch, state=NOTHING)
    except InvalidJob:
        return body


def _check_move(address: RedisAddress, job: StoredJob, body: bytes) -> None:
    """Check that a job can go to another queue.

    Raises:
        UsageError: it cannot.
    """
    if address.spread:
        raise UsageError("a cluster keeps queues apart: enqueue the job anew on the other queue, and drop this one")
    try:
        document = codec.read(body)
    except InvalidJob:
        return
    if document.key or document.order_key or document.fair_key:
        raise UsageError(f"the job {job.job_id} has a key of its queue and has to stay there")


def _without_date(body: bytes) -> bytes:
    """The document without ``run_at``, which would park the job again; unchanged if it cannot be read."""
    try:
        return codec.rewrite(body, {"run_at": None}) if codec.read(body).run_at is not None else body
    except InvalidJob:
        return body


class StreamOperator(RedisOperator):
    """`Operator` of stream mode."""

    def __init__(
        self,
        address: RedisAddress,
        options: StreamOptions,
        freed: Freed = nothing_freed,
        changed: Changed = nothing_changed,
    ) -> None:
        super().__init__(address, options, freed, changed, group=options.group)

    def _key(self, queue: str) -> QueueKeys:
        return QueueKeys(queue, self._namespace)

    async def _page(
        self, queue: str, after: str, consumer: str | None, min_idle: float, only: str | None
    ) -> Page[PendingEntry]:
        return await listings.pending(self.session, self._key(queue), after, consumer, min_idle, only)

    async def _claim(self, entry: PendingEntry) -> Claim | None:
        place = self._key(entry.queue).ready(entry.level)
        args = [self._group, entry.entry_id, entry.entry_id, 1, 0, entry.worker_id]
        _, rows = await self.session.run(scripts.PENDING, [place], args)
        if not rows:
            return None
        body = document(rows[0][4] or [])
        return Claim(entry.queue, entry.level, place, entry.entry_id.encode(), entry.deliveries, body, b"")

    def _sender(self, worker_id: str) -> StreamSettlement:
        return StreamSettlement(self._commands, self._group, worker_id)

    async def workers(self, queues: Sequence[str], *, everywhere: bool = True) -> list[WorkerInfo]:
        return await listings.workers(self.session, self._keys(queues), everywhere=everywhere)

    async def prune(self, queues: Sequence[str], worker_id: str) -> bool:
        if await self.session.ask("EXISTS", worker_key(self._namespace, worker_id)):
            return False
        keys = self._keys(queues)
        for place in [place for each in keys for place in each.streams]:
            _, rows = await self.session.run(scripts.PENDING, [place], [self._group, "-", "+", 1, 0, worker_id])
            if rows:
                return False
        # Each call checks again: deleting a consumer deletes its pending entries.
        answers = [await self.session.run(scripts.LEAVE, each.streams, [self._group, worker_id]) for each in keys]
        return all(answers)

    # -- queues and the server

    async def depth(self, queues: Sequence[str]) -> list[Depth]:
        return [await listings.depth(self.session.run, keys, self._group) for keys in self._keys(queues)]

    async def departed(self, queues: Sequence[str]) -> list[int | None]:
        counts = [int(await self.session.run(scripts.FLOW, keys.streams, [])) for keys in self._keys(queues)]
        return [count if count >= 0 else None for count in counts]

    async def queues(self) -> list[str]:
        return await listings.queues(self.session)

    async def homes(self) -> list[str]:
        """Names of all queues, and of all partitions that have any key, whatever the settings say."""
        return await listings.homes(self.session)


class ListOperator(RedisOperator):
    """`Operator` of list mode."""

    def __init__(
        self,
        address: RedisAddress,
        options: Options,
        freed: Freed = nothing_freed,
        changed: Changed = nothing_changed,
    ) -> None:
        refuse_cluster(address)
        super().__init__(address, options, freed, changed)

    def _key(self, queue: str) -> ListKeys:
        return ListKeys(queue, self._namespace)

    async def open(self) -> None:
        with understood(self._address), suppress(NoPermissionError):  # the user may not have the right to INFO
            refuse_cluster(self._address, await self._commands.info("server"))
        await super().open()

    async def _page(
        self, queue: str, after: str, consumer: str | None, min_idle: float, only: str | None
    ) -> Page[PendingEntry]:
        # One page for all: there are no more claims than the workers may run jobs.
        del after
        (keys,) = self._lists([queue])
        held = await listings.list_pending(self.session, keys, consumer)
        rows = [each for each in held if each.idle_ms >= min_idle * 1000 and only in (None, each.entry_id)]
        return Page(rows, None, len(held))

    async def _claim(self, entry: PendingEntry) -> Claim | None:
        (keys,) = self._lists([entry.queue])
        wanted = (entry.entry_id.encode(), entry.deliveries)
        async for claim in listings.claimed(self.session, keys, entry.worker_id):
            if (claim.entry, claim.count) == wanted:
                return claim
        return None

    def _sender(self, worker_id: str) -> ListSettlement:
        return ListSettlement(self._commands, worker_id)

    async def workers(self, queues: Sequence[str], *, everywhere: bool = True) -> list[WorkerInfo]:
        return await listings.list_workers(self.session, self._lists(queues), everywhere=everywhere)

    async def prune(self, queues: Sequence[str], worker_id: str) -> bool:
        """A worker without claims has no key, so that nothing is deleted."""
        if await self.session.ask("EXISTS", worker_key(self._namespace, worker_id)):
            return False
        return not any([await self.session.ask("LLEN", keys.claimed(worker_id)) for keys in self._lists(queues)])

    async def depth(self, queues: Sequence[str]) -> list[Depth]:
        return [await listings.list_depth(self.session.run, keys) for keys in self._lists(queues)]

    async def departed(self, queues: Sequence[str]) -> list[int | None]:
        answers = await self.session.gather([("HGET", keys.meta, "left") for keys in self._lists(queues)])
        return [None if isinstance(answer, Exception) else int(answer or 0) for answer in answers]

    async def queues(self) -> list[str]:
        return await listings.list_queues(self.session)

    async def homes(self) -> list[str]:
        """Names of all queues."""
        return await self.queues()

    def _lists(self, queues: Sequence[str]) -> list[ListKeys]:
        return [self._key(queue) for queue in queues]
