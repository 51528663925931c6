"""What an app offers to whoever makes jobs: one by one, by the thousand, and from sync code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from datetime import datetime
from typing import Any

import asyncpg
from typing_extensions import Unpack

from streamworker import codec
from streamworker.blocking import BackgroundLoop, refuse_on_loop, refuse_patched
from streamworker.broker import Broker
from streamworker.errors import UsageError
from streamworker.handlers import Payload
from streamworker.job import Enqueued, Job
from streamworker.jobs import JobOptions, job_of, make_job
from streamworker.observe import Sender
from streamworker.postgres import outbox
from streamworker.settings import Settings


class Producer:
    """Makes and enqueues jobs. An `App` says where they go."""

    def __init__(self) -> None:
        self._senders: tuple[Sender, ...] = ()
        self._background: BackgroundLoop[Producer] | None = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def _outlet(self) -> Broker | None:
        """Where jobs go, ``None`` while the app is not open.

        Raises:
            UsageError: the app is open on another event loop.
        """
        raise NotImplementedError

    def _rules(self) -> Settings:
        """The settings in force, or that would be."""
        raise NotImplementedError

    def _sibling(self) -> AbstractAsyncContextManager[Producer]:
        """The same app, opened on another event loop."""
        raise NotImplementedError

    def job(self, payload: Payload, /, **options: Unpack[JobOptions]) -> Job:
        """Make a job with options, for `enqueue_many`.

        Args:
            payload: its class names kind and queue.
            options: see `JobOptions`.

        Raises:
            UsageError: an option makes no sense, or two contradict each other.
            InvalidJob: the payload does not fit its own type, or cannot be written as JSON.
        """
        return make_job(payload, **options)

    async def enqueue(
        self,
        payload: Payload | Job,
        /,
        *,
        queue: str | None = None,
        priority: str | int = "normal",
        delay: float | None = None,
        run_at: datetime | None = None,
        key: str | None = None,
        key_ttl: float | None = None,
        headers: dict[str, Any] | None = None,
        connection: asyncpg.Connection[asyncpg.Record] | None = None,
    ) -> Enqueued:
        """Enqueue one job.

        Args:
            payload: its class names kind and queue; or a job made with `job`, which has its options.
            queue: another queue than the class names.
            priority: ``high``, ``normal``, ``low``, or a number (up to 50 high, up to 150 normal, else low).
            delay: seconds to wait from now on.
            run_at: not before this moment; without a time zone it is UTC.
            key: deduplication key: while it is remembered, enqueueing again gives the earlier job's id.
            key_ttl: seconds the key is remembered; ``STREAMWORKER_KEY_TTL`` unless given.
            headers: travel with the job; anything JSON can hold.
            connection: an asyncpg connection in a transaction: the job commits or vanishes with the caller's rows.

        Raises:
            UsageError: the app is not open, or on another event loop; it is no payload; or an option makes no sense.
            InvalidJob: the payload does not fit its own type, or cannot be written as JSON.
            PublishUncertain: the reply was lost; with ``key`` enqueueing again is safe.
            JobTooLarge: the document exceeds ``STREAMWORKER_MAX_JOB_BYTES``.
            ConfigurationError: the database of ``connection`` has no schema streamworker.
            Unreachable: no server answers.
        """
        options = JobOptions(
            queue=queue, priority=priority, delay=delay, run_at=run_at, key=key, key_ttl=key_ttl, headers=headers
        )
        return (await self.enqueue_many([job_of(payload, **options)], connection=connection))[0]

    async def enqueue_many(
        self, jobs: Iterable[Payload | Job], /, *, connection: asyncpg.Connection[asyncpg.Record] | None = None
    ) -> list[Enqueued]:
        """Enqueue many jobs, up to a thousand per round trip; answers in order.

        With ``connection`` the app need not be open: Redis is not asked.

        Args:
            jobs: payloads, or jobs made with `job`.
            connection: see `enqueue`.

        Raises:
            UsageError: one of them is no payload and no job; nothing was enqueued.
            InvalidJob: a payload does not fit its own type, or cannot be written as JSON; nothing was enqueued.
            PublishUncertain: a reply was lost; some of the jobs may be queued.
            JobTooLarge: a document exceeds ``STREAMWORKER_MAX_JOB_BYTES``; nothing was enqueued.
        """
        if isinstance(jobs, Payload | Job) or not isinstance(jobs, Iterable):
            raise UsageError(f"enqueue_many() takes a list: enqueue_many([...]), not one {type(jobs).__name__}")
        made = [job if isinstance(job, Job) else make_job(job) for job in jobs]
        if not self._senders or not made:
            return await self._send(made, connection)
        with ExitStack() as stack:
            return await self._send(self._seen_off(stack, made), connection)

    def _seen_off(self, stack: ExitStack, jobs: Sequence[Job]) -> Sequence[Job]:
        for sender in self._senders:
            jobs = stack.enter_context(sender.sending(jobs))
        return jobs

    async def _send(
        self, made: Sequence[Job], connection: asyncpg.Connection[asyncpg.Record] | None = None
    ) -> list[Enqueued]:
        settings = self._rules()
        if connection is not None:
            return await outbox.enqueue(connection, made, max_bytes=settings.max_job_bytes, key_ttl=settings.key_ttl)
        broker = self._outlet()
        if broker is None:
            raise UsageError("the app is not open: enqueue inside `async with app:`")
        packed = [codec.pack(job, max_bytes=settings.max_job_bytes, key_ttl=settings.key_ttl) for job in made]
        return await broker.publish(packed) if packed else []

    def enqueue_blocking(self, payload: Payload | Job, /, **options: Unpack[JobOptions]) -> Enqueued:
        """`enqueue` for sync code: a script, a thread, a sync handler.

        Args:
            payload: its class names kind and queue; or a job made with `job`, which has its options.
            options: see `JobOptions`.

        Raises:
            UsageError: called on the event loop of the app, which it would block, or gevent or eventlet has patched
                this process; else what `enqueue` raises.
        """
        job = job_of(payload, **options)
        refuse_patched()
        refuse_on_loop("enqueue_blocking() would block this event loop: await enqueue() instead", self._loop)
        with self._lock:
            if self._background is None or not self._background.alive:
                self._background = BackgroundLoop(self._sibling)
        background = self._background
        with ExitStack() as stack:  # here, where the caller's context is; the sibling has no senders
            sent = self._seen_off(stack, [job])
            return background.call(lambda sibling: sibling.enqueue_many(sent))[0]
