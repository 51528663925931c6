"""Operators and the ledger's archive straight from settings: the part of the composition root that needs no app.

The listings of the command line stand on it. It imports no worker, and PostgreSQL's driver only when the ledger is
asked: people wait for each import of a command that they type.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar, cast

import anyio.to_thread
import msgspec
from redis.asyncio import Redis

from streamworker import codec
from streamworker.broker import Operator, StoredJob
from streamworker.broker.claim import StreamOptions
from streamworker.broker.operator import ListOperator, StreamOperator
from streamworker.broker.partitioned_operator import whole_queues
from streamworker.broker.redis.client import RedisAddress
from streamworker.encryption import PLAIN, Sealer
from streamworker.errors import InvalidJob, StreamworkerError, UsageError
from streamworker.job import FlowRecord, Job, Level
from streamworker.operators.audit_trail import NEVER_SENT, Audit, AuditedOperator, actor, audited, keep_actions
from streamworker.payload import refuse_stored
from streamworker.policy import group_sizes
from streamworker.postgres import FINAL, Archive, AuditRow, JobRecord, Wanted
from streamworker.settings import EMBEDDED, Settings
from streamworker.telemetry.logs import get_logger
from streamworker.views.listing import DELAYED, READY, JobListing, Selection

log = get_logger("streamworker.ledger")

T = TypeVar("T")

CancelAnswer: TypeAlias = Literal["cancelled", "asked", "ended"]
"""What `App.cancel` answers."""


class Canceller(Protocol):
    """Cancels jobs that are in Redis: a broker, or an operator."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """Delete a delayed job, or mark one that waits or runs; whether it was deleted."""

    async def pass_on(self, queue: str, order: str, job_id: str) -> None:
        """Pass an order key on that a job kept while it waited in the ledger."""

    async def dispose(self, queue: str, job_id: str, body: bytes) -> None:
        """Note that the stored payload of a job is needed no more, if its document has one."""


async def cancel_job(archive: Archive | None, canceller: Canceller | None, queue: str, job_id: str) -> CancelAnswer:
    """Cancel a job, in the ledger first: whatever happens in Redis afterwards, no worker runs it again.

    Args:
        archive: the ledger, if there is one.
        canceller: for jobs in Redis; ``None`` where no Redis is named.
        queue: of the job.
        job_id: which.

    Raises:
        UsageError: the job may be running, and no Redis is named.
    """
    record = None if archive is None else await archive.find(job_id, queue)
    if record is not None and (record.status in FINAL or record.status == "dead"):
        return "ended"
    order = "" if record is None or record.status != "waiting" else order_key_of(record.document)
    if canceller is None:
        if order:
            raise UsageError(f"the job {job_id} keeps its order key in Redis while it waits: set REDIS_URL")
        if archive is not None and await archive.cancel(queue, job_id):
            return "cancelled"
        raise UsageError(f"the job {job_id} may be running: set REDIS_URL, so that its worker can be told")
    if archive is None or record is None:
        return "cancelled" if await canceller.cancel(queue, job_id) else "asked"
    final = await archive.cancel(queue, job_id)
    if final and order:
        await canceller.pass_on(queue, order, job_id)
    if final:
        await canceller.dispose(queue, job_id, document_of(record))
    if final and record.status in NEVER_SENT:
        return "cancelled"
    gone = await canceller.cancel(queue, job_id)
    return "cancelled" if final or gone else "asked"


def document_of(record: JobRecord) -> bytes:
    """The document of a job in the ledger, as far as its payload goes."""
    return record.document or b'{"payload":%b}' % bytes(record.payload or b"null")


def order_key_of(body: bytes | None) -> str:
    """The order key of a document; empty if it has none, or cannot be read."""
    try:
        return "" if body is None else codec.read(body).order_key or ""
    except InvalidJob:
        return ""


async def cancel_flow(archive: Archive, canceller: Canceller | None, flow_id: str) -> bool:
    """Cancel a flow: what has not begun never runs, what runs is cancelled in its worker; False if it has ended.

    Args:
        archive: the ledger.
        canceller: for jobs in Redis; ``None`` where no Redis is named: those that run go on to their end.
        flow_id: which.
    """
    flow = await archive.flows.find(flow_id)
    if flow is None or flow.finished_at is not None:
        return False
    for queue, job_id in await archive.flows.cancel(flow.id):
        if canceller is not None:
            await canceller.cancel(queue, job_id)
            record = await archive.find(job_id, queue)
            order = "" if record is None or record.status != "cancelled" else order_key_of(record.document)
            if order:  # it waited for a signal
                await canceller.pass_on(queue, order, job_id)
    return True


class LedgerKeys:
    """Frees the deduplication keys that PostgreSQL remembers of jobs that were ended by hand in Redis.

    It connects to the ledger with the first of them: listings do not connect to PostgreSQL.

    Args:
        stack: closes what is opened.
        settings: whether there is a ledger.
        url: of the database, if there is one.
    """

    def __init__(self, stack: AsyncExitStack, settings: Settings, url: str | None) -> None:
        self._stack = stack
        self._url = url if settings.ledger != "off" else None
        self._archive: Archive | None = None

    async def archive(self) -> Archive | None:
        """The ledger, opened when first asked for; ``None`` where there is none.

        Raises:
            Unreachable: PostgreSQL does not answer.
        """
        if self._url is None or self._archive is not None:
            return self._archive
        from streamworker.postgres.archive import open_archive  # noqa: PLC0415 - it imports asyncpg, which listings do not use

        self._archive = await open_archive(self._stack, self._url, required=False)
        if self._archive is None:
            self._url = None
        return self._archive

    async def __call__(self, queue: str, ids: Sequence[str]) -> None:
        """Free the keys of these jobs; what PostgreSQL refuses is logged, since the jobs have ended all the same."""
        try:
            if (archive := await self.archive()) is not None:
                await archive.free_keys(queue, ids)
        except StreamworkerError as error:
            log.warning("keys_not_freed", queue=queue, jobs=len(ids), error=str(error))

    async def changed(self, job: StoredJob, body: bytes, to: tuple[str, Level], due: float | None) -> None:
        """The row of a job that was changed follows.

        Args:
            job: as it was.
            body: its new document.
            to: (its queue, its level).
            due: epoch seconds at which it is due; 0 at once, ``None`` as before.
        """
        archive, queue = await self.archive(), to[0]
        if archive is not None and job.job_id is not None:
            payload, moved = bytes(codec.read(body).payload), queue if queue != job.queue else None
            await archive.change(job.queue, job.job_id, payload=payload, level=to[1], run_at=due, moved=moved)


@asynccontextmanager
async def open_operator(
    settings: Settings, redis: Redis | str | None = None, queues: Sequence[str] = ()
) -> AsyncIterator[Operator]:
    """An operator of the server that the settings name.

    Args:
        settings: mode, namespace, group, and where the servers are.
        redis: a client or a URL, instead of the settings' URL.
        queues: of the app, for settings that name none.

    Raises:
        ConfigurationError: no server is named, or it cannot be used.
        Unreachable: no server answers.
    """
    async with AsyncExitStack() as stack:
        address, url = await open_servers(stack, settings, redis)
        kind = settings.by_mode(StreamOperator, ListOperator)
        # Closed after all that is opened from here on: what was done last is kept before.
        ledger = LedgerKeys(await stack.enter_async_context(AsyncExitStack()), settings, url)
        operator = kind(address, broker_options(settings, queues), ledger, ledger.changed)
        stack.push_async_callback(operator.close)
        audit = Audit(ledger)
        stack.push_async_callback(audit.close)
        await operator.open()
        yield cast("Operator", AuditedOperator(await whole_queues(operator, settings.partitions), audit))


async def open_servers(
    stack: AsyncExitStack, settings: Settings, redis: Redis | str | None
) -> tuple[RedisAddress, str | None]:
    """(where Redis is, URL of the database); the embedded pair is started if that is what the settings say."""
    database = settings.database_url
    if redis is not None and not isinstance(redis, str):
        return RedisAddress.of(redis).spread_over(settings.partitions), database
    url = (Settings(redis_url=redis) if redis else settings).require_redis_url()
    if url == EMBEDDED:
        from streamworker import embedded  # noqa: PLC0415 - few use them

        servers = await anyio.to_thread.run_sync(embedded.acquire, settings.state_dir)
        stack.callback(servers.close)
        url, database = servers.redis_url, database or servers.database_url
    return RedisAddress(url).spread_over(settings.partitions), database


async def database_of(stack: AsyncExitStack, settings: Settings) -> str:
    """The URL of the database; the embedded pair is started if that is what the settings say.

    Raises:
        ConfigurationError: no database is named.
    """
    if settings.database_url is None and settings.redis_url == EMBEDDED:
        return (await open_servers(stack, settings, None))[1] or settings.require_database_url()
    return settings.require_database_url()


async def require_archive(stack: AsyncExitStack, settings: Settings) -> Archive:
    """What people ask the ledger, closed with ``stack``.

    Raises:
        ConfigurationError: no database is named, or it has no schema streamworker.
        Unreachable: PostgreSQL does not answer.
    """
    from streamworker.postgres.archive import open_archive  # noqa: PLC0415 - it imports asyncpg

    return await open_archive(stack, await database_of(stack, settings))


async def open_audited_archive(stack: AsyncExitStack, settings: Settings) -> Archive:
    """The same for operators: what they change in the ledger alone is kept.

    Raises:
        ConfigurationError: no database is named, or it has no schema streamworker.
        Unreachable: PostgreSQL does not answer.
    """
    return audited(stack, await require_archive(stack, settings))


def broker_options(settings: Settings, queues: Sequence[str]) -> StreamOptions:
    """What brokers and operators are made with.

    Args:
        settings: those of the process.
        queues: of the app, for settings that name none.
    """
    return StreamOptions(
        queues=tuple([(spec.name, spec.cap) for spec in settings.queues] or [(name, None) for name in queues]),
        group=settings.group,
        namespace=settings.namespace,
        lease=settings.lease,
        weighted=settings.priority == "weighted",
        partitions=settings.partitions,
        fair_weights=tuple((each.tenant, each.weight) for each in settings.fair_weights),
        groups=group_sizes(settings.max_deliveries, settings.concurrency),
    )


class FlowOperator:
    """What operators do to flows, each of which is kept: who, what, to which flow, and how it ended.

    Args:
        archive: the ledger.
        operator: for jobs in Redis; ``None`` where no Redis is named: those that run go on to their end.
    """

    def __init__(self, archive: Archive, operator: Operator | None) -> None:
        self._archive, self._operator = archive, operator

    async def cancel(self, flow: FlowRecord) -> bool:
        """Cancel a flow; False if it has ended."""
        return await self._act("cancel flow", flow, cancel_flow(self._archive, self._operator, flow.id))

    async def retry(self, flow: FlowRecord) -> int:
        """Queue the dead, expired and cancelled jobs of a flow anew; returns how many there were."""
        return await self._act("retry flow", flow, self._retry(flow.id))

    async def delete(self, flow: FlowRecord) -> bool:
        """Delete a flow that has ended, with its jobs; False if it has not."""
        return await self._act("delete flow", flow, self._archive.flows.delete(flow.id))

    async def _act(self, action: str, flow: FlowRecord, doing: Awaitable[T]) -> T:
        result, by = "failed", actor()
        try:
            answer = await doing
            result = "done" if answer else "gone"
            return answer
        except StreamworkerError as error:
            result = f"refused: {error}"
            raise
        finally:
            which = flow.name if flow.key is None else f"{flow.name}, key={flow.key}"
            row = AuditRow(by.who, by.source, action, None, flow.id, None, which, result)
            await keep_actions(self._opened, [row])

    async def _retry(self, flow_id: str) -> int:
        if self._operator is not None:  # no mark of a cancelled job may end it again
            for queue, job_id in await self._archive.flows.failed(flow_id):
                await self._operator.uncancel(queue, job_id)
        return await self._archive.flows.retry(flow_id)

    async def _opened(self) -> Archive:
        return self._archive


class JobChange(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be different about a job that waits; ``None`` leaves it as it is.

    Attributes:
        delay: seconds from now until it is due; 0 makes it ready.
        run_at: the moment at which it is due, in epoch seconds.
        level: its level.
        queue: its queue.
        payload: its whole payload.
        fields: fields of its payload, merged into it.
    """

    delay: float | None = None
    run_at: float | None = None
    level: Level | None = None
    queue: str | None = None
    payload: dict[str, Any] | None = None
    fields: dict[str, Any] | None = None

    @property
    def timed(self) -> bool:
        """Whether the time is to be different."""
        return self.delay is not None or self.run_at is not None

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: it makes none.
        """
        if not any(getattr(self, name) is not None for name in self.__struct_fields__):
            raise UsageError("say what to change: its time, level, queue or payload")
        if self.delay is not None and self.run_at is not None:
            raise UsageError("delay and run_at are two answers to one question: keep one of them")
        if self.payload is not None and self.fields is not None:
            raise UsageError("the whole payload, and fields of it: keep one of them")


QUEUED: Final = "ledger/"
"""The handle of a job begins so that waits in the ledger, until a relay takes it to Redis."""
TRIES: Final = 20
"""Changes of others to the same job that are followed."""


async def ledger_of(operator: Operator) -> Archive | None:
    """The ledger beside an operator's Redis; ``None`` where there is none."""
    return await operator.archive() if isinstance(operator, AuditedOperator) else None


def queued_job(was: JobRecord) -> StoredJob:
    """A job of the ledger as a listing shows those in Redis."""
    due = (was.run_at or was.created_at).timestamp()
    return StoredJob(was.queue, was.level, f"{QUEUED}{was.id}", was.id, was.kind, due * 1000, None)


async def waiting_jobs(
    operator: Operator, selection: Selection, listing: JobListing[StoredJob] = DELAYED
) -> AsyncIterator[StoredJob]:
    """The jobs that fit, those in the ledger first: one that goes to Redis meanwhile is there once.

    Args:
        operator: of their Redis.
        selection: which.
        listing: those that wait for their time (`DELAYED`), or the ready ones (`READY`): in the ledger these are due,
            and their relay is behind.
    """
    seen: set[tuple[str, str | None]] = set()
    if (archive := await ledger_of(operator)) is not None:
        now = await archive.now() * 1000
        wanted = Wanted(queue=selection.queue, kind=selection.kind, statuses=("queued",), ids=selection.ids)
        async for was in archive.jobs(wanted):
            job = queued_job(was)
            if (job.at_ms > now) is (listing is DELAYED) and selection.fits_stored(job):
                seen.add((job.queue, job.job_id))
                yield job
    async for job in listing.chosen(operator, selection):
        if (job.queue, job.job_id) not in seen:
            yield job


class Kinds(Protocol):
    """What knows the handlers of kinds: an app. This module imports no handlers."""

    def handler_of(self, kind: str | None, queue: str) -> Any:
        """The handler of a kind; ``None`` if there is none."""


class JobChanger:
    """Changes jobs that wait: in Redis, and then in the ledger, if there is one; or in the ledger before a relay has
    taken them.

    Args:
        operator: where they wait.
        handlers: know the types of payloads; ``None`` where no app is known: then payloads cannot be changed.
        settings: how large a job may be, and where the ledger is.
        sealer: seals payloads.
    """

    def __init__(
        self, operator: Operator, handlers: Kinds | None, settings: Settings, *, sealer: Sealer = PLAIN
    ) -> None:
        self._operator, self._handlers, self._settings, self._sealer = operator, handlers, settings, sealer

    async def change_by_id(self, queue: str, job_id: str, change: JobChange, *, by: str = "") -> bool:
        """Change the job with an id; False if no job with that id waits there. It reads the queue's waiting jobs.

        Raises:
            UsageError: the change makes no sense for this job, or it waits for other jobs of its flow.
            InvalidJob: the payload would not fit the type of the kind's handler.
            StreamworkerError: a relay is taking it to Redis at this moment.
        """
        change.check()
        # In this order: a job goes from the ledger to Redis.
        done = await self._change_queued(queue, job_id, change) or await self._change_sent(queue, job_id, change)
        if done:
            log.info("job_changed", queue=queue, job_id=job_id, who=by)
        return done

    async def change(self, job: StoredJob, change: JobChange) -> bool:
        """Change a ready or delayed job; False if it started, or changed, meanwhile: then it is as it was.

        One that waited in the ledger is changed in Redis if a relay has taken it there meanwhile.

        Raises:
            UsageError: the change makes no sense for this job.
            InvalidJob: the payload would not fit the type of the kind's handler.
            StreamworkerError: a relay is taking it to Redis at this moment.
        """
        change.check()
        if job.handle.startswith(QUEUED):
            where = job.queue, job.job_id or ""
            return await self._change_queued(*where, change) or await self._change_sent(*where, change)
        if job.body is None:
            raise StreamworkerError(f"the job {job.handle} of {job.queue} has no document: drop it")
        body, queue, level = self._changed(job, job.body, change)
        due = change.run_at
        if change.delay is not None:
            due = await self._operator.now() + change.delay if change.delay else None
        park = due is not None if change.timed else not job.handle.startswith("ready/")
        return await self._operator.change(job, body, queue=queue, level=level, due=due, park=park)

    async def _change_sent(self, queue: str, job_id: str, change: JobChange) -> bool:
        """Change a job in Redis."""
        selection = Selection(queue=queue, ids=frozenset({job_id}))
        for listing in (DELAYED, READY):
            async for job in listing.chosen(self._operator, selection):
                if await self.change(job, change):
                    return True
        archive = await ledger_of(self._operator)
        record = None if archive is None else await archive.find(job_id, queue)
        if record is not None and record.status in ("queued", "dispatching"):
            raise StreamworkerError(
                f"a relay takes the job {job_id} to Redis at this moment: change it again in a while"
            )
        if record is not None and record.status == "blocked":
            raise UsageError(
                f"the job {job_id} waits for other jobs of its flow: it can be changed when they have ended"
            )
        return False

    async def _change_queued(self, queue: str, job_id: str, change: JobChange) -> bool:
        """Change a job that no relay has taken yet."""
        archive = await ledger_of(self._operator)
        if archive is None or not isinstance(self._operator, AuditedOperator):
            return False
        for _ in range(TRIES):
            was = await archive.find(job_id, queue)
            if was is None or was.status != "queued":
                return False
            job, before = queued_job(was), was.document
            if before is None:
                before = codec.rewrite(document_of(was), {"id": was.id, "kind": was.kind})
            body, to, level = self._changed(job, before, change)
            due = change.run_at
            if change.delay is not None:
                due = await archive.now() + change.delay if change.delay else 0.0

            async def do(_: StoredJob, **wanted: Any) -> bool:
                moved = wanted["queue"] if wanted["queue"] != was.queue else None  # noqa: B023 - called in this turn
                return await archive.change_queued(was, body, level=wanted["level"], run_at=wanted["due"], moved=moved)  # noqa: B023

            if await self._operator.change_queued(job, do, queue=to, level=level, due=due):
                if change.payload is not None:
                    await self._operator.dispose(queue, job_id, before)
                return True
        return False

    def _changed(self, job: StoredJob, before: bytes, change: JobChange) -> tuple[bytes, str, Level]:
        """(the document, queue and level of a job after a change).

        Args:
            job: as it was.
            before: its document.
            change: what is to be different.
        """
        document = codec.read(before)
        queue, level = change.queue or job.queue, change.level or job.level
        patch: dict[str, Any] = {"id": job.job_id}
        if change.payload is not None or change.fields is not None:
            patch["payload"] = self._payload(job, document, change)
        if level != job.level:
            patch["priority"] = codec.PRIORITY_OF[level]
        if queue != job.queue:
            patch["queue_name"] = queue
        if change.timed:
            patch["run_at"] = None  # the due set, or the row, has its time
        body = codec.rewrite(before, patch)
        if len(body) > self._settings.max_job_bytes:
            raise StreamworkerError(f"the job {job.job_id} would have {len(body):,} bytes, more than is allowed")
        return body, queue, level

    def _payload(self, job: StoredJob, document: Any, change: JobChange) -> msgspec.Raw:
        kind, job_id = document.kind or "", job.job_id or ""
        known = self._handlers.handler_of(kind, job.queue) if self._handlers is not None else None
        if known is None:
            raise UsageError(
                f"the payload of {kind or 'a job without kind'} has no type here: name the app that has it"
            )
        if change.payload is not None:
            raw = msgspec.Raw(msgspec.json.encode(change.payload))
        else:
            shown = self._sealer.opened_payload(refuse_stored(document.payload), job_id, (kind, known.kind))
            fields = msgspec.json.decode(shown, type=dict[str, msgspec.Raw])
            raw = msgspec.Raw(msgspec.json.encode({**fields, **(change.fields or {})}))
        try:
            raw = codec.encode_payload(known.decode(raw))
        except Exception as error:  # noqa: BLE001 - the user's own hooks run here
            type_ = known.payload
            raise InvalidJob(f"the payload is no {type_.__name__}: {codec.misfit(type_, error)}") from None
        made = Job(id=job_id, queue=job.queue, kind=kind, payload=raw, level=job.level, created_at=datetime.now(UTC))
        return self._sealer.sealed_job(made).payload
