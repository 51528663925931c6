"""Operators and the ledger's archive straight from settings: the part of the composition root that needs no app.

The listings of the command line stand on it. It imports no worker, and PostgreSQL's driver only when the ledger is
asked: people wait for each import of a command that they type.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Literal, Protocol, TypeAlias

import anyio.to_thread
from redis.asyncio import Redis

from streamworker import codec
from streamworker.broker import Operator
from streamworker.broker.claim import StreamOptions
from streamworker.broker.operator import ListOperator, StreamOperator
from streamworker.broker.redis.client import RedisAddress
from streamworker.errors import InvalidJob, StreamworkerError, UsageError
from streamworker.policy import group_sizes
from streamworker.postgres import FINAL, Archive
from streamworker.settings import EMBEDDED, Settings
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

CancelAnswer: TypeAlias = Literal["cancelled", "asked", "ended"]
"""What `App.cancel` answers."""
NEVER_SENT: Final = ("blocked", "queued", "waiting")
"""The statuses of jobs that are in the ledger alone."""


class Canceller(Protocol):
    """Cancels jobs that are in Redis: a broker, or an operator."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """Delete a delayed job, or mark one that waits or runs; whether it was deleted."""

    async def pass_on(self, queue: str, order: str, job_id: str) -> None:
        """Pass an order key on that a job kept while it waited in the ledger."""


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
    if final and record.status in NEVER_SENT:
        return "cancelled"
    gone = await canceller.cancel(queue, job_id)
    return "cancelled" if final or gone else "asked"


def order_key_of(body: bytes | None) -> str:
    """The order key of a document; empty if it has none, or cannot be read."""
    try:
        return "" if body is None else codec.read(body).order_key or ""
    except InvalidJob:
        return ""


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

    async def __call__(self, queue: str, ids: Sequence[str]) -> None:
        """Free the keys of these jobs; what PostgreSQL refuses is logged, since the jobs have ended all the same."""
        if self._url is None:
            return
        from streamworker.postgres.archive import open_archive  # noqa: PLC0415 - it imports asyncpg, which listings do not use

        try:
            if self._archive is None:
                self._archive = await open_archive(self._stack, self._url, required=False)
            if self._archive is None:
                self._url = None
            else:
                await self._archive.free_keys(queue, ids)
        except StreamworkerError as error:
            log.warning("keys_not_freed", queue=queue, jobs=len(ids), error=str(error))


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
        operator = kind(address, broker_options(settings, queues), LedgerKeys(stack, settings, url))
        stack.push_async_callback(operator.close)
        await operator.open()
        yield operator


async def open_servers(
    stack: AsyncExitStack, settings: Settings, redis: Redis | str | None
) -> tuple[RedisAddress, str | None]:
    """(where Redis is, URL of the database); the embedded pair is started if that is what the settings say."""
    database = settings.database_url
    if redis is not None and not isinstance(redis, str):
        return RedisAddress.of(redis), database
    url = (Settings(redis_url=redis) if redis else settings).require_redis_url()
    if url == EMBEDDED:
        from streamworker import embedded  # noqa: PLC0415 - few use them

        servers = await anyio.to_thread.run_sync(embedded.acquire, settings.state_dir)
        stack.callback(servers.close)
        url, database = servers.redis_url, database or servers.database_url
    return RedisAddress(url), database


async def database_of(stack: AsyncExitStack, settings: Settings) -> str:
    """The URL of the database; the embedded pair is started if that is what the settings say.

    Raises:
        ConfigurationError: no database is named.
    """
    url = settings.database_url
    if url is None and settings.redis_url == EMBEDDED:
        _, url = await open_servers(stack, settings, None)
    return url or settings.require_database_url()


async def require_archive(stack: AsyncExitStack, settings: Settings) -> Archive:
    """What people ask the ledger, closed with ``stack``.

    Raises:
        ConfigurationError: no database is named, or it has no schema streamworker.
        Unreachable: PostgreSQL does not answer.
    """
    from streamworker.postgres.archive import open_archive  # noqa: PLC0415 - it imports asyncpg

    return await open_archive(stack, await database_of(stack, settings))


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
        fair_weights=tuple((each.tenant, each.weight) for each in settings.fair_weights),
        groups=group_sizes(settings.max_deliveries, settings.concurrency),
    )
